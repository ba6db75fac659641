"""What methods are worth: accuracy on held-out images, or perplexity, and measured latency at batch 1 on one thread.

    python benches/structure.py OPTIMIZE ZOO [FOLDER] [--methods reduce-tokens] [--shares 0.9,0.8,0.7] [--models vit]
                                [--budget latency|flops] [--target portable|ort] [--max-drop 0.01] [--smollm2 FOLDER]

METHODS are methods that share the budget, separated by commas, or `all`; several such groups separated by spaces are tried
one after the other.

ZOO holds vit.onnx, resnet.onnx and mobilenet.onnx; FOLDER is that of the Debian package dataset-fashion-mnist. 512 test
images calibrate, 4,096 others evaluate; neither were trained on. The model `smollm2` is that of its own FOLDER, with calib.npz and
eval.npz, by perplexity, timed at 128 tokens. Prints one row per model, group and share: what was chosen, the metric before and
after, the mean divergence of the outputs, in nats, and the shares of FLOPs and latency that are left, or why there is no
result.
"""

import argparse
import collections
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import fashion
import numpy


def others(optimize, methods):
    """Every lossy method but these: exact passes run in any case."""
    table = subprocess.run([optimize, "passes", "--markdown"], capture_output=True, text=True, check=True).stdout
    rows = [line.split("|") for line in table.splitlines()]
    lossy = [row[1].strip(" `") for row in rows if len(row) > 2 and row[2].strip() == "lossy"]
    return ",".join(name for name in lossy if methods != "all" and name not in methods.split(","))


def classifier(args, model, pixels, labels, scratch):
    """A model of the zoo, the options that say what it is run on, and the shape that is timed."""
    path = args.zoo / f"{model}.onnx"
    done = subprocess.run([args.optimize, "inspect", str(path), "--json"], capture_output=True, text=True, check=True)
    name = json.loads(done.stdout)["inputs"][0]["name"]
    calib, evaluate = scratch / f"{name}-calib.npz", scratch / f"{name}-eval.npz"
    numpy.savez(calib, **{name: pixels[:512], "label": labels[:512]})
    numpy.savez(evaluate, **{name: pixels[512:4608], "label": labels[512:4608]})
    return path, ["--calib", calib, "--validate", evaluate, "--labels", "label", "--metric", "accuracy"], f"{name}:1,1,28,28"


def smollm2(args):
    sets = ["--calib", args.smollm2 / "calib.npz", "--validate", args.smollm2 / "eval.npz"]
    return args.smollm2 / "smollm2.onnx", [*sets, "--metric", "perplexity"], "input_ids:1,128"


def run(args, path, options, shape, methods, share, scratch):
    report = scratch / "report.json"
    report.unlink(missing_ok=True)
    command = [args.optimize, path, "-o", scratch / "out.onnx", "--overwrite", "-q", *options, f"--{args.budget}", share]
    skipped = others(args.optimize, methods)
    command += ["--skip", skipped] if skipped else []
    command += ["--input-shape", shape] if args.budget == "latency" else []
    command += ["--max-drop", args.max_drop] if args.max_drop else []
    command += ["--threads", "1", "--target", args.target, "--report", report]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[0]
    return json.loads(report.read_text()), ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("zoo", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--methods", default="reduce-tokens")
    parser.add_argument("--shares", default="0.9,0.8,0.7,0.6")
    parser.add_argument("--models", default="vit")
    parser.add_argument("--budget", default="latency")
    parser.add_argument("--target", default="portable")
    parser.add_argument("--max-drop")
    parser.add_argument("--smollm2", type=pathlib.Path)
    args = parser.parse_args()
    pixels, labels = fashion.load(args.folder)
    print("| model | methods | share | chosen | before | after | divergence | FLOPs left | latency, ms | left | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for model in args.models.split(","):
            language = model == "smollm2"
            path, options, shape = smollm2(args) if language else classifier(args, model, pixels, labels, scratch)
            for methods, share in itertools.product(args.methods.split(), args.shares.split(",")):
                found, said = run(args, path, options, shape, methods, share, scratch)
                if found is None:
                    print(f"| {model} | {methods} | {share} | {said} | | | | | | | |", flush=True)
                    continue
                names = (choice["option"] for choice in found["plan"]["choices"] if choice["method"])
                chosen = (f"{count} × {name}" if count > 1 else name for name, count in collections.Counter(names).items())
                verify, latency = found["verify"], found["latency"]
                divergence = max(output["kl"] for output in verify["outputs"] if output["kl"] is not None)
                flops = found["output"]["flops"] / found["input"]["flops"]
                times = f"{latency['before_ms']:.2f} to {latency['after_ms']:.2f} | {latency['ratio']:.3f}" if latency else "| "
                print(f"| {model} | {methods} | {share} | {'; '.join(chosen)} | {verify['before']:.4f} | {verify['after']:.4f} "
                      f"| {divergence:.2e} | {flops:.3f} | {times} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
