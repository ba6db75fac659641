"""A pass of Olive: `{"type": "OnnxLathe", "size": 0.5, "calib": "calib.npz"}` in the passes of a workflow.

Olive finds passes in a package configuration, and the one that is named replaces its own. So write a merged one first:

    python -m onnx_lathe.olive --config olive.json
    olive run --config workflow.json --package-config olive.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Optional

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

import onnx_lathe
from onnx_lathe import _native
from onnx_lathe._models import data_of

# Options of `onnx_lathe.optimize` that a workflow can give: type, and what they are.
OPTIONS: dict[str, tuple[Any, str]] = {
    "calib": (str, "Calibration set: a .npz, a folder of .npz or .npy files, or test_data_set_* folders."),
    "validate": (str, "What the result is compared on; without it the last quarter of the calibration set."),
    "labels": (str, "The array of the sets that holds labels."),
    "batch": (int, "Samples run at a time where the model leaves the choice."),
    "dtype": (str, "Compute in float16 or bfloat16 wherever that is allowed; with :io inputs and outputs change too."),
    "kv_cache": (str, "Keep the caches of GroupQueryAttention as int8 or int4; :tensor for one scale."),
    "rtol": (float, "The largest relative L2 error of an output under dtype or kv_cache."),
    "size": (float, "Share of the file's bytes to keep."),
    "params": (float, "Share of the parameters to keep."),
    "flops": (float, "Share of the floating-point operations to keep."),
    "latency": (float, "Share of the measured latency to keep."),
    "max_drop": (float, "The largest drop of the metric on held-out samples."),
    "minimize": (str, "What becomes as little as max_drop allows where no share is given."),
    "metric": (str, "What is measured on held-out samples."),
    "thorough": (bool, "Ask every lossy method, even where rounding alone loses next to nothing."),
    "allow_slower": (bool, "Where latency is not limited, take the plan that loses least even if it is slower."),
    "auto": (bool, "Try the recipes that the model suggests and write the best that max_drop allows."),
    "time": (str, "Time after which auto starts no other recipe: 10m."),
    "passes": (list[str], "Run only these passes."),
    "skip": (list[str], "Do not run these passes."),
    "set": (dict[str, Any], 'Options of passes: {"prune-units.attention": 3}.'),
    "target": (str, "`ort` lets the result use com.microsoft operators."),
    "opset": (int, "Upgrade to this operator set first."),
    "fix_dim": (dict[str, int], "Sizes of open dimensions: a name, or INPUT[AXIS]."),
    "outputs": (list[str], "The outputs of the result; any value that the model computes may be one."),
    "rename": (dict[str, str], "New names of inputs and outputs."),
    "max_growth": (str, "Let folding enlarge the model by this much."),
    "external_data": (str, "`always` puts weights beside the model."),
    "no_verify": (bool, "Write the result without running it."),
    "input_shape": (dict[str, list[int]], "Shapes of inputs in runs."),
    "threads": (int, "Threads of a run."),
    "seed": (int, "Seed of random inputs."),
}

# Olive's names of execution providers, and the program's. The CPU is what runs without a name; a phone is not here to run on.
PROVIDERS = {name: ours for name, ours, elsewhere in _native.providers() if ours != "cpu" and not elsewhere}


class OnnxLathe(Pass):
    """Optimizes an ONNX model with onnx-lathe, exactly or within a budget, and proves the result."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            name: PassConfigParam(type_=Optional[type_], default_value=None, description=description)
            for name, (type_, description) in OPTIONS.items()
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        output = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        output.parent.mkdir(parents=True, exist_ok=True)
        given = {name: getattr(config, name) for name in OPTIONS}
        provider = PROVIDERS.get(str(self.accelerator_spec.execution_provider))
        result = onnx_lathe.optimize(model.model_path, output, ep=provider, progress=False, **given)
        output.with_name(output.stem + ".report.json").write_text(json.dumps(result.report, indent=2))
        if data_of(output).exists():
            return ONNXModelHandler(model_path=str(output.parent), onnx_file_name=output.name)
        return ONNXModelHandler(model_path=str(output))


def package_config() -> dict[str, Any]:
    """Olive's own package configuration with this pass in it."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    every = ["*"]
    config["passes"]["OnnxLathe"] = {
        "module_path": f"onnx_lathe.olive.{OnnxLathe.__name__}",
        "supported_providers": every,
        "supported_accelerators": every,
        "supported_precisions": every,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    return config


def main() -> None:
    """Writes the package configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m onnx_lathe.olive", description="Make Olive know the pass OnnxLathe."
    )
    parser.add_argument("--config", required=True, help="where the package configuration of Olive goes")
    path = Path(parser.parse_args().config)
    path.write_text(json.dumps(package_config(), indent=2) + "\n")


if __name__ == "__main__":
    main()
