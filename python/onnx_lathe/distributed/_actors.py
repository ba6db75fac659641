"""Actors of a Ray cluster, each with a worker process of its own."""

from __future__ import annotations

import os
import platform
import queue
import re
import socket
import tempfile
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._process import CALLED_OFF, RETRIES, Start, Worker, sentence

# Seconds in which all actors have to be there: a cluster that others fill would be waited for without a word.
PATIENCE = 120.0

# Seconds after which one looks whether an actor is still there.
LOOK = 10.0

# Names of instructions for arithmetic, on processors of Intel and AMD and on those of Arm.
ARITHMETIC = re.compile("sse|ssse|avx|fma|f16c|amx|asimd|sve|sme|i8mm|bf16|fphp")


class Actor:
    """One worker of a cluster: keeps one process and never runs a model itself."""

    def __init__(self, start: Start) -> None:
        self.worker = Worker(start)

    def ready(self, store: str | None, sign: str) -> tuple[str, str]:
        """Starts the process; the name of this machine and what results depend on there. A store has to be usable."""
        self.worker.identity()
        if store is not None and (why := cannot_use(store, sign)):
            raise RuntimeError(why)
        return socket.gethostname(), processor()

    def perform(self, task: bytes) -> bytes:
        return self.worker.perform(task)

    def is_there(self) -> None:
        """Answers while a task is carried out."""


def cannot_use(store: str, sign: str) -> str | None:
    """Why this machine cannot use the store in which the driver has left a sign."""
    where = f"the store `{store}`"
    with suppress(OSError):
        if not os.path.exists(os.path.join(store, sign)):
            return f"{where} is another folder on {socket.gethostname()}, and has to be one that all machines share"
    try:
        with tempfile.TemporaryFile(dir=store) as file:
            file.write(b"x")
    except OSError as why:
        return f"{where} cannot be written on {socket.gethostname()}: {why.strerror}"
    return None


def processor() -> str:
    """What the last bits of results depend on: the instructions for arithmetic that this machine has."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    features = {one for one in (found[1].split() if found else []) if ARITHMETIC.match(one)}
    return " ".join([platform.machine(), *sorted(features)])


class Actors:
    """Actors, each of which has one task at a time: tasks that wait can still go to whoever is done first."""

    def __init__(self, ray: Any, count: int, start: Start, options: dict[str, float]) -> None:
        """Starts them; ``options`` are the processors that each takes."""
        self.ray = ray
        self.start = start
        self.options = {"max_restarts": 4, "max_task_retries": 4, "max_concurrency": 2, **options}
        self.lock = threading.Lock()
        self.all = [self._new() for _ in range(count)]
        self.free: queue.Queue[Any] = queue.Queue()
        for actor in self.all:
            self.free.put(actor)
        self.lost: list[Any] = []
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="tasks")
        self.batches = 0
        self.closed = False

    def _new(self) -> Any:
        return self.ray.remote(Actor).options(**self.options).remote(self.start)

    def check(self, store: str | None, sign: str) -> None:
        """Waits until each has a worker process of the right version, sees the store, and is like the others."""
        waiting = [actor.ready.remote(store, sign) for actor in self.all]
        ready, late = self.ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE)
        try:
            machines = {processor: machine for machine, processor in self.ray.get(ready)}
        except self.ray.exceptions.RayError as error:
            raise RuntimeError(sentence(error)) from None
        if late:
            few = f"{len(late)} of {len(waiting)} workers are not there after {PATIENCE:g} s"
            raise RuntimeError(f"{few}: is the cluster busy?")
        if len(machines) > 1:
            two = " and ".join(sorted(machines.values())[:2])
            raise RuntimeError(f"{two} have processors of different kinds, whose results differ in their last bits")

    def map(self, tasks: list[bytes]) -> list[bytes]:
        """The outcomes, in the order of the tasks."""
        with self.lock:
            self.batches += 1
        try:
            return list(self.threads.map(self._one, tasks))
        except (CancelledError, RuntimeError):
            if self.closed:
                raise RuntimeError(CALLED_OFF) from None
            raise
        finally:
            with self.lock:
                self.batches -= 1

    def _one(self, task: bytes) -> bytes:
        said = ""
        for _ in range(1 + RETRIES):
            actor = self.free.get()
            if actor is None:
                # For whoever waits as well.
                self.free.put(None)
                raise RuntimeError("every worker is lost")
            try:
                outcome = self._wait(actor, actor.perform.remote(task))
            except self.ray.exceptions.RayActorError as error:
                said = sentence(error)
                self._replace(actor, error)
            except self.ray.exceptions.RayError as error:
                self.free.put(actor)
                raise RuntimeError(sentence(error)) from None
            else:
                self.free.put(actor)
                return outcome
        raise RuntimeError(f"the workers of a task were lost {1 + RETRIES} times: {said}")

    def _wait(self, actor: Any, outcome: Any) -> bytes:
        """The outcome of a task. An actor that Ray has no place for any more would be waited for without end."""
        while not self.ray.wait([outcome], timeout=LOOK)[0]:
            if not self.closed and not self.ray.wait([actor.is_there.remote()], timeout=2 * LOOK)[0]:
                self.lost.append(actor)
                self.ray.kill(actor)
        return bytes(self.ray.get(outcome))

    def _replace(self, actor: Any, error: Exception) -> None:
        """Sees to it that there is somebody for the next task in the place of an actor that failed."""
        if isinstance(error, self.ray.exceptions.ActorUnavailableError):
            self.free.put(actor)
            return
        with self.lock:
            if self.closed:
                return
            self.all.remove(actor)
            if actor not in self.lost:
                # It was started again as often as one is, and may have met what was wrong with its machine.
                self.all.append(self._new())
                self.free.put(self.all[-1])
            elif not self.all:
                self.free.put(None)

    def close(self) -> None:
        """Ends them, and whoever waits for an outcome."""
        with self.lock:
            self.closed = True
            for actor in self.all:
                with suppress(Exception):
                    self.ray.kill(actor)
            self.free.put(None)
        # Ray would start a cluster for whoever asked it for something afterwards.
        self.threads.shutdown(cancel_futures=True)
