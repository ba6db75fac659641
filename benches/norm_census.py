"""Layer and RMS normalizations, GELU and rotary embeddings: how many are one node after `optimize`, and what kept the rest.

    python benches/norm_census.py OPTIMIZE DIR_OR_MODEL... [--only NAME] [--show]

Runs `optimize` on every model, once for the portable target at operator set 23, where each of these has a standard
operator, and once with `--target ort`, and counts in the results

- nodes that are such an operator (a fused attention that rotates counts as its embeddings), and
- what still spells one out: a mean of squares that reaches a square root and then a factor of what was squared; Erf, or
  Tanh of a cubic, or Sigmoid of a multiple of x, times x; half of a value turned against the other half and negated.

SiLU counts with `--target ort` only: no operator set up to 23 has it. A miss is printed with the nodes that spell it out
and the refusals of the pass that looks for it; `--show` prints all numbers per model.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile

import onnx
from onnx import numpy_helper

WAYS = {"portable": ["--opset", "23"], "ort": ["--target", "ort"]}
KINDS = {
    "layer norm": ({"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"}, "fuse-layer-norm"),
    "rms norm": (
        {"RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"},
        "fuse-rms-norm",
    ),
    "gelu": ({"Gelu", "FastGelu", "BiasGelu"}, "fuse-gelu"),
    "silu": ({"QuickGelu", "Swish"}, "fuse-gelu"),
    "rotary": ({"RotaryEmbedding", "GemmaRotaryEmbedding"}, "fuse-rotary"),
}
# What may stand between the parts of a normalization.
PASSED = {"Cast", "Add", "Clip", "Max", "Mul", "Div", "Identity", "Reshape", "Unsqueeze", "Squeeze"}
REDUCTIONS = {"ReduceMean", "ReduceSum"}
# The coefficient of the cube in the approximation of GELU by tanh, alone and times √(2/π).
CUBIC = (0.044715, 0.0356774)


class Graph:
    """One graph of a model, with who makes and who reads what."""

    def __init__(self, graph, outer=None):
        self.nodes = list(graph.node)
        self.maker = dict(outer.maker) if outer else {}
        self.constants = dict(outer.constants) if outer else {}
        self.readers = collections.defaultdict(list)
        for tensor in graph.initializer:
            self.constants[tensor.name] = tensor
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = node.attribute[0].t
            for name in node.output:
                self.maker[name] = node
            for name in node.input:
                self.readers[name].append(node)

    def by(self, name, *ops):
        """The node that makes `name`, if it is one of `ops`."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type in ops else None

    def number(self, name):
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.BFLOAT16):
            return None
        array = numpy_helper.to_array(tensor)
        return float(array.reshape(-1)[0]) if array.size == 1 else None

    def through_casts(self, name):
        while node := self.by(name, "Cast", "Identity"):
            name = node.input[0]
        return name

    def square_of(self, name):
        """What `name` is the square of."""
        name = self.through_casts(name)
        if node := self.by(name, "Mul"):
            a, b = (self.through_casts(v) for v in node.input)
            return a if a == b else None
        if node := self.by(name, "Pow"):
            return self.through_casts(node.input[0]) if self.number(node.input[1]) == 2 else None
        return None

    def reaches(self, start, wanted, passed, depth):
        """Nodes of `wanted` that `start` reaches through `passed`."""
        found, seen, front = [], set(), [(start, depth)]
        while front:
            name, left = front.pop()
            for node in self.readers[name]:
                if node.op_type in wanted:
                    found.append(node)
                elif node.op_type in passed and left and node.output[0] not in seen:
                    seen.add(node.output[0])
                    front.append((node.output[0], left - 1))
        return found

    def is_difference_from_mean(self, name):
        node = self.by(name, "Sub", "Add")
        return node is not None and any(
            self.reaches_back(v, REDUCTIONS, {"Cast", "Neg", "Div", "Mul"}, 3) for v in node.input
        )

    def is_cubic(self, name, depth=5):
        number, node = self.number(name), self.maker.get(name)
        if number is not None:
            return any(abs(number / cubic - 1) < 1e-3 for cubic in CUBIC)
        if node is None or node.op_type not in ("Mul", "Add", "Cast", "Pow") or not depth:
            return False
        return any(self.is_cubic(v, depth - 1) for v in node.input)

    def is_mean(self, node):
        """Whether a reduction is a mean: a sum is one where it is divided by a number right away."""
        divided = [r for r in self.readers[node.output[0]] if r.op_type in ("Div", "Mul")]
        return node.op_type == "ReduceMean" or any(self.number(v) for r in divided for v in r.input)

    def reaches_back(self, name, wanted, passed, depth):
        node = self.maker.get(name)
        if node is None:
            return False
        if node.op_type in wanted:
            return True
        return bool(depth and node.op_type in passed) and any(
            self.reaches_back(v, wanted, passed, depth - 1) for v in node.input
        )


