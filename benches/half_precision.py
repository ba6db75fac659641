"""How many exported models keep working in float16: ours, onnxconverter-common's and ONNX Runtime's converter.

    python benches/half_precision.py FOLDER [NAME…] [--optimize PATH] [--most-mb 60] [--tolerance 2e-3] [--ours-only]

FOLDER holds models NAME.onnx with one or more sets of inputs NAME.*.npz. Every model is converted by each of the three with
float32 inputs and outputs kept; the file is loaded, and simulated on those inputs: a float32 model, made here and by other
code than the program's, in which every value that the file has in float16 is rounded to it. A model is broken where the file
does not load, where the simulation is not finite though the original is, or where an output's relative L2 error exceeds the
tolerance. Needs onnx, onnxruntime, numpy and onnxconverter-common.
"""

import argparse
import copy
import glob
import json
import multiprocessing
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def widen(tensor):
    """A float16 tensor as float32."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def set_type(info):
    if info.type.tensor_type.elem_type == HALF:
        info.type.tensor_type.elem_type = FLOAT


def reads(node):
    """The names that a node reads, by itself and in its bodies."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from reads(inner)
            yield from (o.name for o in attribute.g.output)


def in_order(nodes):
    """Nodes behind what they read: converters append casts at the end."""
    made = {o: n for n, node in enumerate(nodes) for o in node.output if o}
    done, order = set(), []

    def visit(n):
        stack = [(n, iter({made[r] for r in reads(nodes[n]) if r in made}))]
        started = {n}
        while stack:
            at, needed = stack[-1]
            for other in needed:
                if other not in done and other not in started:
                    started.add(other)
                    stack.append((other, iter({made[r] for r in reads(nodes[other]) if r in made})))
                    break
            else:
                stack.pop()
                done.add(at)
                order.append(nodes[at])

    for n in range(len(nodes)):
        if n not in done:
            visit(n)
    return order


