"""How many attentions of exported models become one operator, and why the others do not.

    python benches/attention_census.py FOLDER [NAME…] [--optimize PATH] [--args="--target ort"]

An attention is a Softmax between two products of computed values: scores before it, values behind it. Every model of
FOLDER is optimized without verification; a file counts as fused where no such Softmax is left. For every other file the
refusals of `fuse-attention` are printed, and a file that has none is marked SILENT.
"""

import argparse
import collections
import glob
import json
import os
import shlex
import subprocess
import sys
import tempfile

import onnx

PRODUCTS = {"MatMul", "Einsum", "Gemm", "FusedMatMul"}
PASSING = {
    "Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Tanh",
    "Identity", "Expand", "Concat", "Slice", "Split", "Max", "Min", "Clip", "Pad", "Dropout", "ScatterND", "Neg",
}  # fmt: skip
DEPTH = 24


def graphs(graph):
    """The graph and every graph in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            for body in inner:
                yield from graphs(body)


def is_constant(value, producers, initializers):
    """Whether a value is a weight, perhaps behind nodes that only move or convert it."""
    for _ in range(8):
        if value in initializers:
            return True
        node = producers.get(value)
        if node is None:
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type not in {"Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"}:
            return False
        value = node.input[0]
    return False


def spelled_out(graph):
    """The names of the softmaxes between two products."""
    producers = {o: n for n in graph.node for o in n.output if o}
    users = collections.defaultdict(list)
    for node in graph.node:
        for value in node.input:
            users[value].append(node)
    initializers = {i.name for i in graph.initializer}

    def computed(node):
        return sum(not is_constant(v, producers, initializers) for v in node.input[:2]) == 2

    def search(start, step):
        seen, frontier = set(), [(start, 0)]
        while frontier:
            value, depth = frontier.pop()
            for node in step(value):
                if id(node) in seen or depth > DEPTH:
                    continue
                seen.add(id(node))
                if node.op_type in PRODUCTS and computed(node):
                    return True
                if node.op_type in PASSING:
                    frontier.extend((v, depth + 1) for v in (node.input if step is before else node.output) if v)
        return False

    def before(value):
        return [producers[value]] if value in producers else []

    def behind(value):
        return users[value]

    return [
        n.output[0] for n in graph.node
        if n.op_type == "Softmax" and search(n.input[0], before) and search(n.output[0], behind)
    ]  # fmt: skip


def count(path):
    """Softmaxes between two products, and nodes."""
    model = onnx.load(path, load_external_data=False)
    bodies = list(graphs(model.graph)) + list(model.functions)
    names = [name for body in bodies for name in (spelled_out(body) if hasattr(body, "initializer") else [])]
    return names, sum(len(body.node) for body in bodies)


def census(path, optimize, extra, folder):
    """Attentions before and behind, nodes, and the refusals; or what went wrong."""
    before, nodes = count(path)
    if not before:
        return None
    out, report = os.path.join(folder, os.path.basename(path)), os.path.join(folder, "report.json")
    command = [optimize, path, "-o", out, "--overwrite", "--report", report, *extra]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode != 0:
        return before, None, nodes, 0, [(run.stdout + run.stderr).strip()[-300:]], 0
    after, left = count(out)
    found = json.load(open(report))
    records = [p for p in found["passes"] if p["name"] == "fuse-attention"]
    reasons = [f"{r['count']} x {r['reason']} ({r['example']})" for p in records for r in p.get("refusals", [])]
    reasons += [f"left out: {p['dropped']}" for p in records if p.get("dropped")]
    return before, after, nodes, left, reasons, os.path.getsize(out) - os.path.getsize(path)


def main():
    """Prints one line a file and the totals by exporter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--optimize", default=os.environ.get("OPTIMIZE", "optimize"))
    parser.add_argument("--args", default="--target ort --no-verify")
    given = parser.parse_args()
    totals = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(glob.glob(os.path.join(given.folder, "*.onnx"))):
            name = os.path.basename(path)[:-5]
            if given.names and not any(name.startswith(n) for n in given.names):
                continue
            found = census(path, given.optimize, shlex.split(given.args), folder)
            if found is None:
                continue
            before, after, nodes, left, reasons, grown = found
            mode = name.rsplit(".", 1)[-1]
            fused = after is not None and not after
            totals[mode, "files"] += 1
            totals[mode, "fused"] += fused
            state = "fused" if fused else "FAILED" if after is None else "miss" if reasons else "SILENT miss"
            grew = f" grew {grown} bytes" if grown > 0 and after is not None else ""
            print(f"{name:32s} {len(before):3d} -> {len(after or []):3d}  {nodes:5d} -> {left:5d} nodes  {state}{grew}")
            for reason in reasons if not fused else []:
                print(f"      {reason}")
            sys.stdout.flush()
    for mode in sorted({mode for mode, _ in totals}):
        print(f"{mode}: {totals[mode, 'fused']} of {totals[mode, 'files']} files fused")
    files = sum(n for (_, kind), n in totals.items() if kind == "files")
    fused = sum(n for (_, kind), n in totals.items() if kind == "fused")
    print(f"all: {fused} of {files} files fused ({100 * fused / max(files, 1):.1f} %)")


if __name__ == "__main__":
    main()
