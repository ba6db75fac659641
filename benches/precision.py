"""Size, latency and loss of models in fewer bits: ours beside ONNX Runtime's own quantizers, and NNCF's where it is there.

    python benches/precision.py OPTIMIZE MODEL CALIB EVAL FOLDER [--labels NAME] [--ours OPTIONS]... [--batch N]...
                                [--threads N]... [--calibration N] [--evaluation N] [--skip NAME]...

MODEL is made smaller by every quantizer with the first samples of CALIB, and judged on EVAL, which chooses nothing. Every
`--ours` is one run of OPTIMIZE with these options. FOLDER keeps the results: what is there already is not made again.
Losses are of the runtime with its optimizations on: the mean divergence in nats and the share of equal labels for logits,
else the mean cosine and the relative error of the outputs. Latency is the median ratio to the original of interleaved
runs, for every batch and number of threads. At the end stands a table in Markdown, whose last column names a row that
takes no more bytes and no more time (within 3 percent) and loses no more, if there is one. Needs numpy, onnx, onnxruntime,
onnx_ir and, for its rows, nncf.
"""

import argparse
import pathlib
import shlex
import subprocess
import time

import numpy
import onnx
import onnxruntime


def arrays(path, labels):
    found = dict(numpy.load(path))
    return {name: array for name, array in found.items() if name != labels}, found.get(labels)


def session(path, threads, optimized=True):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path, feeds, batch=16):
    run = session(path, 2)
    names = {value.name for value in run.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in names}
    count = len(next(iter(feeds.values())))
    parts = [run.run(None, {name: array[at : at + batch] for name, array in feeds.items()})[0] for at in range(0, count, batch)]
    return numpy.concatenate(parts)


def divergence(before, after):
    def logs(x):
        x = x.astype(numpy.float64)
        x = x - x.max(-1, keepdims=True)
        return x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))

    p, q = logs(before), logs(after)
    return float((numpy.exp(p) * (p - q)).sum(-1).mean())


def loss(before, after, labels, is_logits):
    """What the outputs lose, as a number and in words."""
    if is_logits:
        lost = divergence(before, after)
        told = f"KL {lost:.6f}"
        if labels is not None:
            accuracy = [float((x.argmax(-1) == labels).mean()) for x in (before, after)]
            told += f", accuracy {accuracy[0]:.4f} -> {accuracy[1]:.4f}"
        return lost, told
    a, b = (x.reshape(-1, x.shape[-1]).astype(numpy.float64) for x in (before, after))
    cosine = (a * b).sum(-1) / (numpy.linalg.norm(a, axis=-1) * numpy.linalg.norm(b, axis=-1))
    relative = float(numpy.linalg.norm(a - b) / numpy.linalg.norm(a))
    return relative, f"cosine {cosine.mean():.6f}, relative error {relative:.5f}"


def ratio(original, path, feeds, batch, threads, seconds=4.0):
    runs = [session(p, threads) for p in (original, path)]
    names = [{value.name for value in run.get_inputs()} for run in runs]
    one = {name: array[:batch] for name, array in feeds.items()}
    fed = [{name: array for name, array in one.items() if name in wanted} for wanted in names]
    for run, feed in zip(runs, fed):
        for _ in range(3):
            run.run(None, feed)
    ratios, start = [], time.time()
    while len(ratios) < 15 or (time.time() - start < seconds and len(ratios) < 300):
        took = []
        for run, feed in zip(runs, fed):
            begun = time.perf_counter()
            run.run(None, feed)
            took.append(time.perf_counter() - begun)
        ratios.append(took[1] / took[0])
    return [float(part) for part in numpy.quantile(ratios, [0.5, 0.25, 0.75])]


def size(path):
    path = pathlib.Path(path)
    beside = [path.parent / f"{path.name}{end}" for end in (".data", "_data")]
    return sum(p.stat().st_size for p in [path, *beside] if p.exists())


EQUAL = 0.03


def beaten(row, rows):
    """The name of a row that is nowhere worse than this one and somewhere better; times within a few percent are equal."""
    for other in rows:
        faster = [a <= b * (1 + EQUAL) for a, b in zip(other["times"], row["times"])]
        no_worse = other["size"] <= row["size"] and all(faster) and other["lost"] <= row["lost"]
        better = other["size"] < row["size"] * (1 - EQUAL) or other["lost"] < row["lost"] * (1 - EQUAL)
        better = better or any(a < b * (1 - EQUAL) for a, b in zip(other["times"], row["times"]))
        if other is not row and no_worse and better:
            return other["name"]
    return ""


