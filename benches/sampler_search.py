"""Searched timesteps beside those of the schedulers, by FID and KID.

    pip install onnxruntime==1.32.0 numpy
    cargo build --release
    python benches/sampler_search.py target/release/optimize --denoiser dit.onnx --features features.onnx

Searches --steps timesteps of DDIM for the denoiser (inputs x, t, label; label 10 is "none"), then draws --draws samples
of the found grid, of DDIM's own and of DPM-Solver++ 2M's, from the same noise and labels, and prints FID and KID to as
many test images of Fashion-MNIST in --real.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from sampler_plans import CONFIG, draw, features, kid, real_features, session

DPM = {**CONFIG, "_class_name": "DPMSolverMultistepScheduler"}


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")


def fid(a, b):
    """By the singular values of the product of the rows, which needs no root of a matrix."""
    left, right = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    first, second = left.T @ left, right.T @ right
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * shared


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("tool")
    ap.add_argument("--denoiser", required=True)
    ap.add_argument("--features", required=True)
    ap.add_argument("--real", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    ap.add_argument("--steps", type=int, nargs="*", default=[4, 6, 10])
    ap.add_argument("--guidance", default="1")
    ap.add_argument("--evaluations", type=int, default=200)
    ap.add_argument("--pairs", type=int, default=32)
    ap.add_argument("--draws", type=int, default=5000)
    ap.add_argument("--decide", type=int, default=1000, help="samples of each finalist inside the search; 0 for none")
    a = ap.parse_args()
    eye = session(a.features)
    real = real_features(eye, a.real, a.draws)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        images = folder / "real.npz"
        import gzip
        with gzip.open(a.real / "train-images-idx3-ubyte.gz") as file:
            raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:5000]
        np.savez(images, x=raw.astype(np.float32) / 127.5 - 1)
        for config, stem in ((CONFIG, "ddim"), (DPM, "dpm")):
            (folder / f"{stem}.json").write_text(json.dumps(config))
        print(f"{'steps':>5} {'sampler':22} {'FID':>8} {'KID':>8}  grid")
        for steps in a.steps:
            common = [a.tool, "sampler", a.denoiser, "--io", "uncond:label=10", "--guidance", a.guidance, "-q",
                      "--no-verify", "--overwrite"]
            rows = {}
            for label, stem in (("DDIM, uniform", "ddim"), ("DPM-Solver++ 2M", "dpm")):
                out = folder / f"{stem}{steps}.onnx"
                run([*common, "-o", out, "--scheduler", folder / f"{stem}.json", "--steps", steps])
                rows[label] = (out, "")
            out, plan = folder / f"found{steps}.onnx", folder / f"found{steps}.json"
            decide = ["--reference", a.features, "--real", images, "--draws", a.decide] if a.decide else []
            start = time.perf_counter()
            run([*common, "-o", out, "--scheduler", folder / "ddim.json", "--search", steps, "--evaluations",
                 a.evaluations, "--pairs", a.pairs, "--save-plan", plan, *decide])
            took = time.perf_counter() - start
            grid = " ".join(f"{t:.0f}" for t in json.loads(plan.read_text())["grid"])
            rows["DDIM, searched"] = (out, f"{grid}  ({took / 60:.1f} minutes)")
            for label, (path, note) in rows.items():
                found = features(eye, draw(session(path), a.draws, 7, batch=100))
                print(f"{steps:5} {label:22} {fid(found, real):8.2f} {kid(found, real):8.4f}  {note}", flush=True)


if __name__ == "__main__":
    main()
