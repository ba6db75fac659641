"""Makes `optimum-cli onnx-lathe` known. The folders have no `__init__.py`: they are parts of Optimum's namespace."""

from onnx_lathe.optimum import OptimizeCommand

REGISTER_COMMANDS = [OptimizeCommand]
