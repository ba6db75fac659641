#!/usr/bin/env python3
"""How well errors are predicted: random plans, the error the allocator predicts and the divergence that is measured.

Usage: benches/prediction.py OPTIMIZE MODEL CALIB VALIDATE [--plans 30] [--labels NAME] [--metric kl]

Prints one line per plan and Spearman's rank correlation at the end.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile


def ranks(values):
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [0] * len(values)
    for place, index in enumerate(order):
        places[index] = place
    return places


def spearman(a, b):
    a, b = ranks(a), ranks(b)
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b)) / (n * (n * n - 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["optimize", "model", "calib", "validate"]:
        parser.add_argument(name)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--labels")
    parser.add_argument("--metric", default="kl")
    args = parser.parse_args()
    predicted, measured = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.plans):
            report, out = pathlib.Path(scratch) / "report.json", pathlib.Path(scratch) / "out.onnx"
            command = [args.optimize, args.model, "-o", out, "--overwrite", "-q", "--report", report, "--size", "1"]
            command += ["--calib", args.calib, "--validate", args.validate, "--metric", args.metric]
            command += ["--labels", args.labels] if args.labels else []
            subprocess.run([*map(str, command), "--set", f"allocate.solver=random:{seed}"], check=True)
            found = json.loads(report.read_text())
            predicted.append(found["plan"]["objective"])
            measured.append(found["verify"]["drop"])
            changed = sum(choice["option"] != "as it is" for choice in found["plan"]["choices"])
            print(f"plan {seed}: {changed} layers, predicted {predicted[-1]:.5f}, {args.metric} {measured[-1]:.5f}", flush=True)
    print(f"rank correlation over {args.plans} plans: {spearman(predicted, measured):.3f}")


if __name__ == "__main__":
    main()
