"""Runs `optimize` over a folder of exported models and compares it with onnxsim, onnxslim and onnxoptimizer.

    farm.py OPTIMIZE FOLDER RESULTS [--only NAME ...] [--runs portable,ort,opset23] [--peers onnxsim,onnxslim,onnxoptimizer]
            [--timeout S] [--again] [--keep] [--table]

FOLDER holds NAME.onnx with its inputs at two sizes, NAME.a.npz and NAME.b.npz. Needs onnx, onnxruntime and numpy; of the
peers, those that are installed in the environment of this script run with their defaults. Everything runs in a process of
its own with a limit of time. RESULTS gets one JSON file per model; what is there already is not run again, so that a run
can be stopped and taken up, and `--again` forgets the runs of `optimize` (those of the peers stay). `--keep` leaves the
results of `optimize` there as NAME.RUN.onnx, `--table` only prints what earlier runs found.

Nodes are counted alike for all: those of the main graph, its subgraphs and local functions, other than Constant (some
tools keep constants as nodes, some as initializers). A peer's result counts where ONNX Runtime runs it and its outputs
are those of the original. Errors are relative L2 errors of outputs, the worst over both sizes, with the runtime's own
optimizations off and on. Left out are outputs that differ between two runs of the original (random ones), and all with
optimizations where these change an output of the original itself by more than the tolerance (a detector's, whose boxes
tie). An input that the original itself does not run is noted, and is no problem of the result.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

RUNS = {"portable": [], "ort": ["--target", "ort"], "opset23": ["--opset", "23"]}
PEERS = ["onnxsim", "onnxslim", "onnxoptimizer"]
#: Past this an output counts as another one.
TOLERANCE = 1e-3


def measured(path):
    """Nodes other than Constant, and bytes with external data."""
    import onnx

    model = onnx.load(path, load_external_data=False)

    def inside(nodes):
        total = 0
        for node in nodes:
            total += node.op_type != "Constant"
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
                total += sum(inside(graph.node) for graph in graphs)
        return total

    nodes = inside(model.graph.node) + sum(inside(function.node) for function in model.functions)
    files = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    path = pathlib.Path(path)
    return {"nodes": nodes, "bytes": path.stat().st_size + sum((path.parent / f).stat().st_size for f in files)}


def compared(original, result):
    """What differs between two models on the inputs beside the original."""
    import numpy as np
    import onnxruntime as ort

    def session(path, optimized):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def flat(outputs):
        arrays = []
        for output in outputs:
            if isinstance(output, list):
                arrays += flat(output)
            else:
                arrays.append(np.array(sorted(output.items())) if isinstance(output, dict) else np.asarray(output))
        return arrays

    def distance(a, b):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
        if a.dtype.kind in "OUS":
            return 0.0 if (a == b).all() else "other strings"
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        if (finite != np.isfinite(b)).any() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return "infinities or NaN differ"
        size = np.linalg.norm(a[finite])
        gap = np.linalg.norm(a[finite] - b[finite])
        return float(gap / size) if size else float(gap)

    stem = original.removesuffix(".onnx")
    reference = session(original, False)
    try:
        optimized_reference = session(original, True)
    except Exception:
        optimized_reference = None
    names = [i.name for i in reference.get_inputs()]
    outputs = [o.name for o in reference.get_outputs()]
    found = {"worst": 0.0, "runs": 0, "problems": [], "notes": []}
    feeds = []
    for size in "ab":
        if not os.path.exists(f"{stem}.{size}.npz"):
            continue
        with np.load(f"{stem}.{size}.npz") as arrays:
            feed = {name: arrays[name] for name in names if name in arrays}
        try:
            first, second = (flat(reference.run(outputs, feed)) for _ in range(2))
        except Exception as error:  # The runtime raises what it likes.
            found["notes"].append(f"{size}: the original fails: {str(error)[:200]}")
            continue
        fixed = [a.tobytes() == b.tobytes() for a, b in zip(first, second)]
        stable = fixed
        if optimized_reference:
            gaps = map(distance, first, flat(optimized_reference.run(outputs, feed)))
            steady = all(not isinstance(gap, str) and gap < TOLERANCE for gap, same in zip(gaps, fixed) if same)
            stable = [steady and same for same in fixed]
        feeds.append((size, feed, first, (fixed, stable)))
    for optimized in (False, True):
        try:
            candidate = session(result, optimized)
            for size, feed, expected, judged in feeds:
                got = flat(candidate.run(outputs, {i.name: feed[i.name] for i in candidate.get_inputs()}))
                for name, a, b, same in zip(outputs, expected, got, judged[optimized]):
                    gap = distance(a, b) if same else 0.0
                    if isinstance(gap, str) or gap > TOLERANCE:
                        found["problems"].append(f"{size}: `{name}`: {gap}")
                    else:
                        found["worst"] = max(found["worst"], gap)
                found["runs"] += 1
        except Exception as error:
            found["problems"].append(f"{'optimized' if optimized else 'plain'}: {str(error)[:200]}")
    return found


def loads(path):
    """Whether ONNX Runtime takes a model, or why not."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return {"loads": True}
    except Exception as error:
        return {"loads": False, "reason": str(error)[:300]}


