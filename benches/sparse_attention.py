"""Attention over chosen blocks of keys, as `sparse-attention` writes it, beside one `MultiHeadAttention`.

    python benches/sparse_attention.py [--tokens 2048 4096] [--block 128] [--rounds 9]

Prints medians of interleaved runs on one thread, for four heads of 64 features.
"""

import argparse
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HEADS, SIZE = 4, 64


def session(nodes, constants, n, joined):
    width = [1, n, HEADS * SIZE] if joined else [1, HEADS, n, SIZE]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, width) for name in "qkv"]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, width)
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def fused(n):
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=HEADS)
    return session([node], {}, n, True)


def sparse(n, block, count):
    """The nodes of `passes/lossy/sparse_attention/emit.rs`, with heads side by side as `MultiHeadAttention` has them."""
    m, nodes, constants = n // block, [], {}

    def node(op, inputs, outputs=1, **attributes):
        names = [f"t{len(nodes)}_{at}" for at in range(outputs)]
        nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[-1]

    def constant(value):
        name = f"c{len(constants)}"
        constants[name] = np.asarray(value)
        return name

    def reshape(x, sizes):
        return node("Reshape", [x, constant(np.array(sizes, np.int64))])

    def number(x):
        return constant(np.float32(x))

    q, k, v = (node("Transpose", [reshape(x, [-1, n, HEADS, SIZE])], perm=[0, 2, 1, 3]) for x in "qkv")
    queries, keys = (reshape(x, [-1, m, block, SIZE]) for x in (q, k))
    axis = constant(np.array([2], np.int64))
    pooled = [node("ReduceSum", [x, axis], keepdims=0) for x in (queries, keys)]
    draft = node("MatMul", [pooled[0], node("Transpose", [pooled[1]], perm=[0, 2, 1])])
    draft = reshape(node("Mul", [draft, number(SIZE**-0.5 / block**2)]), [-1, HEADS, m, m])
    always = np.full((m, m), np.finfo(np.float32).min, np.float32)
    always[:, 0] = 1e30
    np.fill_diagonal(always, 1e30)
    draft = node("Max", [draft, constant(always)])
    chosen = node("TopK", [draft, constant(np.array([count], np.int64))], 2, axis=-1, sorted=0)
    index = reshape(chosen, [-1, m * count, 1])

    def gathered(x):
        rows = node("GatherND", [reshape(x, [-1, m, block * SIZE]), index], batch_dims=1)
        return reshape(rows, [-1, m, count * block, SIZE])

    near, values = gathered(k), gathered(v)
    scores = node("MatMul", [queries, node("Transpose", [near], perm=[0, 1, 3, 2])])
    weights = node("Softmax", [node("Mul", [scores, number(SIZE**-0.5)])], axis=-1)
    output = reshape(node("MatMul", [weights, values]), [-1, HEADS, n, SIZE])
    joined = reshape(node("Transpose", [output], perm=[0, 2, 1, 3]), [-1, n, HEADS * SIZE])
    nodes.append(helper.make_node("Identity", [joined], ["y"]))
    return session(nodes, constants, n, True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| tokens | kept | fused, ms | sparse, ms | times faster | all blocks off by |")
    print("|---|---|---|---|---|---|")
    for n in options.tokens:
        random = np.random.default_rng(0)
        feed = {name: random.standard_normal((1, n, HEADS * SIZE), dtype=np.float32) for name in "qkv"}
        m, dense = n // options.block, fused(n)
        expected = dense.run(None, feed)[0]
        same = sparse(n, options.block, m).run(None, feed)[0]
        off = np.linalg.norm(same - expected) / np.linalg.norm(expected)
        shares = [0.5, 0.35, 0.25, 0.15, 0.1]
        models = [dense] + [sparse(n, options.block, max(2, round(m * share))) for share in shares]
        times = [[] for _ in models]
        for _ in range(options.rounds + 1):
            for model, own in zip(models, times):
                start = time.process_time()
                model.run(None, feed)
                own.append(time.process_time() - start)
        whole, *rest = (1e3 * statistics.median(own[1:]) for own in times)
        for share, found in zip(shares, rest):
            print(f"| {n} | {share:.0%} | {whole:.1f} | {found:.1f} | {whole / found:.2f} | {off:.1e} |")


if __name__ == "__main__":
    main()
