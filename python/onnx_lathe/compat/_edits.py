"""What the stand-ins need besides the program: small edits of a ``ModelProto``, and arguments without a counterpart."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx

from onnx_lathe import UsageError


def load(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """A model of the caller's own, to be edited."""
    if isinstance(model, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(model)
        return own
    return onnx.load_model(os.fspath(model))


def refuse(library: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises if an argument without a counterpart has another value than its default."""
    for name, value in given.items():
        if value != defaults[name] and value not in (None, [], ()):
            raise UsageError(f"`{name}` of {library} has no counterpart in onnx_lathe; leave it out")


def set_input_shapes(model: onnx.ModelProto, shapes: Mapping[Any, Sequence[int]]) -> None:
    """Fixes the shapes of inputs. The key ``None`` or an empty one is the only input. Inferred shapes are dropped."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in constants}
    for name, shape in shapes.items():
        if not name and len(inputs) == 1:
            value = next(iter(inputs.values()))
        elif name in inputs:
            value = inputs[name]
        else:
            raise UsageError(f"there is no input `{name or ''}`; the model has {', '.join(inputs)}")
        del value.type.tensor_type.shape.dim[:]
        for size in shape:
            value.type.tensor_type.shape.dim.add().dim_value = int(size)
    del model.graph.value_info[:]
    for value in model.graph.output:
        # They may say what is no longer so; the program states what it infers.
        value.type.tensor_type.ClearField("shape")


def drop_outputs(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Removes outputs of the graph."""
    present = {value.name for value in model.graph.output}
    for name in names:
        if name not in present:
            raise UsageError(f"there is no output `{name}`; the model has {', '.join(sorted(present))}")
    kept = [value for value in model.graph.output if value.name not in set(names)]
    if not kept:
        raise UsageError("no output would be left")
    del model.graph.output[:]
    model.graph.output.extend(kept)


def numbers(shapes: Iterable[str]) -> dict[str, list[int]]:
    """``NAME:1,3,224,224`` as a mapping."""
    found = {}
    for text in shapes:
        name, _, sizes = text.rpartition(":")
        try:
            found[name] = [int(size) for size in sizes.split(",")]
        except ValueError:
            raise UsageError(f"`{text}` is no shape, expected NAME:1,3,224,224") from None
    return found
