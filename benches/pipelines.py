"""The Python package beside what is too heavy for ./test: PyTorch, diffusers, Olive, Optimum, all light models.

    python benches/pipelines.py torch       # the examples, with a real ONNXProgram
    python benches/pipelines.py olive       # a workflow of olive-ai 0.13.0 with the pass OnnxLathe
    python benches/pipelines.py optimum     # optimum-cli 2.3.0 with python/optimum installed
    python benches/pipelines.py light       # the stand-ins of onnxsim and onnxslim on the light models of onnx
    python benches/pipelines.py wheel FILE  # fresh environments with and without the extra `cpu`

Run it with the interpreter of an environment that has onnx-lathe and what the line names.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = REPOSITORY / "fixtures"


def run(*command: object, **options: object) -> str:
    """Runs a command and returns what it printed; ends with its words if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def program(name: str) -> str:
    """A program beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def torch_examples(folder: Path) -> None:
    """Runs both examples."""
    for example in ("torch_export.py", "denoiser.py"):
        start = time.monotonic()
        output = run(sys.executable, REPOSITORY / "examples" / example, "--output", folder / "out.onnx")
        print(f"{example}: {time.monotonic() - start:.0f} s")
        print("  " + "\n  ".join(output.strip().splitlines()[-3:]))


def olive(folder: Path) -> None:
    """Runs a workflow and verifies what came out of it."""
    import numpy as np
    import onnx_lathe

    run(sys.executable, "-m", "onnx_lathe.olive", "--config", folder / "olive.json")
    random = np.random.default_rng(0)
    np.savez(folder / "calib.npz", hidden=random.standard_normal((32, 6, 32)).astype(np.float32))
    model = FIXTURES / "transformer.onnx"
    budget = {"size": 0.6, "calib": str(folder / "calib.npz"), "metric": "rel-l2"}
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(model)},
        "passes": {"exact": {"type": "OnnxLathe", "target": "ort"}, "lossy": {"type": "OnnxLathe", **budget}},
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
        "log_severity_level": 2,
    }
    (folder / "workflow.json").write_text(json.dumps(workflow))
    start = time.monotonic()
    run(program("olive"), "run", "--config", folder / "workflow.json", "--package-config", folder / "olive.json")
    print(f"olive run: {time.monotonic() - start:.0f} s")
    written = sorted((folder / "out").rglob("*.onnx"))
    print(f"  {model.stat().st_size:,} bytes before, {written[0].stat().st_size:,} after")
    found = onnx_lathe.verify(model, written[0], validate=folder / "calib.npz", metric="rel-l2", max_drop=0.1)
    print("  " + str(found).splitlines()[0])
    assert found and written[0].stat().st_size <= 0.6 * model.stat().st_size


def optimum(folder: Path) -> None:
    """Optimizes a folder as an export leaves it."""
    exported = folder / "exported"
    exported.mkdir()
    shutil.copyfile(FIXTURES / "transformer.onnx", exported / "model.onnx")
    (exported / "config.json").write_text("{}")
    print(
        run(program("optimum-cli"), "onnx-lathe", exported, folder / "out", "--target", "ort").strip().splitlines()[-1]
    )
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["config.json", "model.onnx"]


def light(folder: Path) -> None:
    """The documented calls on every light model of the onnx package."""
    import onnx
    from onnx_lathe.compat import onnxsim, onnxslim

    for path in sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx")):
        model = onnx.load(path)
        start = time.monotonic()
        simple, check = onnxsim.simplify(model, tensor_size_threshold="600MB")
        slim = onnxslim.slim(model, size_threshold=600 << 20)
        assert check and slim is not None
        counts = [len(one.graph.node) for one in (model, simple, slim)]
        print(
            f"{path.stem}: {counts[0]} nodes, simplify {counts[1]}, slim {counts[2]}, {time.monotonic() - start:.0f} s"
        )


README = 'import onnx_lathe; print(onnx_lathe.optimize("model.onnx", "out.onnx"))'


def wheel(folder: Path, file: Path) -> None:
    """Installs a wheel into fresh environments and runs the command and the module."""
    for extra in ("", "[cpu]"):
        environment = folder / f"with{extra}"
        run(sys.executable, "-m", "venv", environment)
        run(environment / "bin" / "pip", "install", "--quiet", f"{file}{extra}")
        shutil.copyfile(FIXTURES / "transformer.onnx", folder / "model.onnx")
        # Nothing of this environment, so that only what the extra brought can be found.
        outside = {"PATH": f"{environment / 'bin'}", "HOME": str(folder), "LANG": os.environ.get("LANG", "C.UTF-8")}
        for command in (["optimize", "model.onnx", "-o", "out.onnx"], ["python", "-c", README]):
            program_path = environment / "bin" / command[0]
            said = run(program_path, *command[1:], cwd=folder, env=outside)
            line = next(line for line in said.splitlines() if "verified" in line)
            print(f"{file.name}{extra}: {command[0]}: {line.strip()}")


def main() -> None:
    """Runs what the command line names in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["torch", "olive", "optimum", "light", "wheel"])
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "wheel":
            wheel(folder, args.file.resolve())
        else:
            {"torch": torch_examples, "olive": olive, "optimum": optimum, "light": light}[args.what](folder)


if __name__ == "__main__":
    main()
