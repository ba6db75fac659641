"""Fixes every open dimension of exported models and tells what is left open.

    python benches/fix_dims.py OPTIMIZE FOLDER [--most N]

For every `*.onnx` in FOLDER with open dimensions: the result without and with `--fix-dim` (at the last sizes that the
first was verified at), nodes of both, and dimensions of inputs and outputs that are still open. Every result is verified
by the program itself.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import onnx


def open_dims(model: onnx.ModelProto, values) -> list[str]:
    found = []
    for value in values:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") or dim.dim_param.isdigit():
                continue
            found.append(dim.dim_param if dim.dim_param else f"{value.name}[{axis}]")
    return list(dict.fromkeys(found))


def inputs(model: onnx.ModelProto):
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def sizes(report: Path) -> dict[str, str]:
    """Sizes of a run that the original accepts, none of them 0 or all of them 1."""
    for text in json.loads(report.read_text())["verify"]["sizes"][1::-1]:
        found = dict(part.rsplit(" = ", 1) for part in text.split(", ") if " = " in part)
        if found and not set(found.values()) & {"0"}:
            return found
    return {}


def rank(model: onnx.ModelProto, place: str) -> int:
    shapes = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.input}
    return shapes.get(place.rsplit("[", 1)[0], 0)


def nodes(path: Path) -> int:
    def count(graph) -> int:
        inner = (a.g for node in graph.node for a in node.attribute if a.HasField("g"))
        return len(graph.node) + sum(count(graph) for graph in inner)

    return count(onnx.load(path, load_external_data=False).graph)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=10**9)
    arguments = parser.parse_args()
    done = left = more = failed = 0
    for path in sorted(arguments.folder.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        wanted = open_dims(model, inputs(model))
        if not wanted or done + failed >= arguments.most:
            continue
        with tempfile.TemporaryDirectory() as folder:
            plain, fixed = Path(folder, "plain.onnx"), Path(folder, "fixed.onnx")
            report = Path(folder, "plain.json")
            run = lambda out, *more: subprocess.run(
                [arguments.optimize, path, "-o", out, "--timeout", "120", *more], capture_output=True, text=True
            )
            first = run(plain, "--report", report)
            if first.returncode:
                print(f"{path.name}: {first.stderr.strip().splitlines()[-1][:200]}", flush=True)
                failed += 1
                continue
            accepted = sizes(report)
            size = lambda name: accepted.get(name) or accepted.get(
                "axis " + re.sub(r"(.*)\[(\d+)\]", r"\2", name) + " of " + str(rank(model, name))
            )
            flag = ",".join(f"{name}={size(name) or 2}" for name in wanted)
            second = run(fixed, "--fix-dim", flag)
            if first.returncode or second.returncode:
                failed += 1
                print(f"{path.name}: {flag}: {(second.stderr or first.stderr).strip().splitlines()[-1][:200]}", flush=True)
                continue
            result = onnx.load(fixed, load_external_data=False)
            still = open_dims(result, [*result.graph.input, *result.graph.output])
            before, after = nodes(plain), nodes(fixed)
            done, left, more = done + 1, left + bool(still), more + (after > before)
            print(f"{path.name}: {flag}: nodes {before} -> {after}, open {still or 'none'}", flush=True)
    print(f"{done} models fixed and verified, {failed} failed; {left} with a dimension left, {more} with more nodes")


if __name__ == "__main__":
    main()
