"""Worker processes: how they are started, asked and ended on whatever machine this is."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

# How a frame begins: these bytes, and the lengths of its header and of its payload. A compiled format cannot travel.
MAGIC = b"LWF1"
START = "<4sQQ"
SIZE = struct.calcsize(START)

# Frames that come before the answer begin like this.
ON_THE_WAY = (b'{"Stage"', b'{"Progress"')

# Times that a task is given out again whose worker died.
RETRIES = 2

# What waits for work that nobody wants any more is told this.
CALLED_OFF = "the work was called off"

# Seconds after which a worker that says nothing is ended, unless told.
TIMEOUT = 600.0


@dataclass(frozen=True)
class Start:
    """How worker processes are started, on whatever machine."""

    program: str | None = None
    """An ``optimize`` that serves where it exists; elsewhere the package of the machine's Python does."""
    library: str | None = None
    """The ONNX Runtime library, or its folder."""
    identity: tuple[str, str] | None = None
    """The version and the engine that every worker has to have."""
    crowd: int = 1
    """How many workers may be on one machine: they share its memory."""
    timeout: float = TIMEOUT
    """Seconds after which a worker that says nothing is ended."""
    folder: str = field(default_factory=os.getcwd)
    """Where relative paths begin."""
    owner: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells the workers of one executor from those of another."""

    def command(self) -> list[str]:
        """The command of a worker on this machine."""
        host = [self.program] if self.program and os.path.isfile(self.program) else _host()
        if host is None:
            program = f"neither `{self.program}` nor" if self.program else "no"
            raise RuntimeError(f"{socket.gethostname()} has {program} the package onnx_lathe, so it has no worker")
        keep = _memory() // 4 // max(1, self.crowd)
        return [*host, "__serve", str(keep), *([self.library] if self.library else [])]

    def like_here(self) -> Start:
        """The same; workers have to be as one is that is started here."""
        if self.identity is not None:
            return self
        with Worker(self) as worker:
            return replace(self, identity=worker.identity())


def _host() -> list[str] | None:
    """What starts a worker that the package of this Python is, found without importing it."""
    packages = os.pathsep.join(os.path.join(folder, "capi") for folder in _folders("onnxruntime"))
    for folder in _folders("onnx_lathe"):
        for extension in sorted(Path(folder).glob("_native*")):
            if extension.suffix in (".so", ".pyd"):
                return [sys.executable, "-I", "-S", os.path.join(folder, "_worker.py"), str(extension), packages]
    return None


def _folders(package: str) -> list[str]:
    """Where this Python has a package."""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        return list(spec.submodule_search_locations or []) if spec else []
    return []


def _memory() -> int:
    """The bytes of memory that this machine, or the container that this is, has."""
    found = [8 << 30]
    with suppress(AttributeError, ValueError, OSError):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()))
    return min(found)


class Dead(Exception):
    """A worker process ended, or was ended, before it answered."""


class Worker:
    """A process that runs models: started when it is first needed, and again after it died."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.process: subprocess.Popen[bytes] | None = None
        self.words: IO[bytes] | None = None
        self.heard = 0.0
        self.late = False
        self.closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def perform(self, task: bytes) -> bytes:
        """The outcome of a task. One whose process dies is carried out again by another one, but not for ever."""
        for _ in range(1 + RETRIES):
            try:
                self._open()
                return self._ask(task)
            except Dead as why:
                said = str(why)
                self._end()
            if self.closed:
                raise RuntimeError(CALLED_OFF)
            if self.late:
                break
        header = json.dumps({"Error": said}).encode()
        return struct.pack(START, MAGIC, len(header), 0) + header

    def identity(self) -> tuple[str, str]:
        """The version and the engine of the worker."""
        header = b'"Hello"'
        self._open()
        answer = json.loads(self._ask(struct.pack(START, MAGIC, len(header), 0) + header)[SIZE:])
        if "Hello" not in answer:
            raise RuntimeError(f"{socket.gethostname()}: {next(iter(answer.values()))}")
        return str(answer["Hello"].get("version", "")), str(answer["Hello"]["name"])

    def close(self) -> None:
        """Ends the process, and whoever waits for it."""
        self.closed = True
        self._end()

    def _open(self) -> None:
        if self.process is not None:
            return
        self.words = tempfile.TemporaryFile()
        folder = self.start.folder if os.path.isdir(self.start.folder) else None
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.words}
        process = subprocess.Popen(self.start.command(), cwd=folder, **pipes)
        self.process = process
        self.late = False
        self.heard = float("inf")
        threading.Thread(target=_watch, args=(weakref.ref(self), process), daemon=True).start()
        expected = self.start.identity
        if expected is not None and (found := self.identity()) != expected:
            self._end()
            where = f"the worker on {socket.gethostname()}"
            if found[0] != expected[0]:
                raise RuntimeError(f"{where} is of version {found[0]}, and {expected[0]} is expected")
            raise RuntimeError(f"{where} runs {found[1]}, and {expected[1]} is expected")

    def _ask(self, task: bytes) -> bytes:
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise Dead("the worker is gone")
        self.heard = time.monotonic()
        # Of one that is gone, reading says more.
        with suppress(OSError, ValueError):
            process.stdin.write(task)
            process.stdin.flush()
        frames = bytearray()
        while True:
            header = self._frame(process.stdout, frames)
            self.heard = time.monotonic()
            if not header.startswith(ON_THE_WAY):
                self.heard = float("inf")
                return bytes(frames)

    def _frame(self, stream: IO[bytes], frames: bytearray) -> bytes:
        """Moves a frame from the process to the others, and returns how its header begins."""
        start = self._read(stream, SIZE)
        magic, header, payload = struct.unpack(START, start)
        if magic != MAGIC:
            raise Dead("the runtime sent something that is no message")
        content = self._read(stream, header + payload)
        frames += start
        frames += content
        return content[: min(header, 16)]

    def _read(self, stream: IO[bytes], count: int) -> bytes:
        try:
            found = stream.read(count)
        except (OSError, ValueError):
            found = b""
        if len(found) < count:
            raise Dead(self._obituary())
        return found

    def _obituary(self) -> str:
        """Why the process is gone."""
        if self.late:
            return f"the runtime was stopped: it said nothing for {self.start.timeout:g} s"
        how = "ended"
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=2)
                how = f"ended with code {code}"
                if code < 0:
                    with suppress(ValueError):
                        how = f"crashed (signal {-code}, {signal.Signals(-code).name})"
        last = ""
        # It is closed under whoever waits for work that is called off.
        with suppress(OSError, ValueError):
            if words := self.words:
                words.seek(max(0, os.fstat(words.fileno()).st_size - 4096))
                lines = [line for line in words.read().decode(errors="replace").splitlines() if line.strip()]
                last = f'; its last words were "{lines[-1].strip()}"' if lines else ""
        return f"the runtime {how}{last}"

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()
        if self.words is not None:
            self.words.close()


def _watch(of: weakref.ref[Worker], process: subprocess.Popen[bytes]) -> None:
    """Ends a process that is at a task and says nothing. A worker that nobody needs any more is not kept by this."""
    while process.poll() is None and (worker := of()):
        timeout = worker.start.timeout
        if time.monotonic() - worker.heard > timeout:
            worker.late = True
            process.kill()
        del worker
        time.sleep(min(0.5, timeout / 4))


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """The path as other processes understand it."""
    return None if path is None else os.path.abspath(os.fsdecode(path))


def sentence(error: BaseException) -> str:
    """What an error says, without the stack of some other process."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(cause).__name__
