"""Compares `optimize` with onnxsim and onnxslim on model files, in one run on one machine.

    peers.py OPTIMIZE MODEL_OR_FOLDER ... [--only optimize,onnxsim,onnxslim]

Prints a Markdown table per model: nodes as stored (main graph, and with subgraphs and functions), bytes of the file
with its external data, wall time and peak resident memory of the process. The peers run with their defaults from the
environment of this script (`pip install onnxsim==0.8.1 onnxslim==0.1.98`); `optimize` too, but light_* models, which
make their weights at run time, get --max-growth 512MB, and smollm2 gets --target ort. `optimize` appears twice:
verifying its result, as it does by default, and with --no-verify, as the peers do.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time



def count(path):
    """Nodes of the main graph, nodes of everything, bytes of the file with the data files beside it."""
    # Imported in a process of its own: a process that starts others hands its peak memory down to them.
    import onnx

    model = onnx.load(path, load_external_data=False)

    def inside(nodes):
        total = 0
        for node in nodes:
            total += 1
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
                total += sum(inside(graph.node) for graph in graphs)
        return total

    everything = inside(model.graph.node) + sum(inside(function.node) for function in model.functions)
    files = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    size = path.stat().st_size + sum((path.parent / file).stat().st_size for file in files)
    return len(model.graph.node), everything, size


def counted(path):
    """The cells of a row that say what a model is."""
    told = subprocess.run([sys.executable, __file__, "--count", path], check=True, capture_output=True, text=True)
    return " | ".join(told.stdout.split())


def measure(command, environment):
    """Runs a command: exit code, seconds, peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - start, usage.ru_maxrss * 1024


def commands(program, model, out):
    """Every contender's command line."""
    ours = [program, model, "-o", out, "-q"]
    if model.stem.startswith("light_"):
        ours += ["--max-growth", "512MB"]
    if model.stem.startswith("smollm2"):
        ours += ["--target", "ort"]
    scripts = pathlib.Path(sys.executable).parent
    return {
        "optimize": [*ours, "--no-verify"],
        "optimize+verify": ours,
        "onnxsim": [scripts / "onnxsim", model, out],
        "onnxslim": [scripts / "onnxslim", model, out],
    }


def main(arguments):
    only = None
    if "--only" in arguments:
        at = arguments.index("--only")
        only = arguments[at + 1].split(",")
        arguments = arguments[:at] + arguments[at + 2 :]
    program, *places = arguments
    models = []
    for place in map(pathlib.Path, places):
        models += sorted(place.rglob("*.onnx")) if place.is_dir() else [place]
    # The worker that verifies finds the runtime of this Python.
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    print("| model | by | nodes | with subgraphs | bytes | seconds | peak MB |\n|---|---|---|---|---|---|---|")
    for model in models:
        print(f"| {model.stem} | as it is | {counted(model)} | | |", flush=True)
        for name in commands(program, model, model):
            if only and name not in only:
                continue
            with tempfile.TemporaryDirectory(dir=model.parent if os.access(model.parent, os.W_OK) else None) as folder:
                out = pathlib.Path(folder) / "out.onnx"
                code, seconds, peak = measure(commands(program, model, out)[name], environment)
                told = f"{seconds:.2f} | {peak / 1e6:.0f}"
                if code == 0 and out.exists():
                    print(f"| | {name} | {counted(out)} | {told} |", flush=True)
                else:
                    print(f"| | {name} | failed, exit {code} | | | {told} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--count":
        print(*count(pathlib.Path(sys.argv[2])))
    else:
        main(sys.argv[1:])
