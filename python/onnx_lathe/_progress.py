"""How far long work is: in a notebook cell, on a terminal, or told to a function."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

Progress = bool | Callable[[int, int, str], Any] | None

# Work that ends sooner shows nothing, and what is shown moves this often, in seconds.
PATIENCE = 2.0
PERIOD = 0.2


class Meter:
    """Shows the progress of one call, and takes it away at the end."""

    def __init__(self, what: str, progress: Progress) -> None:
        """``progress``: a function that is called with done, total and unit; ``None`` chooses; ``False`` is silent."""
        self.what = what
        self.show = None if callable(progress) or progress is False else _notebook() or _terminal()
        self.hear = progress if callable(progress) else self._draw if self.show else None
        self.next = time.monotonic() + PATIENCE
        self.shown = False

    def _draw(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if self.show is not None and now >= self.next:
            self.next = now + PERIOD
            self.shown = True
            self.show(self.what, done, total, unit)

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.show is not None and self.shown:
            self.show("", 0, 0, "")


def _terminal() -> Callable[[str, int, int, str], None] | None:
    if sys.stderr is None or not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int, unit: str) -> None:
        sys.stderr.write(f"\r\x1b[K{_line(what, done, total, unit)}")
        sys.stderr.flush()

    return show


def _notebook() -> Callable[[str, int, int, str], None] | None:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import HTML, display

    handle = None

    def show(what: str, done: int, total: int, unit: str) -> None:
        nonlocal handle
        bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        page = HTML(bar + html.escape(_line(what, done, total, unit)))
        if handle is None:
            handle = display(page, display_id=True)
        else:
            handle.update(page)

    return show


def _line(what: str, done: int, total: int, unit: str) -> str:
    if not what:
        return ""
    return f"{what}: {done} of {total} {unit}" if total else f"{what}: {done} {unit}"
