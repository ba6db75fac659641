"""A hook for pre-commit: models are optimized in place.

    python -m onnx_lathe.hook [OPTIONS] MODEL.onnx ...

Options before the models are those of ``optimize``. The hook fails where it changed a model, as formatters do, and where one
cannot be optimized; a model of which nothing can be removed is left as it is, to the byte.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_lathe


def optimized(path: Path, options: list[str]) -> bool:
    """Whether the model was replaced by a smaller one."""
    with TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder) / path.name
        command = [sys.executable, "-m", "onnx_lathe", str(path), "-o", str(out), "--quiet", *options]
        if subprocess.run(command).returncode:
            raise SystemExit(1)
        before, after = (onnx_lathe.inspect(model).report["model"] for model in (path, out))
        if (after["nodes"], after["parameters"]) >= (before["nodes"], before["parameters"]):
            return False
        # The weights first: a model never stands beside those of another.
        for made in sorted(Path(folder).iterdir(), key=lambda made: made == out):
            os.replace(made, path.with_name(made.name))
        return True


def main(arguments: list[str]) -> int:
    """Optimizes the models that are named; 1 where one was changed."""
    models = [Path(argument) for argument in arguments if argument.endswith(".onnx")]
    options = [argument for argument in arguments if not argument.endswith(".onnx")]
    changed = [path for path in models if optimized(path, options)]
    for path in changed:
        print(f"optimized {path}")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
