"""Units left out of a model: which, what that loses, what patches win back, and what it saves in time.

    python benches/units.py OPTIMIZE smollm2.onnx calib.npz eval.npz --attention 3 --mlp 3 [--bench]
    python benches/units.py OPTIMIZE vit.onnx calib.npz eval.npz --labels labels --metric accuracy --count 1,2,3

Runs `optimize --set prune-units.…` on the calibration set for every way to choose and to patch, and prints one row each,
measured on the evaluation set, which chooses nothing.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

WAYS = [("cosine", "none"), ("loss", "none"), ("loss", "scale"), ("loss", "fold"), ("loss", "auto")]


def run(args, settings):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [args.optimize, args.model, "-o", f"{folder}/out.onnx", "--calib", args.calib]
        command += ["--validate", args.validate, "--report", str(report), "-q"]
        command += ["--metric", args.metric] if args.metric else []
        command += ["--labels", args.labels] if args.labels else []
        command += ["--bench"] if args.bench else []
        for name, value in settings.items():
            command += ["--set", f"prune-units.{name}={value}"]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip().splitlines()[-1], time.time() - start
        return json.loads(report.read_text()), "", time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("validate")
    parser.add_argument("--attention", type=int, default=0)
    parser.add_argument("--mlp", type=int, default=0)
    parser.add_argument("--count", default="0", help="one number or several, separated by commas")
    parser.add_argument("--ways", default=",".join("/".join(way) for way in WAYS), help="score/patch, …")
    parser.add_argument("--metric")
    parser.add_argument("--labels")
    parser.add_argument("--bench", action="store_true", help="time the result beside the original")
    args = parser.parse_args()
    print("| units | score | patch | metric | before | after | latency ratio | FLOPs | seconds | which, and how patched |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for count in args.count.split(","):
        for way in args.ways.split(","):
            score, patch = way.split("/")
            settings = {"count": count, "attention": args.attention, "mlp": args.mlp, "score": score, "patch": patch}
            found, said, seconds = run(args, settings)
            units = int(count) + args.attention + args.mlp
            if found is None:
                print(f"| {units} | {score} | {patch} | {said} | | | | | {seconds:.0f} | |", flush=True)
                continue
            verify, latency = found["verify"], found["latency"]
            ratio = f"{latency['ratio']:.3f}" if latency else ""
            flops = found["output"]["flops"] / found["input"]["flops"]
            chosen = "; ".join(f"{c['site']}: {c['option']}" for c in found["plan"]["choices"])
            print(
                f"| {units} | {score} | {patch} | {verify['metric']} | {verify['before']:.4f} | {verify['after']:.4f} "
                f"| {ratio} | {flops:.3f} | {seconds:.0f} | {chosen} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
