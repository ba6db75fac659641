"""What the functions of this package give back."""

from __future__ import annotations

import html
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from onnx_lathe import _native
from onnx_lathe._models import data_of


class Answer:
    """What a command found out.

    Attributes:
        report: The JSON of the command as Python objects; its names are stable.
        notes: What was odd, one sentence each.
    """

    def __init__(self, report: Any, text: str, notes: list[str]) -> None:
        self.report = report
        self.notes = notes
        self._text = text

    def __str__(self) -> str:
        """What the command prints."""
        return self._text.rstrip("\n")

    def __repr__(self) -> str:
        return f"<onnx_lathe.{type(self).__name__}>\n{self}"


class Comparison(Answer):
    """What :func:`onnx_lathe.verify` measured; true if the second model does.

    Attributes:
        passed: Whether the two compute the same, or the second keeps to ``max_drop``.
        reason: Why not, in one sentence.
    """

    def __init__(self, report: Any, text: str, notes: list[str], reason: str | None) -> None:
        super().__init__(report, text, notes)
        self.passed = reason is None
        self.reason = reason

    def __bool__(self) -> bool:
        return self.passed


class Result(Answer):
    """A model that was written, and the report about it.

    Attributes:
        path: The file of the result; ``None`` after a dry run. Without an output path it lies in a temporary folder
            that goes with this object.
        passed: Whether it ran beside the original and kept to the bound; false only where nothing was compared.
    """

    def __init__(
        self,
        page: str | None,
        report: Any,
        text: str,
        notes: list[str],
        path: Path | None,
        load: Callable[[Path], Any],
        folder: TemporaryDirectory[str] | None,
    ) -> None:
        super().__init__(report, text, notes)
        verify = report["verify"]
        self.path = path
        self.passed = bool(verify and verify["passed"])
        self._page = page
        self._load = load
        self._folder = folder
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The result in the form in which the model was given: a path, bytes, or an object of the same class."""
        if self.path is None:
            raise ValueError("a dry run has no result")
        if self._model is None:
            self._model = self._load(self.path)
        return self._model

    def save(self, path: str | Path) -> Path:
        """Copies the result, and its external data if it has any, to ``path``."""
        if self.path is None:
            raise ValueError("a dry run has no result")
        path = Path(path)
        data = data_of(self.path)
        if data.exists() and path.name != self.path.name:
            raise ValueError(f"the model names its data file `{data.name}`, so it must be called `{self.path.name}`")
        if data.exists():
            shutil.copyfile(data, data_of(path))
        shutil.copyfile(self.path, path)
        return path

    def html(self) -> str:
        """The report as one HTML page that needs nothing else; samplers have none."""
        if self._page is None:
            raise ValueError("the report of a sampler has no page")
        return _native.html(self._page)

    def _repr_html_(self) -> str:
        if self._page is None:
            return f"<pre>{html.escape(str(self))}</pre>"
        # In a frame of its own: the page's style must not reach the notebook, nor the notebook's the page.
        return f'<iframe srcdoc="{html.escape(self.html())}" style="width: 100%; height: 40em; border: 0"></iframe>'
