"""Calibration statistics beside NumPy: are they equal, how much memory and time do they take?

    python benches/stats.py --program target/release/optimize smollm2.onnx calib.npz --samples 32
    python benches/stats.py --program target/release/optimize vit.onnx images.npz --samples 64 --check 12

Runs `optimize stats` on every layer with weights with an empty cache and with a full one, runs the model alone in
Python's ONNX Runtime on the same samples, and compares `--check` tensors (0 for all) with NumPy in float64 on the
activations that Python's ONNX Runtime gives.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import onnx
import onnxruntime as ort


def session(path, threads, lean=False):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lean:
        # As the program runs it: packed weights are multiplied in another order, which moves activations by rounding.
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def tree(pid):
    """The process and all below it."""
    found = [pid]
    for at in found:
        try:
            for task in os.listdir(f"/proc/{at}/task"):
                found += [int(c) for c in pathlib.Path(f"/proc/{at}/task/{task}/children").read_text().split()]
        except OSError:
            pass
    return found


def resident(pid):
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def timed(command, env):
    """Seconds, and the most bytes that all processes of the command held together."""
    start = time.time()
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    peak = [0]

    def watch():
        while process.poll() is None:
            peak[0] = max(peak[0], sum(resident(p) for p in tree(process.pid)))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stderr.read()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {said}")
    return time.time() - start, peak[0], said.strip()


def gflops(threads):
    """Speed of the products alone: float32 XᵀX of 1024 rows of 1024 in the runtime."""
    matrix = onnx.helper.make_tensor_value_info("x", 1, [None, 1024])
    out = onnx.helper.make_tensor_value_info("y", 1, [1024, 1024])
    nodes = [
        onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["t", "x"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [matrix], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "product.onnx"
        onnx.save(model, path)
        run = session(path, threads)
    x = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    times = []
    for _ in range(20):
        start = time.time()
        run.run(None, {"x": x})
        times.append(time.time() - start)
    return 2 * 1024**3 / np.median(times) / 1e9


def activations(model_path, names, feeds, batch, threads, folder):
    model = onnx.load(model_path, load_external_data=False)
    for init in model.graph.initializer:
        for entry in init.external_data:
            if entry.key == "location":
                link = folder / entry.value
                if not link.exists():
                    try:
                        os.link(pathlib.Path(model_path).parent / entry.value, link)
                    except OSError:
                        shutil.copy(pathlib.Path(model_path).parent / entry.value, link)
    inputs = {i.name for i in model.graph.input}
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in inputs)
    path = folder / "activations.onnx"
    onnx.save(model, path)
    run = session(path, threads, lean=True)
    outputs = [o.name for o in run.get_outputs()]
    count = len(next(iter(feeds.values())))
    for at in range(0, count, batch):
        part = {k: v[at : at + batch] for k, v in feeds.items()}
        found = dict(zip(outputs, run.run(outputs, part)))
        found.update({n: part[n] for n in names if n in inputs})
        yield found


def patches(x, kernel, strides, pads):
    """im2col of a two-dimensional convolution, columns in the order of its weight."""
    n = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0)] + [(pads[i], pads[i + n]) for i in range(n)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]  # n, c, oh, ow, kh, kw
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * kernel[0] * kernel[1])


def rows_of(label, found, model):
    """The rows that a label such as `x`, `x axis 1` or `x patches 3x3` stands for."""
    name, _, view = label.partition(" ")
    x = found[name].astype(np.float64)
    if view.startswith("axis"):
        x = np.moveaxis(x, int(view.split()[1]), -1)
    if view.startswith("patches"):
        for node in model.graph.node:
            attributes = {a.name: list(a.ints) for a in node.attribute}
            kernel = attributes.get("kernel_shape", [])
            if node.op_type == "Conv" and node.input[0] == name and "x".join(map(str, kernel)) == view.split()[1]:
                return patches(x, kernel, attributes.get("strides", [1, 1]), attributes.get("pads", [0] * 4))
    return x.reshape(-1, x.shape[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("set")
    parser.add_argument("--program", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--memory")
    args = parser.parse_args()
    feeds = {k: v[: args.samples] for k, v in np.load(args.set).items()}
    wanted = {i.name for i in onnx.load(args.model, load_external_data=False).graph.input}
    feeds = {k: v for k, v in feeds.items() if k in wanted}
    beside = pathlib.Path(args.model).resolve().parent
    with tempfile.TemporaryDirectory(dir=beside if os.access(beside, os.W_OK) else None) as folder:
        folder = pathlib.Path(folder)
        samples = folder / "samples.npz"
        np.savez(samples, **feeds)
        library = next(pathlib.Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
        env = {"ORT_DYLIB_PATH": str(library), **os.environ, "XDG_DATA_HOME": str(folder / "data")}
        out = folder / "stats.npz"
        command = [args.program, "stats", args.model, "--calib", str(samples), "-o", str(out)]
        command += ["--kind", "gram,columns", "--batch", str(args.batch), "--threads", str(args.threads)]
        command += ["--memory", args.memory] if args.memory else []
        only_grams = [c if c != "gram,columns" else "gram" for c in command]
        seconds, peak, said = timed(only_grams, env)
        again, _, said_again = timed(only_grams, env)
        timed(command, env)
        stats = np.load(out)
        labels = sorted(k.split(":", 1)[1].rsplit("/", 1)[0] for k in stats if k.startswith("gram:") and k.endswith("/gram"))
        work = sum(2 * stats[f"gram:{l}/counts"][0] * len(stats[f"gram:{l}/gram"]) ** 2 for l in labels)

        run = session(args.model, args.threads)
        outputs = [o.name for o in run.get_outputs()]
        start = time.time()
        for at in range(0, args.samples, args.batch):
            run.run(outputs, {k: v[at : at + args.batch] for k, v in feeds.items()})
        forward = time.time() - start
        del run
        speed = gflops(args.threads)

        check = labels if not args.check else labels[:: max(1, len(labels) // args.check)]
        model = onnx.load(args.model, load_external_data=False)
        sums = {l: None for l in check}
        for found in activations(args.model, sorted({l.split(" ")[0] for l in check}), feeds, args.batch, args.threads, folder):
            for label in check:
                x = rows_of(label, found, model)
                new = [x.T @ x, x.sum(0), np.abs(x).sum(0), (x * x).sum(0), np.abs(x).max(0), len(x)]
                old = sums[label]
                if old:
                    new = [np.maximum(a, b) if i == 4 else a + b for i, (a, b) in enumerate(zip(old, new))]
                sums[label] = new
        worst = {k: 0.0 for k in ["gram_frobenius", "gram_entry", "sum", "abs_sum", "square_sum", "max_abs"]}
        for label, (gram, total, size, square, largest, count) in sums.items():
            ours = stats[f"gram:{label}/gram"]
            assert stats[f"gram:{label}/counts"][0] == count, label
            scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram))) + 1e-300
            errors = {
                "gram_frobenius": np.linalg.norm(ours - gram) / np.linalg.norm(gram),
                "gram_entry": np.max(np.abs(ours - gram) / scale),
                "sum": np.max(np.abs(stats[f"columns:{label}/sum"] - total) / (size + 1e-300)),
                "abs_sum": np.max(np.abs(stats[f"columns:{label}/abs_sum"] - size) / (size + 1e-300)),
                "square_sum": np.max(np.abs(stats[f"columns:{label}/square_sum"] - square) / (square + 1e-300)),
                "max_abs": np.max(np.abs(stats[f"columns:{label}/max_abs"] - largest) / (largest + 1e-300)),
            }
            worst = {k: float(np.maximum(v, errors[k])) for k, v in worst.items()}
        product = work / speed / 1e9
        result = {
            "model": args.model, "samples": args.samples, "batch": args.batch, "tensors": len(labels),
            "compared": len(check), "worst_relative_error": {k: float(f"{v:.2e}") for k, v in worst.items()},
            "peak_mib": round(peak / 2**20), "seconds": round(seconds, 2), "second_run_seconds": round(again, 2),
            "forward_seconds": round(forward, 2), "product_tflop": round(work / 1e12, 3),
            "product_gflops": round(speed), "product_seconds": round(product, 2),
            "ratio": round(seconds / (forward + product), 2), "said": [said, said_again],
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
