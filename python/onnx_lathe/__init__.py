"""onnx-lathe: an ahead-of-time, training-free optimizer for ONNX models.

    import onnx_lathe

    result = onnx_lathe.optimize("model.onnx", "out.onnx")
    print(result)

Every function is a command of the `optimize` program: the same Rust code, the same names, the same report. A model is a
path, bytes, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a ``torch.onnx.ONNXProgram``, and the result has the same
form. Results run beside the original before they are given back. What cannot be done is an exception: :class:`Refused`,
:class:`InputError`, :class:`RuntimeMissing`, :class:`UsageError`, all of them :class:`Error`.
"""

from importlib import import_module
from typing import Any

from onnx_lathe import _host
from onnx_lathe._answers import Answer, Comparison, Result
from onnx_lathe._commands import bench, diff, inspect, optimize, passes, sampler, verify
from onnx_lathe._native import Error, InputError, Refused, RuntimeMissing, UsageError, __version__

_host.announce()


def __getattr__(name: str) -> Any:
    """Imports ``distributed`` when it is asked for: few calls need it."""
    if name == "distributed":
        return import_module("onnx_lathe.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Answer",
    "Comparison",
    "Error",
    "InputError",
    "Refused",
    "Result",
    "RuntimeMissing",
    "UsageError",
    "__version__",
    "bench",
    "diff",
    "inspect",
    "optimize",
    "passes",
    "sampler",
    "verify",
]
