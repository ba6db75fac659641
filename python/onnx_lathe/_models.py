"""The forms that a model may have, and the file that the program reads and writes."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    import torch

    Model = str | os.PathLike[str] | bytes | onnx.ModelProto | onnx_ir.Model | torch.onnx.ONNXProgram
else:
    Model = Any

# Protobuf ends at 2 GiB; weights beyond this go beside the model.
LARGEST_INLINE = 1_900_000_000


class Given:
    """A model as it was given: its file, and how a file becomes a model of the same form."""

    def __init__(self, path: Path, load: Callable[[Path], Any], is_file: bool) -> None:
        """``is_file`` says whether ``path`` is the caller's own file."""
        self.path = path
        self.load = load
        self.is_file = is_file


def put(model: Model, folder: Path) -> Given:
    """The file of a model, written to ``folder`` unless it is a file already."""
    if isinstance(model, (str, os.PathLike)):
        return Given(Path(os.fsdecode(model)), lambda path: path, is_file=True)
    path = folder / "model.onnx"
    if isinstance(model, (bytes, bytearray, memoryview)):
        path.write_bytes(model)
        return Given(path, _bytes, is_file=False)
    # A module that was not imported cannot have made the model.
    onnx = sys.modules.get("onnx")
    if onnx is not None and isinstance(model, onnx.ModelProto):
        _save_proto(model, path)
        return Given(path, onnx.load_model, is_file=False)
    ir = sys.modules.get("onnx_ir")
    if ir is not None and isinstance(model, ir.Model):
        _save_ir(model, path)
        return Given(path, _load_ir, is_file=False)
    program = getattr(sys.modules.get("torch.onnx"), "ONNXProgram", None)
    if program is not None and isinstance(model, program):
        _save_ir(model.model, path)
        return Given(path, lambda path: _with_model(model, _load_ir(path)), is_file=False)
    expected = "a path, bytes, onnx.ModelProto, onnx_ir.Model or torch.onnx.ONNXProgram"
    raise TypeError(f"a model is {expected}, not {type(model).__module__}.{type(model).__qualname__}")


def _bytes(path: Path) -> bytes:
    if data_of(path).exists():
        raise ValueError("the result has external data, which bytes cannot hold; give an output path and read that")
    return path.read_bytes()


def data_of(path: Path) -> Path:
    """Where the external data of a model at ``path`` is, if it has any."""
    return path.with_name(path.name + ".data")


def _save_proto(model: onnx.ModelProto, path: Path) -> None:
    import onnx

    try:
        size = model.ByteSize()
    except Exception:  # Too large to be counted, in the words of whichever protobuf is installed.
        size = LARGEST_INLINE + 1
    if 0 <= size <= LARGEST_INLINE:
        path.write_bytes(model.SerializeToString())
        return
    # Saving with external data edits the model.
    own = onnx.ModelProto()
    own.CopyFrom(model)
    onnx.save_model(own, path, save_as_external_data=True, location=data_of(path).name)


def _save_ir(model: onnx_ir.Model, path: Path) -> None:
    import onnx_ir

    weights = (value.const_value for value in model.graph.initializers.values())
    size = sum(weight.nbytes for weight in weights if weight is not None)
    data = data_of(path).name if size > LARGEST_INLINE // 2 else None
    onnx_ir.save(model, path, external_data=data)


def _load_ir(path: Path) -> onnx_ir.Model:
    import onnx_ir

    # In memory, because the file may go before the model does.
    return onnx_ir.external_data.load_to_model(onnx_ir.load(path))


def _with_model(program: Any, model: onnx_ir.Model) -> Any:
    own = copy.copy(program)
    own.model = model
    return own