def simulated_graph(graph):
    """Makes a graph float32 and rounds its values; returns nothing, the graph is changed."""
    infos = list(graph.value_info) + list(graph.output)
    half = {i.name for i in infos if i.type.tensor_type.elem_type == HALF}
    for tensor in graph.initializer:
        if tensor.data_type == HALF:
            tensor.CopyFrom(widen(tensor))
    nodes, renamed = [], {}
    for info in graph.input:
        if info.type.tensor_type.elem_type == HALF:
            set_type(info)
            renamed[info.name] = info.name + "__rounded"
            nodes += rounding(info.name, renamed[info.name])
    outputs = {o.name for o in graph.output}
    for node in in_order(list(graph.node)):
        # Names are rounded one by one, so that a body sees the names of the graph around it.
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename_captured(attribute.g, renamed)
                simulated_graph(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == HALF:
                attribute.t.CopyFrom(widen(attribute.t))
            elif attribute.name == "dtype" and attribute.i == HALF:
                attribute.i = FLOAT
        to_half = node.op_type == "Cast" and any(a.name == "to" and a.i == HALF for a in node.attribute)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if not name or (name not in half and not to_half):
                continue
            # What leaves a graph keeps its name.
            raw, rounded = (name + "__raw", name) if name in outputs else (name, name + "__rounded")
            node.output[i] = raw
            if to_half:
                nodes.append(helper.make_node("Cast", [raw], [rounded], to=FLOAT))
            else:
                nodes += rounding(raw, rounded)
            renamed[name] = rounded
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for info in graph.output:
        set_type(info)


def rounding(name, rounded):
    return [
        helper.make_node("Cast", [name], [name + "__half"], to=HALF),
        helper.make_node("Cast", [name + "__half"], [rounded], to=FLOAT),
    ]


def rename_captured(graph, renamed):
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name not in own:
                node.input[i] = renamed.get(name, name)


def simulation(model):
    """A float32 model that rounds where a float16 model does."""
    model = onnx.shape_inference.infer_shapes(copy.deepcopy(model), check_type=True, strict_mode=True)
    simulated_graph(model.graph)
    return model


def session(model, optimized=False):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def distance(expected, found):
    """The largest relative L2 error of an output; infinite where one is no number."""
    worst = 0.0
    for a, b in zip(expected, found):
        if not isinstance(a, np.ndarray) or a.shape != np.shape(b):
            return float("inf")
        if a.dtype.kind != "f":
            worst = max(worst, 0.0 if (a == b).all() else float("inf"))
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        if not (np.isfinite(b) == finite).all() or not (a[~finite] == b[~finite]).all() and not np.isnan(a[~finite]).all():
            return float("inf")
        size = np.linalg.norm(a[finite])
        error = np.linalg.norm(a[finite] - b[finite])
        worst = max(worst, error / size if size > 0 else (0.0 if error == 0 else float("inf")))
    return worst


def read_sets(path, model):
    """Sets of inputs beside a model that have all that it needs."""
    wanted = {i.name for i in model.get_inputs()}
    found = []
    for file in sorted(glob.glob(path[: -len(".onnx")] + ".*.npz")):
        feeds = {name: array for name, array in np.load(file).items() if name in wanted}
        if len(feeds) == len(wanted):
            found.append(feeds)
    return found


def originals(path, answers):
    """Whether a model runs on its sets of inputs."""
    try:
        model = session(path)
        feeds = read_sets(path, model)
        for feed in feeds:
            model.run(None, feed)
    except Exception as error:
        return answers.put(f"the original does not run: {first_line(error)}")
    answers.put("" if feeds else "it has no inputs")


def judge(source, path, tolerance, answers):
    """What is wrong with a converted file, and its error."""
    answers.put(judged(source, path, tolerance))


def judged(source, path, tolerance):
    try:
        # Type errors are told here; the level on which a runtime may crash comes last.
        session(path)
    except Exception as error:
        return f"does not load: {first_line(error)}", None
    original = session(source)
    feeds = read_sets(source, original)
    expected = [original.run(None, feed) for feed in feeds]
    try:
        simulated = session(simulation(onnx.load(path)))
        error = max(distance(e, simulated.run(None, f)) for e, f in zip(expected, feeds))
    except Exception as error:
        return f"cannot be simulated: {first_line(error)}", None
    if not np.isfinite(error):
        return "not finite, or other whole numbers", error
    return ("" if error <= tolerance else "beyond the tolerance"), error


def loads_optimized(path, answers):
    """Whether a file loads with all optimizations."""
    try:
        session(path, optimized=True)
    except Exception as error:
        return answers.put(f"does not load: {first_line(error)}")
    answers.put("")


def apart(function, *arguments):
    """What a function puts in a queue, in a process of its own, which may crash; `None` if it does."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=function, args=(*arguments, answers))
    process.start()
    while True:
        try:
            answer = answers.get(timeout=1)
            break
        except queue.Empty:
            if not process.is_alive():
                answer = None
                break
    process.join()
    return answer


def examine(source, path, tolerance):
    """What is wrong with a converted file, its error, and what has to be said besides."""
    answer = apart(judge, source, path, tolerance)
    if answer is None:
        return "the runtime crashes on it or on its simulation", None, ""
    why, error = answer
    if why.startswith("does not load"):
        return why, error, ""
    optimized = apart(loads_optimized, path)
    note = "the runtime crashes on it with all optimizations" if optimized is None else ""
    return why or optimized or "", error, note


def first_line(error):
    return str(error).strip().split("\n")[0][:110]


def ours(source, target, program, tolerance):
    report = target + ".json"
    command = [program, source, "-o", target, "--dtype", "float16", "--report", report, "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, first_line(done.stderr.replace("error: ", "")) or f"code {done.returncode}"
    return json.loads(pathlib.Path(report).read_text())["precision"], None


def converted(convert, source, target):
    """Runs a converter; what it says where it fails."""
    try:
        onnx.save(convert(onnx.load(source), keep_io_types=True), target)
    except Exception as error:
        return f"fails: {first_line(error)}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--optimize", default="optimize")
    parser.add_argument("--most-mb", type=float, default=60)
    parser.add_argument("--tolerance", type=float, default=2e-3)
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    others = {}
    if not arguments.ours_only:
        from onnxconverter_common.float16 import convert_float_to_float16 as common
        from onnxruntime.transformers.float16 import convert_float_to_float16 as runtime

        others = {"onnxconverter-common": common, "onnxruntime": runtime}
    paths = sorted(glob.glob(os.path.join(arguments.folder, "*.onnx")))
    if arguments.names:
        paths = [p for p in paths if pathlib.Path(p).stem in arguments.names]
    broken = {name: [] for name in ["ours", *others]}
    models = 0
    print(f"{'model':30} {'bytes':>6} {'nodes':>6} {'float32':>7} {'casts':>5} {'simulated':>9} {'here':>9}  others")
    for path in paths:
        if os.path.getsize(path) > arguments.most_mb * 2**20:
            continue
        name = pathlib.Path(path).stem
        refusal = apart(originals, path)
        if refusal != "":
            print(f"{name:30} {refusal or 'the runtime crashes on the original'}", flush=True)
            continue
        models += 1
        with tempfile.TemporaryDirectory() as folder:
            target = os.path.join(folder, "half.onnx")
            precision, refused = ours(path, target, arguments.optimize, arguments.tolerance)
            if refused is None:
                why, error, note = examine(path, target, arguments.tolerance)
                ratio = os.path.getsize(target) / os.path.getsize(path)
                line = f"{ratio:6.3f} {precision['nodes']:6} {len(precision['kept']):7} {precision['casts']:5} "
                line += f"{precision['simulated_error'] or 0:9.1e} {error if error is not None else float('nan'):9.1e}"
            else:
                why, note, line = refused, "", f"{'–':>6} {'–':>6} {'–':>7} {'–':>5} {'–':>9} {'–':>9}"
            notes = [f"ours: {said}" for said in (why, note) if said]
            if why:
                broken["ours"].append(name)
            for other, convert in others.items():
                target = os.path.join(folder, other + ".onnx")
                wrong = converted(convert, path, target)
                wrong, error, note = (wrong, None, "") if wrong else examine(path, target, arguments.tolerance)
                if wrong:
                    broken[other].append(name)
                    size = f" ({error:.1e})" if error is not None else ""
                    notes.append(f"{other}: {wrong}{size}")
                elif note:
                    notes.append(f"{other}: {note}")
            print(f"{name:30} {line}  {'; '.join(notes)}", flush=True)
    print(f"\n{models} models")
    for name, some in broken.items():
        print(f"{name}: {len(some)} broken{': ' + ', '.join(some) if some else ''}")
    return 1 if broken["ours"] else 0


if __name__ == "__main__":
    sys.exit(main())
