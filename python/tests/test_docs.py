"""The documentation: what it tells to run runs, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_lathe
import pytest
from conftest import FIXTURES, REPOSITORY

BOOK = REPOSITORY / "docs" / "src"
PAGES = sorted(BOOK.glob("*.md"))
README = (REPOSITORY / "README.md").read_text()

FENCE = re.compile(r"^```(\w[^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(text: str) -> list[tuple[str, str]]:
    """Code blocks that are run: `sh` and `python`. Commands that install or train something are `console`."""
    return [(language, code) for language, code in FENCE.findall(text) if language in ("sh", "python")]


def python_of_the_readme() -> list[tuple[str, str]]:
    section = README.split("\n## Python\n")[1].split("\n## ")[0]
    return blocks(section)


@pytest.fixture
def workshop(tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of, and the program on the path."""
    for name, fixture in (("model.onnx", "transformer.onnx"), ("denoiser.onnx", "dit.onnx")):
        (tmp_path / name).write_bytes((FIXTURES / fixture).read_bytes())
    (tmp_path / "decoder.onnx").write_bytes((FIXTURES / "decoder.onnx").read_bytes())
    (tmp_path / "prompts.npz").write_bytes((FIXTURES / "sets" / "decoder.npz").read_bytes())
    (tmp_path / "candidate.onnx").write_bytes(classifier.read_bytes())
    random = np.random.default_rng(0)
    np.savez(tmp_path / "calib.npz", hidden=random.standard_normal((16, 6, 32)).astype(np.float32))
    x = random.standard_normal((64, 64)).astype(np.float32)
    np.savez(tmp_path / "labelled.npz", x=x, label=np.arange(64) % 10)
    (tmp_path / "scheduler_config.json").write_text(
        '{"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": false, "beta_start": 0.0001,'
        ' "beta_end": 0.02, "num_train_timesteps": 1000, "prediction_type": "epsilon"}'
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "optimize"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m onnx_lathe "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def run(language: str, code: str, folder: Path) -> None:
    shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    done = subprocess.run([*shell, code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(os.name != "posix", reason="the commands are those of a POSIX shell")
@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_what_a_page_tells_to_run_runs(page: str, workshop: Path) -> None:
    found = blocks((BOOK / page).read_text())
    # The chapter of passes is generated and has none; results are of models that take too long here.
    assert found or page in ("SUMMARY.md", "passes.md", "results.md")
    for language, code in found:
        run(language, code, workshop)


def test_the_readme_runs(workshop: Path) -> None:
    found = python_of_the_readme()
    assert found
    for language, code in found:
        run(language, code, workshop)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = (BOOK / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = BOOK / (name or page)
        assert linked.is_file(), f"{page} links {target}"
        assert not anchor or anchor in anchors(linked.read_text()), f"{page} links {target}"


def test_every_page_is_in_the_summary() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (BOOK / "SUMMARY.md").read_text())
    assert sorted(listed) == sorted(page.name for page in PAGES if page.name != "SUMMARY.md")


def test_the_chapter_of_passes_is_the_catalogue() -> None:
    command = [sys.executable, "-m", "onnx_lathe", "explain", "--markdown"]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (BOOK / "passes.md").read_text().endswith(made), "run `optimize explain --markdown` for docs/src/passes.md"


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:examples|docs|python|benches)/[\w./]+)`", page.read_text()):
            assert (REPOSITORY / name).exists(), f"{page.name} names {name}"
    workflow = (REPOSITORY / "docs" / "workflows" / "model-drift.yml").read_text()
    assert f"@v{onnx_lathe.__version__}" in workflow
