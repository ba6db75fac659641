"""Every scheduler of diffusers that is compiled, beside the loop of diffusers itself.

    pip install torch diffusers==0.42.1 onnx onnxruntime==1.32.0 numpy scipy torchsde
    cargo build --release
    python benches/sampler_parity.py target/release/optimize [--only Heun]

A tiny denoiser with a condition is compiled for every class at 5 and 10 steps, for noise, velocity and clean sample where
the class has them, with guidance 1 and 3, and with the other settings of the class. The loop of diffusers runs the same
denoiser in ONNX Runtime from the same noise; what is printed is the relative L2 difference of the samples, the largest of
each class and settings. It fails where one is above 1e-4, or where the timesteps are others. Where the float32 arithmetic of diffusers itself is further than
that from its own formulas in float64, the latter are what counts, and the line says so.
"""
import argparse
import inspect
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import diffusers
import numpy as np
import onnx
import onnxruntime as ort
import torch

LIMIT = 1e-4
SHAPE = (2, 1, 2, 2)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPREAD = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
SPACED = [{"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
NOISE_FORM = {"final_sigmas_type": "sigma_min"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
VE = SPREAD + SPACED

# The settings of each class besides its own defaults; predictions are added where the class has them.
CASES = {
    "DDPMScheduler": [SD, {"variance_type": "fixed_large"}, {"thresholding": True, "sample_max_value": 1.5}, ZERO],
    "DDIMScheduler": [SD, {"clip_sample": False}, {"set_alpha_to_one": False, **SPACED[0]}, ZERO],
    "PNDMScheduler": [SD, {"skip_prk_steps": True, **SD}, {"skip_prk_steps": True, "set_alpha_to_one": True, **SPACED[0]},
                      {"skip_prk_steps": True, **SPACED[1]}, {"skip_prk_steps": True, "timestep_spacing": "linspace"}],
    "EulerDiscreteScheduler": [SD, *VE, {"interpolation_type": "log_linear"}, {"final_sigmas_type": "sigma_min"},
                               {"timestep_type": "continuous", "prediction_type": "v_prediction"}, ZERO],
    "EulerAncestralDiscreteScheduler": [SD, *SPACED, ZERO],
    "HeunDiscreteScheduler": [SD, *VE, {"clip_sample": True}, {"beta_schedule": "exp"}],
    "KDPM2DiscreteScheduler": [SD, *VE],
    "KDPM2AncestralDiscreteScheduler": [SD, *VE],
    "LMSDiscreteScheduler": [SD, *VE],
    "DPMSolverSDEScheduler": [SD, *VE],
    "DPMSolverMultistepScheduler": [
        SD, *SPREAD, *[{**SD, **s} for s in SPREAD], *SPACED, {"use_lu_lambdas": True, **SD}, FLOW, ZERO,
        {"solver_order": 3}, {"solver_order": 3, "solver_type": "heun"}, {"solver_type": "heun"},
        {"algorithm_type": "dpmsolver", **NOISE_FORM}, {"algorithm_type": "dpmsolver", "solver_order": 3, **NOISE_FORM},
        {"algorithm_type": "sde-dpmsolver", **NOISE_FORM},
        {"algorithm_type": "sde-dpmsolver", "solver_type": "heun", **NOISE_FORM},
        {"algorithm_type": "sde-dpmsolver++"}, {"thresholding": True}, {"lambda_min_clipped": -5.1},
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True, "lambda_min_clipped": -5.1},
    ],
    "DPMSolverSinglestepScheduler": [
        SD, *SPREAD, FLOW, {"solver_order": 3}, {"solver_order": 3, "solver_type": "heun"}, {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        {"algorithm_type": "dpmsolver", **NOISE_FORM}, {"algorithm_type": "dpmsolver", "solver_order": 3, **NOISE_FORM},
        {"thresholding": True}, {"lower_order_final": True},
    ],
    "UniPCMultistepScheduler": [
        SD, *SPREAD, *SPACED, FLOW, {**FLOW, "shift_terminal": 0.1}, {**FLOW, "use_karras_sigmas": True}, ZERO,
        {"solver_order": 1}, {"solver_order": 3}, {"solver_order": 3, "solver_type": "bh1", **NOISE_FORM},
        {"predict_x0": False, **NOISE_FORM}, {"predict_x0": False, "solver_order": 3, **NOISE_FORM},
        {"disable_corrector": [0, 2]}, {"thresholding": True}, {"use_karras_sigmas": True, **NOISE_FORM},
    ],
    "DEISMultistepScheduler": [SD, *SPREAD, *SPACED, FLOW, {"solver_order": 3}, {"solver_order": 1}, {"thresholding": True}],
    "SASolverScheduler": [SD, *SPREAD, *SPACED, FLOW, {"predictor_order": 3, "corrector_order": 4},
                          {"algorithm_type": "noise_prediction"}, {"thresholding": True},
                          {"predictor_order": 1, "corrector_order": 1}],
    "EDMEulerScheduler": [{"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}],
    "EDMDPMSolverMultistepScheduler": [{"sigma_schedule": "exponential"}, {"solver_order": 3}, {"solver_type": "heun"},
                                       {"algorithm_type": "sde-dpmsolver++"}, {"thresholding": True},
                                       {"final_sigmas_type": "sigma_min"}],
    "CosineDPMSolverMultistepScheduler": [{"solver_type": "heun"}, {"sigma_schedule": "karras"}],
    "FlowMatchEulerDiscreteScheduler": [{"shift": 3.0}, *[{"shift": 3.0, **s} for s in SPREAD], {"shift_terminal": 0.1},
                                        {"invert_sigmas": True}, {"stochastic_sampling": True}],
    "FlowMatchHeunDiscreteScheduler": [{"shift": 3.0}],
    "LTXEulerAncestralRFScheduler": [{"eta": 0.5}, {"eta": 0.0}],
    "LCMScheduler": [{"clip_sample": True}, ZERO],
    "FlowMatchLCMScheduler": [{"shift": 3.0}, {"use_beta_sigmas": True}],
    "TCDScheduler": [ZERO],
    "CMStochasticIterativeScheduler": [{"clip_denoised": False}, {"s_noise": 1.1}],
    "SCMScheduler": [{"sigma_data": 1.0}],
    "IPNDMScheduler": [],
    "CogVideoXDDIMScheduler": [{"timestep_spacing": "trailing"}, ZERO],
    "CogVideoXDPMScheduler": [{"timestep_spacing": "trailing"}, ZERO],
}
# Predictions that a class names and its `step` does not know.
UNKNOWN = {"KDPM2DiscreteScheduler": ["sample"], "KDPM2AncestralDiscreteScheduler": ["sample"], "PNDMScheduler": ["sample"],
           "EulerAncestralDiscreteScheduler": ["sample"],
           "DPMSolverSDEScheduler": ["sample"], "EDMEulerScheduler": ["sample"],
           "EDMDPMSolverMultistepScheduler": ["sample"], "CosineDPMSolverMultistepScheduler": ["sample"]}


def denoiser(path):
    """A network of two layers whose output depends on everything it is told, and is of the size of its input."""
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[n,1,2,2] x, float[n] t, int64[n] label) => (float[n,1,2,2] eps) <
        float[3,1] table = {0.3, -0.2, 0.1}, float[1] speed = {0.004}, int64[4] shape = {-1, 1, 1, 1},
        float[2,2] w1 = {0.4, -0.3, 0.2, 0.5}, float[2,2] w2 = {0.1, 0.6, -0.5, 0.2}
    > {
        angle = Mul (t, speed)
        wave = Cos (angle)
        time = Reshape (wave, shape)
        row = Gather (table, label)
        cond = Reshape (row, shape)
        mix = Add (time, cond)
        p1 = MatMul (x, w1)
        a1 = Tanh (p1)
        m1 = Mul (a1, mix)
        h1 = Add (x, m1)
        p2 = MatMul (h1, w2)
        a2 = Tanh (p2)
        eps = Add (h1, a2)
    }"""
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def session(path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Noise:
    """Hands out noise in the order in which diffusers draws it."""

    def __init__(self, draws):
        self.draws, self.count = draws, 0

    def __call__(self, *_, **__):
        self.count += 1
        return torch.from_numpy(self.draws[self.count - 1])


class Path:
    """Hands out what one Brownian path does: to the middle of a step, and from its beginning to its end."""

    def __init__(self, draws):
        self.draws, self.count, self.middle = draws, 0, None

    def __call__(self, sigma, to):
        fresh = torch.from_numpy(self.draws[self.count])
        self.count += 1
        if self.middle is None:
            self.middle = (to, fresh)
            return fresh
        (middle, first), self.middle = self.middle, None
        share = float((sigma - middle) / (sigma - to))
        return share**0.5 * first + (1 - share) ** 0.5 * fresh


def used(name, solver, draws, compiled):
    """Which draws of diffusers the compiled sampler takes, which leaves out those that it multiplies by zero."""
    if name == "SASolverScheduler":
        times, sigmas = solver.timesteps, solver.sigmas
        return [i for i, t in enumerate(times) if 200 <= t <= 800 and sigmas[i] != sigmas[i + 1]]
    if name == "CogVideoXDPMScheduler":
        # Two are drawn at every step but the first and the last, and the second is taken.
        return [0] + [2 + 2 * i for i in range(compiled - 1)]
    return range(compiled)


def loop(net, name, settings, steps, guidance, noise, draws, label, dtype=torch.float32):
    """The sample of diffusers, its scheduler, and how often it drew noise."""
    solver = getattr(diffusers, name)(**settings)
    solver.set_timesteps(steps) if name != "SCMScheduler" or steps == 2 else solver.set_timesteps(
        steps, intermediate_timesteps=None)
    if hasattr(solver, "set_begin_index"):
        solver.set_begin_index(0)
    if dtype != torch.float32:
        solver.sigmas = solver.sigmas.to(dtype)
    draw = Path(draws) if name == "DPMSolverSDEScheduler" else Noise(draws)
    module = sys.modules[type(solver).__module__]
    if hasattr(solver, "noise_sampler"):
        solver.noise_sampler = draw
    elif hasattr(module, "randn_tensor"):
        module.randn_tensor = draw

    def predict(x, t, labels):
        times = np.full(len(x), float(t), np.float32)
        return torch.from_numpy(net.run(None, {"x": x.numpy().astype(np.float32), "t": times, "label": labels})[0]).to(dtype)

    x = torch.from_numpy(noise).to(dtype) * getattr(solver, "init_noise_sigma", 1.0)
    times = solver.timesteps[:-1] if name == "SCMScheduler" else solver.timesteps
    last = None
    for index, t in enumerate(times):
        seen = solver.scale_model_input(x, t) if hasattr(solver, "scale_model_input") else x
        m = predict(seen, t, label)
        if guidance != 1:
            bare = predict(seen, t, np.full_like(label, 2))
            m = bare + guidance * (m - bare)
        if name == "CogVideoXDPMScheduler":
            x, last = solver.step(m, last, t, times[index - 1] if index else None, x, return_dict=False)
        else:
            x = solver.step(m, t, x, return_dict=False)[0]
        x = x.to(dtype)
    return x.numpy(), solver, draw.count


def compiled_sample(tool, folder, config, steps, guidance, noise, label, step_noise):
    """The sample of the compiled sampler. `step_noise` gives so many draws of noise."""
    (folder / "scheduler_config.json").write_text(config)
    command = [tool, "sampler", folder / "denoiser.onnx", "-o", folder / "sampler.onnx", "--scheduler",
               folder / "scheduler_config.json", "--steps", steps, "--io", "uncond:label=2", "-q", "--no-verify",
               "--save-plan", folder / "plan.json"]
    if guidance != 1:
        command += ["--guidance", guidance]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    net = session(folder / "sampler.onnx")
    feeds = {"noise": noise, "label": label}
    for value in net.get_inputs():
        if value.name == "step_noise":
            feeds["step_noise"] = step_noise(value.shape[0])
    return net.run(["sample"], feeds)[0], json.loads((folder / "plan.json").read_text())["grid"]


def same_times(name, solver, grid):
    """Whether the timesteps are those of diffusers; a last row that changes nothing is left out."""
    times = [float(t) for t in solver.timesteps][: len(grid)]
    whole = not torch.is_floating_point(torch.as_tensor(solver.timesteps))
    return len(times) == len(grid) and np.allclose(times, grid, rtol=0 if whole else 1e-5, atol=0 if whole else 2e-3)


def predictions(name, settings):
    """What the network may predict, if the settings do not say it and the class asks."""
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    if "prediction_type" not in known or "prediction_type" in settings or name == "SCMScheduler":
        return [{}]
    words = [w for w in ("epsilon", "v_prediction", "sample") if w not in UNKNOWN.get(name, [])]
    return [{"prediction_type": word} for word in words]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", type=pathlib.Path)
    parser.add_argument("--only", default="", help="part of the name of the classes that are run")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    print(f"diffusers {diffusers.__version__}, ONNX Runtime {ort.__version__}\n")
    print("| class | settings | runs | largest relative L2 difference |\n|---|---|---|---|")
    worst, runs, bad = 0.0, 0, 0
    random = np.random.default_rng(0)
    label = np.array([0, 1], np.int64)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        denoiser(folder / "denoiser.onnx")
        net = session(folder / "denoiser.onnx")
        for cls in [cls for cls in CASES if args.only in cls]:
            for case in [{}, *CASES[cls]]:
                errors, doubled = [], 0
                for settings in [{**case, **word} for word in predictions(cls, case)]:
                    for steps in args.steps:
                        for guidance in (1, 3):
                            noise = random.standard_normal(SHAPE, np.float32)
                            draws = random.standard_normal((2 * steps + 2, *SHAPE), np.float32)
                            what = f"{cls} {settings} {steps} steps, guidance {guidance}"
                            try:
                                expected, solver, drawn = loop(net, cls, settings, steps, guidance, noise, draws, label)
                                found, grid = compiled_sample(
                                    args.tool, folder, solver.to_json_string(), steps, guidance, noise, label,
                                    lambda count: draws[list(used(cls, solver, drawn, count))])
                                error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                                if not same_times(cls, solver, grid):
                                    raise RuntimeError(f"timesteps {grid}, and diffusers has {solver.timesteps.tolist()}")
                                if error > LIMIT and isinstance(getattr(solver, "sigmas", None), torch.Tensor):
                                    expected, _, _ = loop(net, cls, settings, steps, guidance, noise, draws, label,
                                                          torch.float64)
                                    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                                    doubled += 1
                            except Exception as failure:  # What cannot be run is told and counted, and the rest goes on.
                                print(f"{what}: {type(failure).__name__}: {failure}", file=sys.stderr)
                                error = np.inf
                            errors.append(error)
                            if not error <= LIMIT:
                                bad += 1
                                print(f"{what}: {error:.2e}", file=sys.stderr)
                runs += len(errors)
                worst = max(worst, *errors)
                note = f", {doubled} from float64" if doubled else ""
                print(f"| {cls} | {json.dumps(case) if case else 'defaults'} | {len(errors)} | {max(errors):.1e}{note} |",
                      flush=True)
    print(f"\n{runs} runs, {bad} above {LIMIT:.0e}, worst {worst:.1e}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
