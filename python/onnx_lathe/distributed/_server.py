"""Takes the tasks of a program on this machine, and hands them to whoever carries them out."""

from __future__ import annotations

import hmac
import secrets
import socketserver
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ._process import sentence


class Executor(Protocol):
    """Whoever carries out tasks, in any order and at a time; each may be carried out more than once."""

    workers: int
    """How many tasks are carried out at a time."""

    def map(self, tasks: list[bytes]) -> Iterable[bytes]:
        """The outcomes, in the order of the tasks."""


class Server(socketserver.ThreadingTCPServer):
    """Takes batches of tasks on this machine from whoever knows the token, and answers with their outcomes."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.token = secrets.token_hex(16)
        super().__init__(("127.0.0.1", 0), _Batch)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has hung up: nobody waits for the outcomes."""


class _Batch(socketserver.StreamRequestHandler):
    """A connection: the token, a count and tasks with their lengths; then as much about their outcomes, or an error."""

    server: Server

    def handle(self) -> None:
        said = self.rfile.readline(100)
        if not hmac.compare_digest(said, self.server.token.encode() + b"\n"):
            return
        tasks = [self._read(self._number("<Q")) for _ in range(self._number("<I"))]
        try:
            outcomes = list(self.server.executor.map(tasks))
            if len(outcomes) != len(tasks):
                raise RuntimeError(f"{len(tasks)} tasks have {len(outcomes)} outcomes")
        except Exception as error:
            said = sentence(error).encode()
            self.wfile.write(struct.pack("<BQ", 1, len(said)) + said)
            return
        self.wfile.write(struct.pack("<BI", 0, len(outcomes)))
        for outcome in outcomes:
            self.wfile.write(struct.pack("<Q", len(outcome)))
            self.wfile.write(outcome)

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._read(struct.calcsize(form)))[0])

    def _read(self, count: int) -> bytes:
        found = self.rfile.read(count)
        if len(found) < count:
            raise EOFError
        return found


@contextmanager
def served(executor: Executor) -> Iterator[str]:
    """What ``--on`` is told so that the tasks of a call come here."""
    workers = executor.workers
    with Server(executor) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.port}/{server.token}/{workers}"
        except BaseException:
            # Nobody waits any more for what is being done.
            getattr(executor, "cancel", lambda: None)()
            raise
        finally:
            server.shutdown()
