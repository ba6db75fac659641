"""A stand-in for ``onnxsim``: ``from onnx_lathe.compat.onnxsim import simplify``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import onnx

import onnx_lathe
from onnx_lathe import Refused, UsageError, _native
from onnx_lathe.compat import _edits

# What is left of the program when onnxsim's optimizer is turned off.
FOLDING = ("freeze-initializers", "hoist-constants", "inline-if", "fold-constants", "drop-dead")

# Arguments that can only have their default.
DEFAULTS: dict[str, Any] = {
    "skipped_optimizers": None,
    "skip_shape_inference": False,
    "custom_lib": None,
    "mutable_initializer": False,
    "initializers_as_constants": True,
    "extra_optimizers": None,
    "custom_rewriter": None,
    "function_rewrite_rules": None,
    "check_atol": 1e-5,
    "input_fill": "random",
    "gemm_fusion_backend": "ort_cpu",
    "profile": None,
    "ort_profile": None,
    "merge_ort_profile": False,
    "external_data_threshold": "100MB",
}

PROVIDERS = {name: ours for name, ours, _ in _native.providers()}


def simplify(
    model: str | onnx.ModelProto,
    check_n: int = 0,
    perform_optimization: bool = True,
    skip_fuse_bn: bool = False,
    overwrite_input_shapes: Mapping[str | None, Sequence[int]] | None = None,
    test_input_shapes: Mapping[str, Sequence[int]] | None = None,
    skipped_optimizers: Sequence[str] | None = None,
    skip_constant_folding: bool = False,
    skip_shape_inference: bool = False,
    input_data: Mapping[str, Any] | None = None,
    dynamic_input_shape: bool = False,
    custom_lib: str | None = None,
    include_subgraph: bool = False,
    unused_output: Sequence[str] | None = None,
    tensor_size_threshold: str | None = None,
    mutable_initializer: bool = False,
    *,
    initializers_as_constants: bool = True,
    inline_functions: bool = False,
    import_custom_schemas: bool = True,
    input_shapes: Mapping[str | None, Sequence[int]] | None = None,
    target_opset_version: int | None = None,
    extra_optimizers: Sequence[str] | None = None,
    custom_rewriter: Any = None,
    function_rewrite_rules: Any = None,
    check_rtol: float = 1e-4,
    check_atol: float = 1e-5,
    input_fill: str = "random",
    providers: Sequence[Any] | None = None,
    gemm_fusion_backend: Literal["ort_cpu"] = "ort_cpu",
    profile: str | None = None,
    ort_profile: str | None = None,
    merge_ort_profile: bool = False,
    output_path: str | None = None,
    external_data_threshold: str = "100MB",
) -> tuple[onnx.ModelProto, bool]:
    """Simplifies a model. Returns it and whether it computes the same as the original.

    Differences from onnxsim 0.8: a result always runs beside the original, on ``check_n`` sets of random inputs besides
    if that is given, and is given back only if it agrees; otherwise the original is, with ``False``. Subgraphs are
    always simplified and custom operators always kept. Folding does not enlarge the file unless
    ``tensor_size_threshold`` says by how much (``"512MB"``). ``check_rtol`` bounds the relative L2 error of an output.
    """
    given = dict(locals())
    _edits.refuse("onnxsim", {name: given[name] for name in DEFAULTS}, DEFAULTS)
    if dynamic_input_shape:
        warnings.warn("dynamic_input_shape is not needed and changes nothing", DeprecationWarning, stacklevel=2)
    own = _edits.load(model)
    fixed = dict(overwrite_input_shapes or input_shapes or {})
    if fixed:
        _edits.set_input_shapes(own, fixed)
    if unused_output:
        _edits.drop_outputs(own, unused_output)
    run: dict[str, Any] = {"ep": _provider(providers)}
    shapes = None if input_data is not None else test_input_shapes
    options: dict[str, Any] = {
        "skip": _skipped(skip_fuse_bn, skip_constant_folding, inline_functions),
        "passes": None if perform_optimization else FOLDING,
        "max_growth": tensor_size_threshold,
        "opset": target_opset_version,
        "validate": None if input_data is None else [input_data],
        "input_shape": shapes,
    }
    try:
        result = onnx_lathe.optimize(own, output_path, progress=False, **options, **run)
    except Refused:
        return own, False
    checks = (
        onnx_lathe.verify(own, result.model, seed=seed, rtol=check_rtol, input_shape=shapes, progress=False, **run)
        for seed in range(1, check_n + 1)
    )
    return result.model, all(check.passed for check in checks)


def _skipped(skip_fuse_bn: bool, skip_constant_folding: bool, inline_functions: bool) -> list[str]:
    passes = [("fold-batch-norm", skip_fuse_bn), ("fold-constants", skip_constant_folding)]
    passes.append(("inline-functions", not inline_functions))
    return [name for name, skipped in passes if skipped]


def _provider(providers: Sequence[Any] | None) -> str | None:
    """The first provider; that the CPU may take over is so here anyway."""
    if not providers:
        return None
    first = providers[0]
    if not isinstance(first, str):
        raise UsageError("options of `providers` have no counterpart in onnx_lathe; name the provider alone")
    if first not in PROVIDERS:
        raise UsageError(f"`{first}` has no counterpart in onnx_lathe; it knows {', '.join(PROVIDERS)}")
    return PROVIDERS[first]