def normalizations(graph):
    for node in graph.nodes:
        if node.op_type not in REDUCTIONS or not graph.is_mean(node):
            continue
        squared = graph.square_of(node.input[0])
        if squared is None:
            continue
        for root in graph.reaches(node.output[0], {"Sqrt", "Pow"}, PASSED, 4):
            if root.op_type == "Pow" and graph.number(root.input[1]) not in (0.5, -0.5):
                continue
            products = graph.reaches(root.output[0], {"Mul", "Div"}, {"Cast", "Reciprocal", "Div", "Mul"}, 3)
            products = [p for p in products if squared in [graph.through_casts(v) for v in p.input]]
            if products or graph.reaches(root.output[0], {"Mul"}, {"Reciprocal", "Cast", "Div"}, 2):
                kind = "layer norm" if graph.is_difference_from_mean(squared) else "rms norm"
                yield kind, [node, root, *products[:1]]
                break


def activations(graph):
    for node in graph.nodes:
        if node.op_type == "Erf":
            yield "gelu", [node]
        if node.op_type == "Tanh" and graph.is_cubic(node.input[0]):
            yield "gelu", [node]
        if node.op_type == "Sigmoid":
            argument = graph.by(node.input[0], "Mul")
            whole = {node.input[0], *(argument.input if argument is not None else [])}
            if any(whole & set(reader.input) for reader in graph.readers[node.output[0]] if reader.op_type == "Mul"):
                yield "silu", [node]


def rotations(graph):
    for node in graph.nodes:
        if node.op_type != "Concat" or len(node.input) != 2:
            continue
        if graph.by(node.input[0], "Neg") is None:
            continue
        if any(reader.op_type == "Mul" for reader in graph.readers[node.output[0]]):
            yield "rotary", [node]


def graphs(model):
    def inside(graph, outer=None):
        found = Graph(graph, outer)
        yield found
        for node in graph.node:
            for attribute in node.attribute:
                for sub in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    yield from inside(sub, found)

    yield from inside(model.graph)
    for function in model.functions:
        yield from inside(onnx.helper.make_graph(function.node, function.name, [], []))


def fused(model):
    counts = collections.Counter()
    for graph in graphs(model):
        for node in graph.nodes:
            for kind, (operators, _) in KINDS.items():
                counts[kind] += node.op_type in operators
            if node.op_type == "GroupQueryAttention":
                # It rotates queries and keys.
                counts["rotary"] += 2 * any(a.name == "do_rotary" and a.i for a in node.attribute)
    return counts


def refusals(report, pass_name):
    found = []
    for line in report["passes"]:
        if line["name"] == pass_name:
            found += [f"{r['reason']} ({r['example']})" for r in line["refusals"]]
    return list(dict.fromkeys(found))


def census(optimize, path, way):
    with tempfile.TemporaryDirectory() as folder:
        target, report = f"{folder}/out.onnx", f"{folder}/report.json"
        command = [optimize, str(path), "-o", target, "--report", report, "--no-verify", "-q", *WAYS[way]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr.strip().splitlines()[-1:]
        model = onnx.load(target, load_external_data=False)
        report = json.loads(pathlib.Path(report).read_text())
    counts, misses = fused(model), []
    for graph in graphs(model):
        for find in (normalizations, activations, rotations):
            misses += find(graph)
    if way == "portable":
        misses = [miss for miss in misses if miss[0] != "silu"]
        counts.pop("silu", None)
    return (counts, misses, report), None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimize")
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    paths = [p for m in args.models for p in (sorted(m.glob("*.onnx")) if m.is_dir() else [m])]
    totals = {way: collections.Counter() for way in WAYS}
    missed = {way: collections.Counter() for way in WAYS}
    for path in [p for p in paths if args.only in p.name]:
        for way in WAYS:
            found, failure = census(args.optimize, path, way)
            if failure is not None:
                print(f"{path.name} {way}: not optimized: {' '.join(failure)}")
                continue
            counts, misses, report = found
            totals[way].update(counts)
            if args.show and (+counts or misses):
                print(f"{path.name} {way}: {dict(+counts)}, {len(misses)} missed")
            for kind, nodes in misses:
                missed[way][kind] += 1
                names = ", ".join(f"{n.op_type} {n.output[0]}" for n in nodes)
                print(f"{path.name} {way}: {kind} is spelled out: {names}")
            for kind in sorted({kind for kind, _ in misses}):
                for line in refusals(report, KINDS[kind][1]) or ["no reason was given"]:
                    print(f"    {KINDS[kind][1]}: {line}")
    for way in WAYS:
        for kind in KINDS:
            whole = totals[way][kind] + missed[way][kind]
            if whole:
                print(f"{way:9} {kind:11} {totals[way][kind]} of {whole} ({100 * totals[way][kind] / whole:.1f} %)")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
