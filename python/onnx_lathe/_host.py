"""Tells the extension which process it is part of: the program starts itself to run models, and here that is Python."""

import importlib.util
import os
import shutil
import sys

from onnx_lathe import _native


def packages() -> list[str]:
    """Folders in which this interpreter has ONNX Runtime's library, found without importing it."""
    try:
        spec = importlib.util.find_spec("onnxruntime")
    except ValueError:  # Somebody has put a module without a spec in its place.
        return []
    locations = (spec.submodule_search_locations or []) if spec else []
    return [os.path.join(location, "capi") for location in locations]


def announce() -> None:
    """Says so once, when the package is imported."""
    folder = os.path.dirname(os.path.abspath(__file__))
    # A program that embeds Python may not know its interpreter.
    python = sys.executable or shutil.which("python3") or "python3"
    found = packages()
    # By path and isolated: modules in the user's folder cannot get in the way.
    worker = [python, "-I", "-S", os.path.join(folder, "_worker.py"), _native.__file__, os.pathsep.join(found)]
    _native.set_host(worker, folder, found, python)