def inner(function, *arguments, limit=300):
    """The answer of a function of this script, called in a process of its own."""
    command = [sys.executable, __file__, f"--{function}", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"problems": [f"{function} took more than {limit} s"]}
    except json.JSONDecodeError:
        return {"problems": [f"{function} ended with {done.returncode}: {done.stderr[-300:]}"]}


def timed(command, environment, limit):
    """Runs a command: exit code (None past the limit), seconds of the clock and of the processor, what it said."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            elapsed = time.perf_counter() - start
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            if elapsed > limit:
                process.kill()
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = None
                break
            time.sleep(0.002)
        said.seek(0)
        tail = said.read()[-1000:]
    return process.returncode, round(elapsed, 3), round(usage.ru_utime + usage.ru_stime, 3), tail


def attempt(command, original, result, environment, limit):
    """One tool on one model: how it went and what came out."""
    code, seconds, cpu, said = timed(command, environment, limit)
    entry = {"code": code, "seconds": seconds, "cpu": cpu}
    if code != 0 or not result.exists():
        return {**entry, "said": said, "problems": ["no answer in time" if code is None else f"exit {code}"]}
    return {**entry, **inner("measure", result), **inner("compare", original, result)}


def command_of(peer, original, result):
    scripts = pathlib.Path(sys.executable).parent
    return {
        "onnxsim": [scripts / "onnxsim", original, result],
        "onnxslim": [scripts / "onnxslim", original, result],
        "onnxoptimizer": [sys.executable, "-m", "onnxoptimizer", original, result],
    }[peer]


def work(args, models):
    """Runs what has not been run yet."""
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    installed = [peer for peer in args.peers if importlib.util.find_spec(peer)]
    for model in models:
        place = args.results / f"{model.stem}.json"
        entry = json.loads(place.read_text()) if place.exists() else {"name": model.stem, "peers": {}, "runs": {}}
        if args.again:
            for run in args.runs:
                entry["runs"].pop(run, None)
        if "original" not in entry:
            entry["original"] = {**inner("measure", model), **inner("load", model)}
        with tempfile.TemporaryDirectory() as folder:
            for run in args.runs:
                if run not in entry["runs"]:
                    result = (args.results if args.keep else pathlib.Path(folder)) / f"{model.stem}.{run}.onnx"
                    command = [args.program, model, "-o", result, "--overwrite", "-q", *RUNS[run]]
                    entry["runs"][run] = attempt(command, model, result, environment, args.timeout)
                    told(model.stem, run, entry["original"], entry["runs"][run])
            for peer in installed:
                if peer not in entry["peers"]:
                    result = pathlib.Path(folder) / f"{peer}.onnx"
                    command = command_of(peer, model, result)
                    entry["peers"][peer] = attempt(command, model, result, environment, args.timeout)
                    told(model.stem, peer, entry["original"], entry["peers"][peer])
        place.with_suffix(".part").write_text(json.dumps(entry, indent=1))
        place.with_suffix(".part").rename(place)


def told(name, tool, original, entry):
    nodes = f"{original.get('nodes')} -> {entry.get('nodes', '-')}"
    print(f"{name:40} {tool:14} {nodes:>14} {entry['seconds']:7.2f} s {'; '.join(entry['problems'])[:160]}", flush=True)


#: What a file can count as in the summary.
TITLES = {
    "right": "right",
    "failed": "failed or differ",
    "refused": "refused, as ONNX Runtime refuses the original",
    "behind": "more nodes than a peer",
    "larger": "larger",
    "slow": "over 10 s",
}


def judged(before, after, best):
    """What one run counts as, and its row."""
    verdicts = []
    if after["code"] and not before.get("loads", True):
        verdicts.append("refused")
    else:
        verdicts.append("failed" if after["problems"] else "right")
    if best and after.get("nodes", 0) > best[1]:
        verdicts.append("behind")
    if after.get("bytes", 0) > before["bytes"]:
        verdicts.append("larger")
    if after["seconds"] > 10:
        verdicts.append("slow")
    peer = f"{best[1]} {best[0]}" if best else "-"
    error = f"{after['worst']:.1e}" if "worst" in after else "-"
    remarks = "; ".join(after["problems"] + after.get("notes", []))[:120].replace("|", "/")
    row = [before["nodes"], after.get("nodes", "-"), peer, before["bytes"], after.get("bytes", "-")]
    return verdicts, [*row, f"{after['seconds']:.2f}", error, remarks]


def table(args, models):
    """Prints one row per model and run, and what they come to."""
    entries = [json.loads(p.read_text()) for p in (args.results / f"{m.stem}.json" for m in models) if p.exists()]
    print("\n| model | run | nodes | after | best peer | bytes | after | seconds | worst error | remarks |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    counts = {run: {verdict: [] for verdict in TITLES} for run in args.runs}
    seconds = {run: [] for run in args.runs}
    for entry in entries:
        right = {n: p["nodes"] for n, p in entry["peers"].items() if not p["problems"] and "nodes" in p}
        best = min(right.items(), key=lambda item: item[1]) if right else None
        for run in (run for run in args.runs if run in entry["runs"]):
            verdicts, row = judged(entry["original"], entry["runs"][run], best)
            print("|", " | ".join(map(str, [entry["name"], run, *row])), "|")
            seconds[run].append(entry["runs"][run]["seconds"])
            for verdict in verdicts:
                counts[run][verdict].append(entry["name"])
    for run in (run for run in args.runs if seconds[run]):
        print(f"\n{run}: {len(seconds[run])} files, median {statistics.median(seconds[run]):.2f} s")
        for verdict, title in TITLES.items():
            names = counts[run][verdict]
            print(f"  {len(names):4} {title}", *([] if verdict == "right" else names))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", default=[""], help="names that begin like this")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=list(RUNS))
    parser.add_argument("--peers", type=lambda text: text.split(",") if text else [], default=PEERS)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    models = [m for m in sorted(args.folder.glob("*.onnx")) if any(m.stem.startswith(name) for name in args.only)]
    models = [m for m in models if m.with_suffix(".a.npz").exists()]
    if not args.table:
        work(args, models)
    table(args, models)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(sys.argv[2])))
    elif sys.argv[1:2] == ["--load"]:
        print(json.dumps(loads(sys.argv[2])))
    elif sys.argv[1:2] == ["--compare"]:
        print(json.dumps(compared(sys.argv[2], sys.argv[3])))
    else:
        main()
