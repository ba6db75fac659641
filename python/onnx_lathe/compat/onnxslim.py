"""A stand-in for ``onnxslim``: ``from onnx_lathe.compat.onnxslim import slim``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

import onnx_lathe
from onnx_lathe import UsageError
from onnx_lathe.compat import _edits

# The passes that do what onnxslim calls by these names.
OPTIMIZATIONS = {
    "constant_folding": ["fold-constants", "fold-index-arithmetic"],
    "graph_fusion": [
        "fuse-layer-norm", "fuse-rms-norm", "fuse-gelu", "fuse-hard-swish", "fold-batch-norm", "fold-scale",
        "fold-bias", "fuse-gemm", "fold-pads", "fuse-attention", "fuse-skip-norm",
    ],
    "dead_node_elimination": ["drop-identities", "drop-neutral", "drop-noop-layout", "drop-broadcasts"],
    "subexpression_elimination": ["merge-duplicates"],
    "weight_tying": ["share-initializers"],
}  # fmt: skip

# Arguments that can only have their default.
DEFAULTS: dict[str, Any] = {
    "inputs": None,
    "no_shape_infer": False,
    "dtype": None,
    "skip_fusion_patterns": None,
    "dump_to_disk": False,
}


def slim(
    model: str | onnx.ModelProto | list[str | onnx.ModelProto],
    output_model: str | None = None,
    *,
    model_check: bool = False,
    input_shapes: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    no_shape_infer: bool = False,
    skip_optimizations: Sequence[str] | None = None,
    dtype: str | None = None,
    skip_fusion_patterns: Sequence[str] | None = None,
    size_threshold: int | None = None,
    inspect: bool = False,
    dump_to_disk: bool = False,
    save_as_external_data: bool = False,
    model_check_inputs: Sequence[str] | None = None,
    verbose: bool = False,
) -> onnx.ModelProto | None:
    """Slims a model. Returns it, or ``None`` if it was written to ``output_model``; a list of models is described.

    Differences from onnxslim 0.1: a result always runs beside the original (``model_check`` is always on), and one that
    differs raises :class:`onnx_lathe.Refused` where onnxslim returned ``None``. Folding does not enlarge the file
    unless ``size_threshold`` says by how many bytes.
    """
    given = dict(locals())
    _edits.refuse("onnxslim", {name: given[name] for name in DEFAULTS}, DEFAULTS)
    if inspect or isinstance(model, list):
        for one in model if isinstance(model, list) else [model]:
            print(onnx_lathe.inspect(one, progress=False))
        return None
    own = _edits.load(model)
    if input_shapes:
        shapes = input_shapes if isinstance(input_shapes, Mapping) else _edits.numbers(input_shapes)
        _edits.set_input_shapes(own, shapes)
    skip = [name for optimization in skip_optimizations or () for name in _passes(optimization)]
    validate, shape = _checked(model_check_inputs or ())
    result = onnx_lathe.optimize(
        own,
        output_model,
        skip=skip or None,
        outputs=outputs or None,
        max_growth=size_threshold or None,
        external_data="always" if save_as_external_data else None,
        validate=validate,
        input_shape=shape,
        progress=False,
    )
    if verbose or output_model is not None:
        print(result)
    return None if output_model is not None else result.model


def _passes(optimization: str) -> list[str]:
    if optimization not in OPTIMIZATIONS:
        raise UsageError(f"there is no optimization `{optimization}`; onnxslim has {', '.join(OPTIMIZATIONS)}")
    return OPTIMIZATIONS[optimization]


def _checked(texts: Sequence[str]) -> tuple[list[dict[str, Any]] | None, dict[str, list[int]] | None]:
    """``NAME:data.npy`` for all inputs as a run, or ``NAME:1,3,224,224`` as shapes of random inputs."""
    files = [text for text in texts if text.endswith(".npy")]
    if not files:
        return None, _edits.numbers(texts) or None
    if len(files) < len(texts):
        raise UsageError("`model_check_inputs` mixes files and shapes, expected one or the other for all inputs")
    import numpy as np

    pairs = (text.partition(":") for text in files)
    return [{name: np.load(file, allow_pickle=False) for name, _, file in pairs}], None
