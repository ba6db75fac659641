"""The `optimize` command of the wheel."""

import sys

from onnx_lathe import _native


def main() -> None:
    """Runs the program on the arguments of this process."""
    sys.exit(_native.run(["optimize", *sys.argv[1:]]))
