"""A command of Optimum: `optimum-cli onnx-lathe FOLDER OUT --size 0.5 --calib calib.npz`.

What follows the folders are options of `optimize`. The distribution in `python/optimum` of the repository registers it.
"""

from __future__ import annotations

import shutil
import sys
from argparse import REMAINDER, ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from onnx_lathe import _native
from onnx_lathe._models import data_of


class OptimizeCommand(BaseOptimumCLICommand):
    """Optimizes every ONNX model of a folder that Optimum exported, and copies what is beside them."""

    COMMAND = CommandInfo(name="onnx-lathe", help="Optimize exported ONNX models with onnx-lathe.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the arguments of the command."""
        parser.add_argument("folder", type=Path, help="the folder that optimum-cli export onnx wrote")
        parser.add_argument("output", type=Path, help="where the optimized models and the other files go")
        parser.add_argument("options", nargs=REMAINDER, help="options of `optimize`")

    def run(self) -> None:
        """Optimizes model by model; ends with the exit code of the first that fails."""
        folder, output = self.args.folder, self.args.output
        models = sorted(folder.rglob("*.onnx"))
        if not models:
            sys.exit(f"error: there is no ONNX model in `{folder}`")
        if output.resolve() == folder.resolve():
            sys.exit("error: the output is the folder itself; give another one")
        data = {data for model in models for data in (data_of(model), model.with_name(model.name + "_data"))}
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file not in models and file not in data:
                target = output / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        for model in models:
            target = output / model.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            code = _native.run(["optimize", str(model), "-o", str(target), *self.args.options])
            if code != 0:
                sys.exit(code)
