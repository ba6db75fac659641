"""What weight methods and the allocator are worth, on a language model and on classifiers.

    python benches/weights.py OPTIMIZE PART ... [--smollm2 FOLDER] [--zoo FOLDER] [--fashion DATA]

PART is one or more of

    order       perplexity where 20 and 30 % of the linear weights are removed: plain SVD, whitened, knapsack, dictionary
    size        perplexity at --size 0.30 and 0.20, with and without `compensate`; bytes of plan, constants and file
    latency     --latency 0.7 at one sample on one thread, and what `optimize bench` says of the result afterwards
    prediction  the rank correlation of predicted and measured loss over 30 random plans of weights

FOLDER of smollm2 holds smollm2.onnx, calib.npz and eval.npz, that of the zoo vit.onnx, resnet.onnx and mobilenet.onnx;
DATA is for fashion.py. What chooses is never what evaluates: calib.npz and the first 512 test images choose.
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

import fashion
import numpy

# Linear weights of the layers, and all parameters, of SmolLM2-135M.
LINEAR, ALL = 106_168_320, 134_515_008

# Methods that change more than weights.
STRUCTURE = "prune-units,substitute,reduce-tokens,select-visual-tokens"

LOW_RANK = "factorize,factorize-jointly"
ORDER = {
    "plain SVD, uniform": ["--passes", "factorize", "--set", "factorize.metric=weight", "--set", "allocate.solver=uniform"],
    "whitened SVD, uniform": ["--passes", "factorize", "--set", "allocate.solver=uniform"],
    "whitened SVD, knapsack": ["--passes", "factorize"],
    "whitened SVD, shared factors too, knapsack": ["--passes", LOW_RANK],
    "dictionary (ROCKET), knapsack": ["--passes", f"{LOW_RANK},dictionary"],
}


class Model:
    """A model with its sets, and the options that fit it."""

    def __init__(self, path, sets, metric, drop, single, labels=None):
        self.path, self.sets, self.metric, self.drop, self.single, self.labels = path, sets, metric, drop, single, labels

    def optimize(self, args, options, out, metric=None, validate=None):
        """The report of a run, or what the program says where it refuses; seconds, and what the result is."""
        report = pathlib.Path(str(out) + ".json")
        command = [args.optimize, self.path, "-o", out, "--overwrite", "-q", "--report", report, "--metric", metric or self.metric]
        command += ["--calib", self.sets / "calib.npz", "--validate", validate or self.sets / "eval.npz"]
        command += ["--labels", self.labels] if self.labels else []
        start = time.time()
        done = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
        if done.returncode:
            return f"exit {done.returncode}: {done.stderr.strip()}", time.time() - start
        return json.loads(report.read_text()), time.time() - start


def counted(plan):
    options = collections.Counter(choice["option"] for choice in plan["choices"])
    return ", ".join(f"{count} {name}" for name, count in sorted(options.items()))


def order(args, models, out):
    for percent in [20, 30]:
        keep = 1 - percent / 100 * LINEAR / ALL
        for name, options in ORDER.items():
            found, seconds = models["smollm2"].optimize(args, ["--params", f"{keep:.4f}", *options], out)
            if isinstance(found, str):
                print(f"{percent} %  {name}: {found}", flush=True)
                continue
            verify, plan = found["verify"], found["plan"]
            print(f"{percent} %  {name}: perplexity {verify['before']:.3f} -> {verify['after']:.3f}, "
                  f"{plan['sites']['parameters']} numbers, predicted {plan['objective']:.4f}, {seconds:.0f} s", flush=True)


def size(args, models, out):
    print("| size | file, MiB | of the original | perplexity before | after | ratio | options | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for share, more in [("0.30", []), ("0.20", []), ("0.20", ["--skip", "compensate"])]:
        found, seconds = models["smollm2"].optimize(args, ["--size", share, *more], out)
        if isinstance(found, str):
            print(f"{share} {more}: {found}", flush=True)
            continue
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        file, original = found["output"]["file_bytes"], found["input"]["file_bytes"]
        before, after = found["verify"]["before"], found["verify"]["after"]
        print(f"| {' '.join([share, *more])} | {file / 2**20:.1f} | {file / original:.4f} | {before:.3f} | {after:.3f} "
              f"| {after / before:.4f} | {counted(found['plan'])} | {seconds:.0f} | {peak:.0f} |")
        used, stored = found["plan"]["sites"]["bytes"], found["output"]["weight_bytes"]
        print(f"bytes: plan {used}, constants {stored}, file {file} ({file / used - 1:+.2%})", flush=True)


def latency(args, models, out):
    for name, model in models.items():
        shape = ["--input-shape", model.single, "--threads", "1"]
        found, seconds = model.optimize(args, ["--latency", "0.7", "--max-drop", model.drop, *shape], out)
        if isinstance(found, str):
            print(f"{name}: {found} ({seconds:.0f} s)", flush=True)
            continue
        verify, said = found["verify"], found["latency"]
        again = subprocess.run([args.optimize, "bench", model.path, out, *shape, "--json"], capture_output=True, text=True)
        bench = json.loads(again.stdout)
        print(f"{name}: {said['ratio']:.3f} in the run, {bench['ratio']:.3f} by bench afterwards ({bench['before_ms']:.3f} -> "
              f"{bench['after_ms']:.3f} ms, spread {bench['spread']:.1%}), {model.metric} {verify['before']:.4f} -> "
              f"{verify['after']:.4f}; {counted(found['plan'])}; {seconds:.0f} s", flush=True)


def ranks(values):
    places = [0] * len(values)
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        places[index] = place
    return places


def spearman(a, b):
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(ranks(a), ranks(b))) / (n * (n * n - 1))


def prediction(args, models, out):
    for name, model in models.items():
        predicted, measured = [], []
        few = out.with_name("few.npz")
        with numpy.load(model.sets / "eval.npz") as every:
            numpy.savez(few, **{key: values[:args.samples] for key, values in every.items()})
        for seed in range(args.plans):
            options = ["--size", "1", "--set", f"allocate.solver=random:{seed}", "--skip", STRUCTURE]
            found, _ = model.optimize(args, options, out, "kl", few)
            if isinstance(found, str):
                sys.exit(f"{name}, plan {seed}: {found}")
            predicted.append(found["plan"]["objective"])
            measured.append(found["verify"]["drop"])
            changed = sum(choice["option"] != "as it is" for choice in found["plan"]["choices"])
            print(f"{name}, plan {seed}: {changed} changed, predicted {predicted[-1]:.5f}, kl {measured[-1]:.5f}", flush=True)
        print(f"{name}: rank correlation over {args.plans} plans {spearman(predicted, measured):.3f}", flush=True)


PARTS = {"order": order, "size": size, "latency": latency, "prediction": prediction}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--smollm2", type=pathlib.Path)
    parser.add_argument("--zoo", type=pathlib.Path)
    parser.add_argument("--fashion", type=pathlib.Path)
    parser.add_argument("--models", help="only these, by name")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--samples", type=int, default=512, help="of the evaluation set, for every plan of `prediction`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        if args.smollm2:
            models["smollm2"] = Model(args.smollm2 / "smollm2.onnx", args.smollm2, "perplexity", "0.05", "input_ids:1,128")
        if args.zoo:
            fashion.write(args.fashion, scratch)
            for name in ["vit", "resnet", "mobilenet"]:
                path = args.zoo / f"{name}.onnx"
                models[name] = Model(path, pathlib.Path(scratch), "accuracy", "0.005", "x:1,1,28,28", "label")
        if args.models:
            models = {name: models[name] for name in args.models.split(",")}
        for part in args.parts:
            PARTS[part](args, models, pathlib.Path(scratch) / "out.onnx")


if __name__ == "__main__":
    main()
