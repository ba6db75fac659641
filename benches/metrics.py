"""What `optimize verify` measures, computed a second time with onnxruntime and NumPy.

    python benches/metrics.py perplexity OPTIMIZE MODEL.onnx SET.npz [--windows N]
    python benches/metrics.py accuracy OPTIMIZE DATASET_FOLDER MODEL.onnx...

`perplexity` wants a causal language model with one input of token ids and a set of that array (the smollm2 zoo model and
its eval.npz). `accuracy` wants classifiers of Fashion-MNIST and the folder with the two t10k files (the Debian package
dataset-fashion-mnist, unpacked by `dpkg -x`); it makes the set of the 10,000 test images in a temporary folder.
Both need onnxruntime and numpy, and end with code 1 if a figure differs: perplexity in its first four digits, accuracy
in any count.
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


def session(path):
    options = ort.SessionOptions()
    # As `verify` does: a rewrite of the runtime would be compared instead of the model.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def verify(optimize, model, set_path, *more):
    start = time.time()
    command = [optimize, "verify", str(model), str(model), "--validate", str(set_path), "--json", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"optimize ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout), time.time() - start


def perplexity(args):
    with np.load(args.set) as arrays:
        (name, ids), = arrays.items()
    ids = ids[: args.windows]
    with tempfile.TemporaryDirectory() as folder:
        part = pathlib.Path(folder) / "part.npz"
        np.savez(part, **{name: ids})
        found, seconds = verify(args.optimize, args.model, part)
    net, total, count, start = session(args.model), 0.0, 0, time.time()
    for window in ids:
        logits = net.run(None, {name: window[None]})[0][0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        total += (log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum()
        count += len(window) - 1
    expected = float(np.exp(total / count))
    print(f"{len(ids)} windows, {count} tokens predicted; chosen metric {found['metric']} because {found['why']}")
    print(f"optimize {found['before']:.8f} ({seconds:.1f} s, both models)  NumPy {expected:.8f} ({time.time() - start:.1f} s, one)")
    return found["metric"] == "perplexity" and f"{found['before']:.3e}" == f"{expected:.3e}"


def accuracy(args):
    def read(kind, offset):
        with gzip.open(args.data / f"t10k-{kind}-ubyte.gz") as f:
            return np.frombuffer(f.read(), np.uint8, offset=offset)

    images = read("images-idx3", 16).reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1.0
    labels = read("labels-idx1", 8).astype(np.int64)
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        test = pathlib.Path(folder) / "test.npz"
        np.savez(test, x=images, label=labels)
        for model in args.models:
            found, seconds = verify(args.optimize, model, test, "--labels", "label")
            net = session(model)
            guesses = [net.run(None, {"x": images[i:i + 100]})[0].argmax(-1) for i in range(0, len(images), 100)]
            hits = int((np.concatenate(guesses) == labels).sum())
            same = round(found["before"] * found["samples"]) == hits and found["samples"] == len(labels)
            fine &= same and found["metric"] == "accuracy"
            print(f"{model.stem}: optimize {found['detail']} ({seconds:.1f} s)  Python {hits} of {len(labels)}")
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    one = what.add_parser("perplexity")
    one.add_argument("optimize")
    one.add_argument("model", type=pathlib.Path)
    one.add_argument("set", type=pathlib.Path)
    one.add_argument("--windows", type=int)
    one.set_defaults(run=perplexity)
    two = what.add_parser("accuracy")
    two.add_argument("optimize")
    two.add_argument("data", type=pathlib.Path)
    two.add_argument("models", type=pathlib.Path, nargs="+")
    two.set_defaults(run=accuracy)
    args = parser.parse_args()
    sys.exit(0 if args.run(args) else 1)


if __name__ == "__main__":
    main()
