"""Tasks for a Ray cluster."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ._actors import Actors
from ._process import TIMEOUT, Start, absolute


class Ray:
    """Has tasks carried out by a Ray cluster, one actor a worker.

    The cluster is found or started with the first task, and the actors stay until :meth:`close`, so that several calls find
    models loaded.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        store: str | os.PathLike[str] | None = None,
        *,
        worker: str | os.PathLike[str] | None = None,
        ort: str | os.PathLike[str] | None = None,
        timeout: float = TIMEOUT,
        identity: tuple[str, str] | None = None,
    ) -> None:
        """Says which cluster, and what of it.

        Args:
            address: The cluster; ``None`` takes the one of this machine or of ``RAY_ADDRESS``, and starts one otherwise.
            workers: How many actors; ``None`` takes as many as there is room for.
            cpus: Processors of an actor. Give the program as many threads.
            gpus: Graphics processors of an actor.
            store: A folder that all machines share, for results that are kept and for temporary models.
            worker: An ``optimize`` that serves where it exists; elsewhere the package onnx_lathe does.
            ort: The ONNX Runtime library of the workers.
            timeout: Seconds after which a worker that says nothing is ended.
            identity: The version and the engine that workers must have; those of a worker of this machine unless told.
        """
        self.address = address
        self.cpus = cpus
        self.gpus = gpus
        self.store = absolute(store)
        self._workers = workers
        self._start = Start(absolute(worker), absolute(ort), identity, timeout=timeout)
        self._lock = threading.Lock()
        self._ray: Any = None
        self._own = False
        self._actors: Actors | None = None

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def workers(self) -> int:
        """How many tasks are carried out at a time."""
        return len(self._opened().all)

    def open(self) -> None:
        """Finds or starts the cluster and waits for the actors; an error says in one sentence what does not do."""
        self._opened()

    def _opened(self) -> Actors:
        with self._lock:
            if self._actors is None:
                try:
                    self._attach()
                    self._hire()
                except BaseException:
                    self._let_go()
                    raise
            assert self._actors is not None
            return self._actors

    def _attach(self) -> None:
        try:
            # Tells nobody about the user, unless told to.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            import ray
        except ImportError:
            raise RuntimeError("--on ray needs Ray: pip install onnx_lathe[ray]") from None
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        # Machines need not have this package: they may have the program.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__package__])

    def _room(self) -> int:
        """How many actors the cluster has room for."""

        def fits(resources: dict[str, float]) -> int:
            needs = (("CPU", self.cpus), ("GPU", self.gpus))
            return int(min(resources.get(name, 0) // need for name, need in needs if need > 0))

        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(map(fits, nodes))
        wanted = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        if room == 0:
            most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
            has = f"{most['CPU']:g} CPU and {most['GPU']:g} GPU"
            raise RuntimeError(f"no machine of the cluster has {wanted} for a worker: the largest has {has}")
        if self._workers is not None and self._workers > room:
            has = f"room for {room} workers of {wanted}"
            raise RuntimeError(f"the cluster has {has}, and {self._workers} are asked for")
        self._start = replace(self._start, crowd=min(self._workers or room, max(map(fits, nodes))))
        return self._workers or room

    def _hire(self) -> None:
        count = self._room()
        self._start = self._start.like_here()
        with _signed(self.store) as sign:
            self._actors = Actors(self._ray, count, self._start, {"num_cpus": self.cpus, "num_gpus": self.gpus})
            self._actors.check(self.store, sign)

    def map(self, tasks: list[bytes]) -> list[bytes]:
        """The outcomes, in the order of the tasks."""
        return self._opened().map(tasks)

    def cancel(self) -> None:
        """Calls off what is being done; the next task starts the actors again."""
        if self._actors is not None and self._actors.batches:
            self.close()

    def close(self) -> None:
        """Ends the actors, and the cluster if it was started for them."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        actors, self._actors = self._actors, None
        if actors is not None:
            actors.close()
        if self._own:
            self._ray.shutdown()
        self._own = False


@contextmanager
def _signed(store: str | None) -> Iterator[str]:
    """A file in the store by which other machines know that it is the same folder."""
    sign = f".seen-by-{socket.gethostname()}-{secrets.token_hex(4)}"
    if store is None:
        yield sign
        return
    path = Path(store, sign)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as why:
        raise RuntimeError(f"the store `{store}` cannot be used: {why.strerror}") from None
    try:
        yield sign
    finally:
        path.unlink(missing_ok=True)
