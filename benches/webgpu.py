"""Where the WebGPU provider runs models, before and after `optimize`, and whether it computes what the CPU does.

    VENV/bin/python benches/webgpu.py OPTIMIZE MODEL.onnx ... [--equal N] [--targets portable,ort,float16]

The Python needs onnxruntime and onnxruntime-ep-webgpu; the machine a Vulkan device, which may be software: SwiftShader (./test
says how), or for float16, which that lacks, Mesa's lavapipe from version 25 on (VK_ICD_FILENAMES names its lvp_icd.json; that of
version 22 is refused). The target `float16` is `--dtype float16` without a budget, held against the float32 original on the CPU.
For every model: nodes that ONNX Runtime's session leaves to the CPU (its own assignment, recorded while it is made), of the
model and of what `optimize` makes of it. Of the first N models `optimize verify --ep webgpu --against cpu` too. Markdown.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime as ort
import onnxruntime_ep_webgpu as plugin

ort.set_default_logger_severity(4)
ort.register_execution_provider_library("webgpu", plugin.get_library_path())
# Half precision rounds to 2^-11 at every node.
HALF = ["--rtol", "1e-2"]
DEVICES = [device for device in ort.get_ep_devices() if device.ep_name == plugin.get_ep_name()]


def left(path: Path) -> tuple[int, collections.Counter]:
    """Nodes of the session, and how many of each operator are not on the provider."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices(DEVICES[:1], {})
    session = ort.InferenceSession(str(path), options)
    nodes, others = 0, collections.Counter()
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            nodes += 1
            if part.ep_name != plugin.get_ep_name():
                others[node.op_type] += 1
    return nodes, others


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ORT_DYLIB_PATH": str(Path(ort.__file__).parent / "capi")}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=1800)


def equal(program: str, before: Path, after: Path, bound: list[str]) -> str:
    found = run(program, "verify", str(before), str(after), "--ep", "webgpu", "--against", "cpu", "--json", *bound)
    if not found.stdout:
        return found.stderr.strip().splitlines()[-1][:160] if found.stderr else "nothing was said"
    verdict = json.loads(found.stdout)
    return f"{verdict['after']:.1e}{'' if verdict['passed'] else ' **beyond its bound**'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--equal", type=int, default=0)
    parser.add_argument("--targets", default="portable")
    arguments = parser.parse_args()
    if not DEVICES:
        sys.exit("there is no Vulkan device")
    targets = arguments.targets.split(",")
    columns = [f"{target}: {what}" for target in targets for what in ("nodes", "left", "error beside the CPU")]
    print("| model | nodes | left | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    sums = collections.defaultdict(int)
    for index, model in enumerate(arguments.models):
        try:
            nodes, others = left(model)
        except Exception as error:
            print(f"| {model.stem} | not loaded: {str(error).splitlines()[0][:100]} |", flush=True)
            continue
        row = [model.stem, str(nodes), str(others.total())]
        sums["models"] += 1
        sums["before"] += others.total()
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.onnx"
                how = ["--dtype", "float16"] if target == "float16" else ["--target", target]
                made = run(arguments.program, str(model), "-o", str(out), *how, "--ep", "webgpu", "--no-verify")
                if made.returncode:
                    row += ["", "", made.stderr.strip().splitlines()[-1][:120]]
                    continue
                try:
                    nodes, after = left(out)
                except Exception as error:
                    row += ["", "", f"not loaded: {str(error).splitlines()[0][:100]}"]
                    continue
                row += [str(nodes), str(after.total())]
                row.append(equal(arguments.program, model, out, HALF if target == "float16" else []) if index < arguments.equal else "–")
                sums[f"after, {target}"] += after.total()
                sums[f"more after, {target}"] += after.total() > others.total()
        print("| " + " | ".join(row) + " |", flush=True)
    print("\n" + ", ".join(f"{name}: {value}" for name, value in sums.items()))


if __name__ == "__main__":
    main()
