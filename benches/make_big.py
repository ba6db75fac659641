"""Makes a 2.4 GB model with external data, streamed to disk.

    make_big.py FOLDER [WIDTH]

FOLDER/big.onnx and FOLDER/big.onnx.data: 27 nodes, nine times MatMul, Add, Relu; distinct float weights of 8192 × 8192.
Never more than a slice of one weight is in memory. Needs numpy and onnx.
"""

import pathlib
import sys

import numpy as np
from onnx import TensorProto, helper

LAYERS = 9
PAGE = 4096
SLICE = 256


def main(folder, width):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    with open(folder / "big.onnx.data", "wb") as file:

        def store(name, dims, slices):
            file.write(bytes(-file.tell() % PAGE))
            start = file.tell()
            for part in slices:
                file.write(part.astype("<f4", copy=False).data)
            tensor = TensorProto(
                name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL
            )
            for key, text in (("location", "big.onnx.data"), ("offset", start), ("length", file.tell() - start)):
                tensor.external_data.add(key=key, value=str(text))
            weights.append(tensor)

        x = "x"
        for layer in range(LAYERS):
            scale = np.float32((2 / width) ** 0.5)
            rows = (rng.standard_normal((SLICE, width), dtype=np.float32) * scale for _ in range(width // SLICE))
            store(f"w{layer}", (width, width), rows)
            store(f"b{layer}", (width,), [rng.standard_normal(width, dtype=np.float32) * np.float32(0.01)])
            y = "y" if layer == LAYERS - 1 else f"r{layer}"
            nodes.append(helper.make_node("MatMul", [x, f"w{layer}"], [f"m{layer}"]))
            nodes.append(helper.make_node("Add", [f"m{layer}", f"b{layer}"], [f"a{layer}"]))
            nodes.append(helper.make_node("Relu", [f"a{layer}"], [y]))
            x = y
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "big", ends[:1], ends[1:], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "big.onnx").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8192)
