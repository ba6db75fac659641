"""What the tests share: models of `fixtures/`, and a folder to work in."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "fixtures"


@pytest.fixture
def transformer() -> Path:
    """A model of two transformer blocks, 212 nodes, that passes make smaller."""
    return FIXTURES / "transformer.onnx"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """Two layers with weights that can lose precision, and ten classes."""
    random = np.random.default_rng(0)
    weights = {
        "w": (random.standard_normal((64, 256)) / 8).astype(np.float32),
        "b": np.zeros(256, np.float32),
        "v": (random.standard_normal((256, 10)) / 16).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "v"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path / "classifier.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def samples(count: int, seed: int = 0) -> np.ndarray:
    """Inputs of the classifier."""
    return np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)