def table(rows, kinds):
    """Markdown: one line for every model."""
    print(f"\n| model | size | {' | '.join(f'time, {kind}' for kind in kinds)} | loss | no better in anything than |")
    print("|---|---|" + "---|" * len(kinds) + "---|---|")
    for row in rows:
        times = " | ".join(f"{time:.2f}" for time in row["times"])
        print(f"| {row['name']} | {row['size']:.3f} | {times} | {row['told']} | {beaten(row, rows)} |")


def reader(feeds, count):
    from onnxruntime.quantization import CalibrationDataReader

    class Samples(CalibrationDataReader):
        def __init__(self):
            self.at = 0

        def get_next(self):
            if self.at >= count:
                return None
            self.at += 1
            return {name: array[self.at - 1 : self.at] for name, array in feeds.items()}

    return Samples()


def static(model, feeds, count, out):
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    ready = out.with_suffix(".pre.onnx")
    quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
    quantize_static(str(ready), str(out), reader(feeds, count), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    ready.unlink()


def dynamic(model, feeds, count, out):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(model), str(out), weight_type=QuantType.QInt8, per_channel=True)


def blocks(algorithm):
    def make(model, feeds, count, out):
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = nbits.HQQWeightOnlyQuantConfig(block_size=32, bits=4) if algorithm == "hqq" else None
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(str(model)), block_size=32, is_symmetric=True, algo_config=config)
        quantizer.process()
        onnx.save(getattr(quantizer.model, "model", quantizer.model), str(out))

    return make


def nncf(model, feeds, count, out):
    import nncf

    samples = [{name: array[at : at + 1] for name, array in feeds.items()} for at in range(count)]
    found = nncf.quantize(onnx.load(str(model)), nncf.Dataset(samples), subset_size=count)
    onnx.save(found, str(out))


PLAIN = {
    "quantize_static, MinMax": static,
    "quantize_dynamic, int8": dynamic,
    "MatMulNBits int4 block 32, default": blocks("default"),
    "MatMulNBits int4 block 32, HQQ": blocks("hqq"),
    "NNCF": nncf,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["optimize", "model", "calib", "eval", "folder"]:
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("--labels")
    parser.add_argument("--ours", action="append", default=[])
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--threads", action="append", type=int)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--evaluation", type=int, default=2048)
    parser.add_argument("--skip", action="append", default=[])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    feeds, _ = arrays(args.calib, args.labels)
    judged, labels = arrays(args.eval, args.labels)
    judged = {name: array[: args.evaluation] for name, array in judged.items()}
    labels = None if labels is None else labels[: args.evaluation]
    feeds = {name: array for name, array in feeds.items() if name in judged}
    before = outputs(args.model, judged)
    is_logits = labels is not None or "logits" in session(args.model, 1).get_outputs()[0].name.lower()
    count = min(args.calibration, len(next(iter(feeds.values()))))
    rows = [("original", args.model, None)]
    for at, options in enumerate(args.ours):
        rows.append((f"optimize {options}", args.folder / f"ours{at}.onnx", options))
    rows += [(name, args.folder / f"plain{at}.onnx", make) for at, (name, make) in enumerate(PLAIN.items()) if name not in args.skip]
    found = []
    settings = [(batch, threads) for batch in args.batch or [1] for threads in args.threads or [1]]
    kinds = [f"batch {batch}, threads {threads}" for batch, threads in settings]
    for name, path, make in rows:
        start = time.time()
        if isinstance(make, str) and not path.exists():
            command = [args.optimize, args.model, "-o", path, "--calib", args.calib, "-q", "--overwrite", *shlex.split(make)]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: exit {done.returncode}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
        elif callable(make) and not path.exists():
            try:
                make(args.model, feeds, count, path)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
                continue
        took = time.time() - start
        after = outputs(path, judged)
        times = [ratio(args.model, path, judged, *setting) for setting in settings]
        share = size(path) / size(args.model)
        lost, told = loss(before, after, labels, is_logits)
        timed = [f"{kind}: {middle:.2f} ({low:.2f}-{high:.2f})" for kind, (middle, low, high) in zip(kinds, times)]
        print(f"{name}: size {share:.4f}; {told}; {'; '.join(timed)}; {took:.0f} s", flush=True)
        found.append({"name": name, "size": share, "times": [time[0] for time in times], "lost": lost, "told": told})
    table(found, kinds)


main()
