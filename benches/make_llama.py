"""Makes layers of a language model at the widths of 7 billion parameters, with random weights, and a calibration set.

    make_llama.py FOLDER [--layers 2] [--hidden 4096] [--ffn 11008] [--heads 32] [--vocabulary 2048] [--tokens 512]

FOLDER/llama.onnx and FOLDER/llama.onnx.data (1.7 GB as it stands), float32, and FOLDER/calib.npz: sequences of 128 tokens.
Decoder blocks as exporters write them: RMS norms in primitive operators, rotary positions, causal attention, a gated
feed-forward part. Never more than a slice of one weight is in memory. Needs numpy and onnx.
"""

import argparse
import pathlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper

PAGE = 4096
SLICE = 256
SEQUENCE = 128


class Writer:
    """Nodes, and weights that go straight to the data file."""

    def __init__(self, file):
        self.file, self.nodes, self.weights = file, [], []
        self.rng = np.random.default_rng(0)

    def node(self, op, *inputs, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def store(self, name, dims, parts):
        self.file.write(bytes(-self.file.tell() % PAGE))
        start = self.file.tell()
        for part in parts:
            self.file.write(np.ascontiguousarray(part).data)
        tensor = TensorProto(
            name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
        )
        places = (("location", "llama.onnx.data"), ("offset", start), ("length", self.file.tell() - start))
        for key, value in places:
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name

    def floats(self, name, values):
        values = np.asarray(values, np.float32)
        return self.store(name, values.shape, [values])

    def ints(self, name, values):
        self.weights.append(numpy_helper.from_array(np.asarray(values, np.int64), name))

    def matrix(self, name, rows, columns):
        scale = np.float32(rows**-0.5)
        sizes = [min(SLICE, rows - start) for start in range(0, rows, SLICE)]
        parts = (self.rng.standard_normal((size, columns), dtype=np.float32) * scale for size in sizes)
        return self.store(name, (rows, columns), parts)


def norm(w, x, name, hidden):
    mean = w.node("ReduceMean", w.node("Pow", x, "two"), axes=[-1], keepdims=1)
    scaled = w.node("Div", x, w.node("Sqrt", w.node("Add", mean, "epsilon")))
    return w.node("Mul", scaled, w.floats(f"{name}.weight", 1 + 0.1 * w.rng.standard_normal(hidden)))


def rotate(w, x):
    first = w.node("Slice", x, "zero", "half", "last")
    second = w.node("Slice", x, "half", "size", "last")
    turned = w.node("Concat", w.node("Neg", second), first, axis=-1)
    return w.node("Add", w.node("Mul", x, "cos"), w.node("Mul", turned, "sin"))


def attention(w, x, name, hidden, heads):
    size = hidden // heads

    def project(part):
        y = w.node("MatMul", x, w.matrix(f"{name}.{part}", hidden, hidden))
        return w.node("Transpose", w.node("Reshape", y, "heads"), perm=[0, 2, 1, 3])

    q, k, v = rotate(w, project("q")), rotate(w, project("k")), project("v")
    scores = w.node("Div", w.node("MatMul", q, w.node("Transpose", k, perm=[0, 1, 3, 2])), "root")
    weights = w.node("Softmax", w.node("Add", scores, "mask"), axis=-1)
    joined = w.node("Reshape", w.node("Transpose", w.node("MatMul", weights, v), perm=[0, 2, 1, 3]), "joined")
    return w.node("MatMul", joined, w.matrix(f"{name}.o", hidden, hidden))


def feed_forward(w, x, name, hidden, ffn):
    gate = w.node("MatMul", x, w.matrix(f"{name}.gate", hidden, ffn))
    up = w.node("MatMul", x, w.matrix(f"{name}.up", hidden, ffn))
    inner = w.node("Mul", w.node("Mul", gate, w.node("Sigmoid", gate)), up)
    return w.node("MatMul", inner, w.matrix(f"{name}.down", ffn, hidden))


def shared(w, args):
    size = args.hidden // args.heads
    angles = np.outer(np.arange(SEQUENCE), 10_000.0 ** (-np.arange(0, size, 2) / size))
    angles = np.concatenate([angles, angles], axis=1)
    w.floats("cos", np.cos(angles))
    w.floats("sin", np.sin(angles))
    w.floats("mask", np.triu(np.full((SEQUENCE, SEQUENCE), -1e9), 1))
    w.floats("two", 2.0)
    w.floats("epsilon", 1e-5)
    w.floats("root", size**0.5)
    w.ints("zero", [0])
    w.ints("half", [size // 2])
    w.ints("size", [size])
    w.ints("last", [-1])
    w.ints("heads", [0, SEQUENCE, args.heads, size])
    w.ints("joined", [0, SEQUENCE, args.hidden])


def main(args):
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.folder / "llama.onnx.data", "wb") as file:
        w = Writer(file)
        shared(w, args)
        x = w.node("Gather", w.matrix("embedding", args.vocabulary, args.hidden), "input_ids")
        for layer in range(args.layers):
            name = f"layers.{layer}"
            inner = norm(w, x, f"{name}.norm1", args.hidden)
            x = w.node("Add", x, attention(w, inner, f"{name}.attention", args.hidden, args.heads))
            inner = norm(w, x, f"{name}.norm2", args.hidden)
            x = w.node("Add", x, feed_forward(w, inner, f"{name}.mlp", args.hidden, args.ffn))
        head = w.matrix("head", args.hidden, args.vocabulary)
        w.nodes.append(helper.make_node("MatMul", [norm(w, x, "norm", args.hidden), head], ["logits"]))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", SEQUENCE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", SEQUENCE, args.vocabulary])
    graph = helper.make_graph(w.nodes, "llama", [ids], [logits], initializer=w.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (args.folder / "llama.onnx").write_bytes(model.SerializeToString())
    tokens = np.random.default_rng(1).integers(0, args.vocabulary, (args.tokens // SEQUENCE, SEQUENCE))
    np.savez(args.folder / "calib.npz", input_ids=tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    for name, default in (
        ("layers", 2),
        ("hidden", 4096),
        ("ffn", 11008),
        ("heads", 32),
        ("vocabulary", 2048),
        ("tokens", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
