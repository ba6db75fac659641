"""Tasks for an executor of ``concurrent.futures``."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Executor as Pool
from concurrent.futures import Future
from weakref import WeakSet

from ._process import TIMEOUT, Start, Worker, absolute

# The workers of a thread by executor, which end with it; and all of them, to be called off.
_mine = threading.local()
_all: WeakSet[Worker] = WeakSet()


def perform(start: Start, task: bytes) -> bytes:
    """Carries out a task by the worker process that this thread has for itself."""
    workers: dict[str, Worker] = _mine.__dict__.setdefault("workers", {})
    worker = workers.get(start.owner)
    if worker is None or worker.closed:
        worker = workers[start.owner] = Worker(start)
        _all.add(worker)
    return worker.perform(task)


class Futures:
    """Has tasks carried out by an executor of ``concurrent.futures``, or one that is like those: dask's, or MPI's.

    Each of its threads or processes has a worker process for itself.
    """

    def __init__(
        self,
        executor: Pool,
        workers: int,
        *,
        worker: str | os.PathLike[str] | None = None,
        ort: str | os.PathLike[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        """``workers`` is how many tasks the executor carries out at a time.

        ``worker`` is an ``optimize`` that serves where it exists, ``ort`` the ONNX Runtime library; ``timeout`` is as that
        of :func:`onnx_lathe.optimize`.
        """
        self.workers = workers
        self._executor = executor
        self._start = Start(absolute(worker), absolute(ort), crowd=workers, timeout=timeout)
        self._lock = threading.Lock()
        self._pending: set[Future[bytes]] = set()

    def map(self, tasks: list[bytes]) -> list[bytes]:
        """The outcomes, in the order of the tasks."""
        with self._lock:
            self._start = self._start.like_here()
            futures = [self._executor.submit(perform, self._start, task) for task in tasks]
            self._pending.update(futures)
        try:
            return [future.result() for future in futures]
        finally:
            with self._lock:
                self._pending.difference_update(futures)

    def cancel(self) -> None:
        """Calls off what is being done: nobody waits for it any more."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            future.cancel()
        if pending:
            self.close()

    def close(self) -> None:
        """Ends the worker processes of this process's threads; otherwise they end with the threads."""
        for worker in list(_all):
            if worker.start.owner == self._start.owner:
                worker.close()
