"""The program in Rust: command lines in, JSON out."""

from collections.abc import Callable, Sequence
from os import PathLike

__version__: str

class Error(Exception):
    """Nothing was written: the base of all errors of onnx_lathe."""

class InputError(Error):
    """The model, a set or the machine is at fault (exit code 1)."""

class UsageError(Error):
    """Arguments that do not go together (exit code 2)."""

class Refused(Error):
    """The result was computed and turned down (exit code 3)."""

class RuntimeMissing(InputError):
    """The ONNX Runtime library that was asked for is not to be had (exit code 1)."""

def set_host(
    worker: Sequence[str], folder: str | PathLike[str], packages: Sequence[str], python: str | PathLike[str]
) -> None:
    """Tells the program where it is."""

def run(arguments: Sequence[str]) -> int:
    """Runs the program as the command line does, and returns its exit code."""

def call(
    arguments: Sequence[str], hear: Callable[[int, int, str], object] | None = None
) -> tuple[str, str, list[str], str | None]:
    """Carries out a command line. Returns its JSON, its text, its notes, and why its answer does not do, if so."""

def html(report: str) -> str:
    """The HTML page of a report in JSON."""

def providers() -> list[tuple[str, str, bool]]:
    """Every execution provider: ONNX Runtime's name, the program's, and whether its devices are seldom this machine's."""
