"""Times the exact passes on chains of 100 to 50,000 nodes, pass by pass.

    scale.py OPTIMIZE [NODES ...]

Prints the time per node of each size (the best of several runs, --no-verify), and of the largest the dearest passes.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from onnx import TensorProto, helper, numpy_helper

BLOCK = 20


def chain(nodes):
    """Blocks as exporters write them: a layer, shape arithmetic, a pair of transposes, things to fold."""
    made, constants = [], []

    def add(op, *inputs, **attributes):
        made.append(helper.make_node(op, inputs, [f"v{len(made)}"], **attributes))
        return made[-1].output[0]

    def constant(values, dtype):
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{len(constants)}"))
        return constants[-1].name

    x = "x"
    for index in range(nodes // BLOCK):
        weight = [[((8 * i + j) * 37 + index * 11) % 17 / 64 - 0.1 for j in range(8)] for i in range(8)]
        total = add("Add", add("MatMul", x, constant(weight, np.float32)), constant([index / 100] * 8, np.float32))
        axis = constant([0], np.int64)
        first = add("Gather", add("Shape", total), constant([0], np.int64))
        again = add("Unsqueeze", add("Squeeze", first, axis), axis)
        split = add("Reshape", total, add("Concat", again, constant([2, 4], np.int64), axis=0))
        back = add("Transpose", add("Relu", add("Transpose", split, perm=[0, 2, 1])), perm=[0, 2, 1])
        copy = add("Identity", add("Reshape", back, constant([0, 8], np.int64)))
        same = add("Mul", copy, constant(1, np.float32))
        gate = add("Cast", add("Mul", add("Sigmoid", same), add("Sigmoid", same)), to=TensorProto.FLOAT)
        x = add("Add", add("Tanh", gate), x)
    made[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "y")]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], initializer=constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main(program, sizes):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        print("| nodes | left | seconds | µs a node |\n|---|---|---|---|")
        for nodes in sizes:
            model, out, report = folder / "model.onnx", folder / "out.onnx", folder / "report.json"
            model.write_bytes(chain(nodes).SerializeToString())
            command = [program, model, "-o", out, "--no-verify", "-q"]
            times = []
            for _ in range(3):
                start = time.perf_counter()
                subprocess.run(command, check=True)
                times.append(time.perf_counter() - start)
            subprocess.run([*command, "--report", report], check=True)
            told = json.loads(report.read_text())
            print(f"| {nodes} | {told['output']['nodes']} | {min(times):.3f} | {min(times) / nodes * 1e6:.1f} |")
        dear = sorted(told["passes"], key=lambda p: -p["seconds"])[:10]
        print("\n| pass | seconds | changes |\n|---|---|---|")
        for line in dear:
            print(f"| {line['name']} | {line['seconds']:.3f} | {line['changes']} |")


if __name__ == "__main__":
    main(sys.argv[1], [int(text) for text in sys.argv[2:]] or [100, 1_000, 10_000, 50_000])
