"""Compiled samplers beside the loops of diffusers, and what the three forms cost.

    pip install torch diffusers==0.42.1 onnxruntime==1.32.0 numpy
    cargo build --release
    python benches/sampler.py target/release/optimize parity --denoiser dit.onnx
    python benches/sampler.py target/release/optimize forms --denoiser dit.onnx

`parity` compiles the denoiser (inputs x, t, label; label 10 is "none"; it predicts noise under linear betas 1e-4..0.02)
for every scheduler, number of steps and guidance, runs the loop of diffusers with ONNX Runtime in the place of the
network on the same noise, and prints the relative L2 difference of the samples. For flow-Euler the same network is taken
for a flow: what it draws is nothing, but the two must agree. `forms` prints file size, nodes, load time, resident memory
and time of one batch of the forms.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {"clip_sample": True, **BETAS}),
    "Euler": ("EulerDiscreteScheduler", BETAS),
    "Euler-a": ("EulerAncestralDiscreteScheduler", BETAS),
    "DPM++2M": ("DPMSolverMultistepScheduler", BETAS),
    "flow-Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "LCM": ("LCMScheduler", {"clip_sample": True, **BETAS}),
}


def compile_sampler(tool, denoiser, out, scheduler, steps, guidance, *more):
    config = out.with_suffix(".json")
    config.write_text(json.dumps({"_class_name": scheduler[0], **scheduler[1]}))
    command = [tool, "sampler", denoiser, "-o", out, "--scheduler", config, "--steps", steps, "--io", "uncond:label=10",
               "-q", "--report", out.with_suffix(".report.json"), *more]
    if guidance != 1:
        command += ["--guidance", guidance]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(out.with_suffix(".report.json").read_text())


def session(path, optimize=True):
    import onnxruntime as ort
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Noise:
    """Hands out the noise of the steps in order, in the place of diffusers' generator."""

    def __init__(self, noises):
        self.left = list(noises)

    def __call__(self, *_, **__):
        import torch
        return torch.from_numpy(self.left.pop(0))


def diffusers_loop(net, scheduler, steps, guidance, noise, step_noise, label):
    import diffusers
    import torch
    name, settings = scheduler
    solver = getattr(diffusers, name)(**settings)
    solver.set_timesteps(steps)
    module = sys.modules[type(solver).__module__]
    draw = Noise(step_noise)
    if hasattr(module, "randn_tensor"):
        module.randn_tensor = draw

    def predict(x, t, labels):
        times = np.full(len(x), float(t), np.float32)
        return torch.from_numpy(net.run(None, {"x": x.numpy(), "t": times, "label": labels})[0])

    x = torch.from_numpy(noise) * getattr(solver, "init_noise_sigma", 1.0)
    for t in solver.timesteps:
        seen = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        m = predict(seen, t, label)
        if guidance != 1:
            bare = predict(seen, t, np.full_like(label, 10))
            m = bare + guidance * (m - bare)
        x = solver.step(m, t, x).prev_sample
    return x.numpy(), len(step_noise) - len(draw.left)


def parity(args):
    import diffusers
    import onnxruntime
    print(f"diffusers {diffusers.__version__}, ONNX Runtime {onnxruntime.__version__}, {args.denoiser.name}\n")
    print("| scheduler | steps | guidance | relative L2 difference | nodes | seconds to compile |\n|---|---|---|---|---|---|")
    net = session(args.denoiser)
    random = np.random.default_rng(0)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "sampler.onnx"
        for name, scheduler in SCHEDULERS.items():
            for steps in args.steps:
                for guidance in (1, 3):
                    # The loop of diffusers is the proof here.
                    report = compile_sampler(args.tool, args.denoiser, out, scheduler, steps, guidance, "--no-verify")
                    noise = random.standard_normal((2, 1, 28, 28), np.float32)
                    extra = random.standard_normal((steps, 2, 1, 28, 28), np.float32)
                    label = np.array([3, 7], np.int64)
                    expected, drawn = diffusers_loop(net, scheduler, steps, guidance, noise, extra, label)
                    compiled = session(out)
                    feeds = {"noise": noise, "label": label}
                    for value in compiled.get_inputs():
                        if value.name == "step_noise":
                            feeds["step_noise"] = extra[:value.shape[0]]
                    found = compiled.run(["sample"], feeds)[0]
                    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                    worst = max(worst, error)
                    nodes, seconds = report["output"]["nodes_total"], report["seconds"]
                    print(f"| {name} | {steps} | {guidance} | {error:.1e} | {nodes} | {seconds:.1f} |", flush=True)
    print(f"\nworst {worst:.1e}")
    return worst <= 1e-4


# A process of its own for each form: memory of one model must not count for the next.
PROBE = """
import json, sys, time
import numpy as np, onnxruntime as ort
def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
o = ort.SessionOptions(); o.intra_op_num_threads = 1
before, start = resident(), time.perf_counter()
s = ort.InferenceSession(sys.argv[1], o, providers=["CPUExecutionProvider"])
load, loaded = time.perf_counter() - start, resident()
r = np.random.default_rng(0)
feeds = {"noise": r.standard_normal((8, 1, 28, 28), np.float32), "label": np.arange(8, dtype=np.int64)}
s.run(["sample"], feeds)
times = []
for _ in range(3):
    start = time.perf_counter(); s.run(["sample"], feeds); times.append(time.perf_counter() - start)
print(json.dumps({"load": load, "loaded": loaded - before, "after": resident() - before, "run": sorted(times)[1]}))
"""


def forms(args):
    size = args.denoiser.stat().st_size
    print(f"denoiser {size / 2**20:.2f} MiB; DDIM, guidance 3, a batch of 8, one thread\n")
    print("| form | steps | file, MiB | of the denoiser | nodes | load, s | memory after load, MiB | after runs | run, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for steps in args.steps:
            for form in ("unrolled", "loop", "adaptive"):
                out = pathlib.Path(folder) / f"{form}.onnx"
                report = compile_sampler(args.tool, args.denoiser, out, SCHEDULERS["DDIM"], steps, 3, "--form", form,
                                         "--no-verify")
                probe = subprocess.run([sys.executable, "-c", PROBE, str(out)], capture_output=True, text=True, check=True)
                found, file = json.loads(probe.stdout), out.stat().st_size
                print(f"| {form} | {steps} | {file / 2**20:.2f} | {file / size:.3f} | {report['output']['nodes_total']} "
                      f"| {found['load']:.2f} | {found['loaded'] / 1024:.0f} | {found['after'] / 1024:.0f} "
                      f"| {found['run']:.2f} |", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", type=pathlib.Path)
    parser.add_argument("what", choices=["parity", "forms"])
    parser.add_argument("--denoiser", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    args = parser.parse_args()
    sys.exit(0 if {"parity": parity, "forms": forms}[args.what](args) else 1)


if __name__ == "__main__":
    main()
