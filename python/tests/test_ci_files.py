"""The action for GitHub and the hook for pre-commit: their steps are run as a runner would."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import onnx_lathe
import pytest
from conftest import REPOSITORY

posix = pytest.mark.skipif(os.name != "posix", reason="the steps are those of a POSIX shell")


def step(file: str, name: str) -> str:
    """The script of a step, taken out of the YAML by its indentation."""
    after = (REPOSITORY / file).read_text().split(f"- name: {name}\n")[1]
    lines = after.split("run: |\n")[1].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    kept = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        kept.append(line)
    return textwrap.dedent("\n".join(kept))


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the runner of an action gives it, with the program on the path."""
    program = tmp_path / "programs" / "optimize"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnx_lathe "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("RUNNER_TEMP", str(tmp_path))
    return tmp_path


def run_action(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    given = {"MODEL": "", "OUTPUT": "", "AGAINST": "", "OPTIONS": "", **inputs}
    script = step("action.yml", "Run")
    shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    return subprocess.run(shell, cwd=folder, env={**os.environ, **given}, capture_output=True, text=True)


@posix
def test_the_action_optimizes_and_says_so(runner: Path, transformer: Path) -> None:
    done = run_action(runner, MODEL=str(transformer), OUTPUT="out.onnx", OPTIONS="--skip fuse-layer-norm")
    assert done.returncode == 0, done.stderr
    assert onnx_lathe.verify(transformer, runner / "out.onnx")
    assert "nodes" in (runner / "GITHUB_STEP_SUMMARY").read_text()
    report = (runner / "GITHUB_OUTPUT").read_text().removeprefix("report=").strip()
    assert '"verify"' in Path(report).read_text()


@posix
def test_the_action_fails_where_a_candidate_computes_something_else(runner: Path, classifier: Path, tmp_path: Path) -> None:
    same = run_action(runner, MODEL=str(classifier), AGAINST=str(classifier))
    assert same.returncode == 0, same.stderr
    other = tmp_path / "other.onnx"
    import onnx
    from onnx import numpy_helper

    model = onnx.load(classifier)
    weight = numpy_helper.to_array(model.graph.initializer[0]) * 1.01
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, other)
    drifted = run_action(runner, MODEL=str(other), AGAINST=str(classifier))
    assert drifted.returncode == 3, drifted.stdout + drifted.stderr
    assert "`w` float[64, 256]: by 1.00e-2 of its norm" in (runner / "GITHUB_STEP_SUMMARY").read_text()


def hook(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    entry = next(line for line in (REPOSITORY / ".pre-commit-hooks.yaml").read_text().splitlines() if "entry:" in line)
    words = entry.split("entry:")[1].split()
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:], *map(str, arguments)], capture_output=True, text=True)


def test_the_hook_optimizes_once(transformer: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(transformer, model)
    first = hook(model)
    assert (first.returncode, first.stdout.strip()) == (1, f"optimized {model}"), first.stderr
    assert onnx_lathe.verify(transformer, model)
    written = model.read_bytes()
    again = hook(model)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert model.read_bytes() == written and sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_the_hook_says_what_it_cannot_read(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    done = hook(model)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert model.read_bytes() == b"no model"
