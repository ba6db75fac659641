#!/usr/bin/env python3
"""Whether `optimize bench` agrees with a plain onnxruntime loop, and whether it ever finds a model faster than itself.

    python benches/bench_agrees.py OPTIMIZE MODEL... [--threads N] [--tries 20] [--seconds S]

Needs onnxruntime and numpy, and ORT_DYLIB_PATH at the library of that onnxruntime, so that both run the same code. The
loop and the program take turns on each model, because the load of a machine changes. They agree if their medians differ
by no more than the larger of the two spreads, the distance of the quartiles of all runs. Then the program times the first model against itself, `--tries` times.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


def shapes(inputs):
    """Every open dimension is 1 but in images, where two open sides are 64."""
    for i in inputs:
        dims = list(i.shape)
        image = len(dims) == 4 and not any(isinstance(d, int) for d in dims[2:])
        yield i, [d if isinstance(d, int) else (64 if image and k >= 2 else 1) for k, d in enumerate(dims)]


def loop(path, threads, seconds):
    """All run times in milliseconds, of a session made anew, after a warm-up."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {}
    for i, dims in shapes(session.get_inputs()):
        kind = TYPES[i.type]
        feeds[i.name] = random.standard_normal(dims).astype(kind) if kind == np.float32 else np.ones(dims, kind)
    # Bound, as the program binds: converting arrays costs a small model several percent.
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < 0.2 * seconds:
        session.run_with_iobinding(binding)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 5:
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append((time.perf_counter() - begin) * 1000)
    return times


def bench(program, models, arguments):
    command = [program, "bench", *models, "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2)
    args = parser.parse_args()
    failures = 0
    print("model\tprogram, ms\tloop, ms\tdifference, %\tlarger spread, %\tagrees")
    for path in args.models:
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        arguments = ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        for i, dims in shapes(session.get_inputs()):
            arguments += ["--input-shape", f"{i.name}:{','.join(map(str, dims))}"]
        loops, found = [], []
        for _ in range(3):
            loops += loop(path, args.threads, args.seconds)
            found.append(bench(args.program, [path], arguments))
        loops += loop(path, args.threads, args.seconds)
        ours, theirs = np.median([f["before_ms"] for f in found]), np.median(loops)
        q1, q3 = np.percentile(loops, [25, 75])
        spread = max(q3 - q1, np.median([f["before"]["q3_ms"] - f["before"]["q1_ms"] for f in found]))
        agrees = abs(ours - theirs) <= spread
        failures += not agrees
        name = path.rsplit("/", 1)[-1]
        print(f"{name}\t{ours:.3f}\t{theirs:.3f}\t{100 * (ours / theirs - 1):+.1f}\t{100 * spread / theirs:.1f}\t{agrees}")
    gains, ratios = 0, []
    for _ in range(args.tries):
        arguments = ["--threads", str(args.threads), "--seconds", str(args.seconds)]
        found = bench(args.program, [args.models[0]] * 2, arguments)
        ratios.append(found["ratio"])
        gains += found["verdict"] != "no difference"
    if ratios:
        print(f"against itself: {gains} differences called in {args.tries} tries, ratios {min(ratios):.3f} to {max(ratios):.3f}")
    sys.exit(1 if failures or gains else 0)


if __name__ == "__main__":
    main()
