"""A size budget on a language model: what is chosen, what it takes, what it loses.

    python benches/weights.py OPTIMIZE smollm2.onnx calib.npz eval.npz [--sizes 0.30,0.20]

Runs `optimize --size` once per share and prints one row each: the size of the file, what the plan reckoned, perplexity
on the evaluation set (which chooses nothing), wall time and the peak memory of the largest process.
"""

import argparse
import collections
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("validate")
    parser.add_argument("--sizes", default="0.30,0.20")
    args = parser.parse_args()
    print("| size | file, MiB | of the original | perplexity before | after | ratio | options | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for share in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder) / "report.json"
            start = time.time()
            command = [args.optimize, args.model, "-o", f"{folder}/out.onnx", "--calib", args.calib, "--validate"]
            command += [args.validate, "--size", share, "--metric", "perplexity", "--report", str(report), "-q"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
            seconds = time.time() - start
            found = json.loads(report.read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size, original = found["output"]["file_bytes"], found["input"]["file_bytes"]
        before, after = found["verify"]["before"], found["verify"]["after"]
        options = collections.Counter(choice["option"] for choice in found["plan"]["choices"])
        options = ", ".join(f"{count} {name}" for name, count in sorted(options.items()))
        print(
            f"| {share} | {size / 2**20:.1f} | {size / original:.4f} | {before:.3f} | {after:.3f} | {after / before:.4f} "
            f"| {options} | {seconds:.0f} | {peak:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
