"""Runs models for a parent process. Started by path: EXTENSION PACKAGES COMMAND..., see `_host.py`."""

import importlib.util
import os
import signal
import sys


def main() -> int:
    """Loads the extension beside this file and serves the parent until it hangs up."""
    extension, packages, *command = sys.argv[1:]
    # The parent decides what an interrupt means; while a model runs, Python would not even notice one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spec = importlib.util.spec_from_file_location("onnx_lathe._native", extension)
    if spec is None or spec.loader is None:
        raise ImportError(f"`{extension}` is no extension of this Python")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    found = packages.split(os.pathsep) if packages else []
    native.set_host([sys.executable], os.path.dirname(extension), found, sys.executable)
    return int(native.run(["optimize", *command]))


if __name__ == "__main__":
    sys.exit(main())
