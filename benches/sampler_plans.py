"""What each way of skipping work in a sampler saves and changes, beside plain grids of equal measured time.

    pip install onnxruntime==1.32.0 numpy
    cargo build --release
    python benches/sampler_plans.py target/release/optimize --denoiser dit.onnx [--features features.onnx --real DIR]

The denoiser takes x, t and label (10 is "none") and predicts noise under linear betas 1e-4..0.02. Every plan of METHODS
is compiled for --steps DDIM steps with guidance --guidance. For each: time of a batch (median of --rounds, plans and grids
in turn), speed against all steps, PSNR (median and the tenth percentile) over --pairs samples of equal noise, and, with
--features, the kernel distance of --draws samples to the test images of Fashion-MNIST in DIR. The next columns are the
plain grid of the most steps that takes no more time: what a plan must beat; the last says by which measures it does. `adaptive` is
--form adaptive, which decides for a whole batch of 16 while it runs.
"""
import argparse
import gzip
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime as ort

CONFIG = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
          "beta_schedule": "linear", "clip_sample": True, "timestep_spacing": "leading"}
METHODS = [
    "gate:at=30", "gate:threshold=0.99", "linear-guidance", "delta:speed=1.5", "arms:every=2", "stack:every=2",
    "forecast:every=2", "forecast:every=3", "forecast:every=3,points=3", "easy", "sada", "dual:most=0.2",
    "gate:at=30+forecast:every=2", "adaptive",
]
UNROLLED = ["--form", "unrolled"]


def compile_plan(a, name, folder, *more):
    config = folder / "scheduler.json"
    config.write_text(json.dumps(CONFIG))
    out = folder / f"{name}.onnx"
    command = [a.tool, "sampler", a.denoiser, "-o", out, "--scheduler", config, "--io", "uncond:label=10", "--guidance",
               a.guidance, "--no-verify", "-q", "--overwrite", *more]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return (out, None) if done.returncode == 0 else (None, done.stderr.strip().splitlines()[-1])


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def draw(net, count, seed, batch=16):
    rng = np.random.default_rng(seed)
    noise, label = rng.standard_normal((count, 1, 28, 28)).astype(np.float32), np.arange(count) % 10
    parts = [net.run(["sample"], {"noise": noise[i:i + batch], "label": label[i:i + batch]})[0]
             for i in range(0, count, batch)]
    return np.concatenate(parts)


def psnr(a, b):
    square = ((np.clip(a, -1, 1) - np.clip(b, -1, 1)) ** 2).mean((1, 2, 3))
    return 20 * np.log10(2) - 10 * np.log10(np.maximum(square, 1e-12))


def kid(a, b):
    """The unbiased kernel distance of all rows."""
    k = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    own = lambda m: (m.sum() - np.trace(m)) / (len(m) * (len(m) - 1))
    return own(k(a, a)) + own(k(b, b)) - 2 * k(a, b).mean()


def real_features(net, folder, count):
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
    return features(net, images.astype(np.float32) / 127.5 - 1)


def features(net, images):
    name = net.get_inputs()[0].name
    parts = [net.run(None, {name: images[i:i + 100]})[0] for i in range(0, len(images), 100)]
    return np.concatenate(parts).astype(np.float64)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("tool")
    ap.add_argument("--denoiser", required=True)
    ap.add_argument("--features")
    ap.add_argument("--real", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--guidance", default="2")
    ap.add_argument("--pairs", type=int, default=64)
    ap.add_argument("--draws", type=int, default=512)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--grids", type=int, nargs="*", default=[10, 15, 20, 25, 30, 35, 40, 45])
    ap.add_argument("--methods", nargs="*", default=METHODS)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = {"all steps": compile_plan(a, "full", folder, "--steps", a.steps, *UNROLLED)}
        for n in a.grids:
            made[f"{n} steps"] = compile_plan(a, f"grid{n}", folder, "--steps", n, *UNROLLED)
        for i, method in enumerate(a.methods):
            how = ["--form", "adaptive"] if method == "adaptive" else ["--plan", method, *UNROLLED]
            made[method] = compile_plan(a, f"plan{i}", folder, "--steps", a.steps, *how)
        for plan, (_, why) in made.items():
            if why:
                print(f"{plan}: {why}")
        nets = {plan: session(path) for plan, (path, why) in made.items() if not why}
        if "all steps" not in nets:
            sys.exit("the plain sampler was not made")
        times = {plan: [] for plan in nets}
        for _ in range(a.rounds):
            for plan, net in nets.items():
                start = time.perf_counter()
                draw(net, 16, 1)
                times[plan].append(time.perf_counter() - start)
        times = {plan: float(np.median(t)) for plan, t in times.items()}
        reference = draw(nets["all steps"], a.pairs, 0)
        ratio = {plan: psnr(reference, draw(net, a.pairs, 0)) for plan, net in nets.items()}
        distance = {}
        if a.features:
            eye = session(a.features)
            real = real_features(eye, a.real, 5000)
            distance = {plan: kid(features(eye, draw(net, a.draws, 2)), real) for plan, net in nets.items()}
        print(f"{'plan':32} {'ms':>7} {'speed':>6} {'psnr':>6} {'p10':>6} {'kid':>8} | {'grid':>9} {'psnr':>6} {'kid':>8} | pays")
        grids = [f"{n} steps" for n in sorted(a.grids) if f"{n} steps" in nets]
        medians = {p: float(np.median(r)) for p, r in ratio.items()}
        for plan in nets:
            equal = [g for g in grids if times[g] <= times[plan] * 1.02]
            equal = equal[-1] if equal else ""
            better = {measure for measure, sign, values in [("psnr", 1, medians), ("kid", -1, distance)]
                      if equal in values and sign * values[plan] > sign * values[equal]}
            verdict = "" if plan in grids or plan == "all steps" else " and ".join(sorted(better)) or "no"
            show = lambda p, values, form: format(values[p], form) if p in values else "-"
            print(f"{plan:32} {times[plan] * 1e3:7.0f} {times['all steps'] / times[plan]:6.2f} {medians[plan]:6.1f} "
                  f"{np.quantile(ratio[plan], 0.1):6.1f} {show(plan, distance, '8.4f'):>8} | {equal:>9} "
                  f"{show(equal, medians, '6.1f'):>6} {show(equal, distance, '8.4f'):>8} | {verdict}")


if __name__ == "__main__":
    main()
