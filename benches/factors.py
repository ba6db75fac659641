#!/usr/bin/env python3
"""What whitening, the knapsack and the dictionary are worth: perplexity where a share of the linear weights is removed.

Usage: benches/factors.py OPTIMIZE FOLDER [PERCENT ...], where FOLDER holds smollm2.onnx, calib.npz and eval.npz of smollm2.
Numbers are counted, as the papers do, not bytes: positions of coefficients are not. Takes about five minutes a row.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

# Linear weights of the layers, and all parameters, of SmolLM2-135M.
LINEAR, ALL = 106_168_320, 134_515_008

ROWS = {
    "plain SVD, uniform": ["--passes", "factorize", "--set", "factorize.metric=weight", "--set", "allocate.solver=uniform"],
    "whitened SVD, uniform": ["--passes", "factorize", "--set", "allocate.solver=uniform"],
    "whitened SVD, knapsack": ["--passes", "factorize"],
    "dictionary (ROCKET), knapsack": ["--passes", "factorize,dictionary"],
}


def run(optimize, folder, removed, options):
    with tempfile.TemporaryDirectory() as scratch:
        report = pathlib.Path(scratch) / "report.json"
        keep = 1 - removed * LINEAR / ALL
        command = [optimize, folder / "smollm2.onnx", "-o", pathlib.Path(scratch) / "out.onnx", "-q", "--report", report]
        command += ["--calib", folder / "calib.npz", "--validate", folder / "eval.npz", "--metric", "perplexity"]
        done = subprocess.run([*map(str, command), "--params", f"{keep:.4f}", *options], capture_output=True, text=True)
        if done.returncode != 0:
            return done.stderr.strip()
        return json.loads(report.read_text())


def main():
    optimize, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    for percent in [int(p) for p in sys.argv[3:]] or [20, 30]:
        for name, options in ROWS.items():
            found = run(optimize, folder, percent / 100, options)
            if isinstance(found, str):
                print(f"{percent} %  {name}: {found}", flush=True)
                continue
            verify, plan = found["verify"], found["plan"]
            print(f"{percent} %  {name}: perplexity {verify['before']:.3f} -> {verify['after']:.3f}, "
                  f"{plan['used']['parameters']} numbers, predicted {plan['objective']:.4f}, {found['seconds']:.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
