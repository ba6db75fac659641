"""Arrays as calibration and validation sets."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, "np.typing.ArrayLike"]
    Samples = str | os.PathLike[str] | Arrays | Iterable[Arrays]
else:
    Samples = Any


def put(samples: Samples | None, path: Path, ndims: Callable[[], Mapping[str, int | None]]) -> str | None:
    """What the program is told: a path as it is; arrays as the archive ``path``, with ``.npz`` appended.

    A mapping holds all samples along the first axis. Anything else is one mapping per sample or per batch, batches
    being what a session would be fed; they are written as they come, so that a generator may give more than memory
    holds. ``ndims`` tells how many axes the inputs of the model have.
    """
    if samples is None:
        return None
    if isinstance(samples, (str, os.PathLike)):
        return os.fsdecode(samples)
    whole = isinstance(samples, Mapping)
    columns: dict[str, _Column] = {}
    try:
        for index, run in enumerate([samples] if whole else samples):
            if not isinstance(run, Mapping):
                raise TypeError(
                    f"run {index} of the set is {type(run).__name__}, expected a mapping of names to arrays"
                )
            if index > 0 and set(run) != set(columns):
                raise ValueError(f"run {index} of the set has {sorted(run)}, the first has {sorted(columns)}")
            for name, array in run.items():
                if name not in columns:
                    columns[name] = _Column(name)
                columns[name].add(array)
        if not columns:
            raise ValueError("the set is empty")
        path = path.with_suffix(".npz")
        batched = not whole and _batched(columns, ndims())
        with zipfile.ZipFile(path, "w") as archive:
            for column in columns.values():
                column.store(archive, column.shapes[0] if whole else column.joined(batched))
    finally:
        for column in columns.values():
            column.file.close()
    return str(path)


def _batched(columns: Mapping[str, _Column], ndims: Mapping[str, int | None]) -> bool:
    """Whether runs have the axes of the inputs, the batch among them: those are joined, and samples stacked."""
    known = [(len(columns[name].shapes[0]), ndim) for name, ndim in ndims.items() if name in columns and ndim]
    return bool(known) and all(own == ndim for own, ndim in known)


class _Column:
    """The arrays of one input, appended to a file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.file: IO[bytes] = TemporaryFile()
        self.shapes: list[tuple[int, ...]] = []
        self.dtype: np.dtype[Any] | None = None

    def add(self, array: np.typing.ArrayLike) -> None:
        import numpy as np

        array = np.asarray(array, order="C")
        if array.dtype == object:
            raise TypeError(f"`{self.name}` holds Python objects, expected numbers, booleans or text")
        if array.dtype != (self.dtype or array.dtype):
            raise TypeError(f"`{self.name}` is {array.dtype} in run {len(self.shapes)} and {self.dtype} before")
        self.dtype = array.dtype
        self.shapes.append(array.shape)
        self.file.write(array.tobytes())

    def joined(self, batched: bool) -> tuple[int, ...]:
        """The shape of all runs, along the first axis that they have or along a new one."""
        first = self.shapes[0]
        open_axes = 1 if batched and first else 0
        for index, shape in enumerate(self.shapes):
            if len(shape) != len(first) or shape[open_axes:] != first[open_axes:]:
                raise ValueError(f"`{self.name}` is {list(shape)} in run {index} and {list(first)} in the first")
        return (sum(shape[0] for shape in self.shapes), *first[1:]) if open_axes else (len(self.shapes), *first)

    def store(self, archive: zipfile.ZipFile, shape: tuple[int, ...]) -> None:
        import numpy as np

        assert self.dtype is not None
        descr = np.lib.format.dtype_to_descr(self.dtype)
        with archive.open(f"{self.name}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, {"descr": descr, "fortran_order": False, "shape": shape})
            self.file.seek(0)
            shutil.copyfileobj(self.file, entry, 1 << 20)
