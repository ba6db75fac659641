"""What the program starts for ``--on ray``, as a module or by the path of this folder."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

# Seconds in which a cluster is let go.
PARTING = 1.0

# What Linux calls it, in `prctl.h`: PR_SET_CHILD_SUBREAPER.
SUBREAPER = 36


def package() -> ModuleType:
    """The package that this file is in. By path its parent is not imported, which needs the extension."""
    if __package__:
        return importlib.import_module(__package__)
    folder = os.path.dirname(os.path.abspath(__file__))
    name = "onnx_lathe_distributed"
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"`{folder}` is no package")
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def serve_ray(arguments: argparse.Namespace) -> int:
    """Says where tasks for a cluster are taken, and takes them until standard input ends."""
    # Whatever prints, only one line is for the program.
    answer = os.dup(1)
    os.dup2(2, 1)
    adopt()
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: ended.put(1))
    identity = (arguments.version, arguments.engine) if arguments.version and arguments.engine else None
    distributed = package()
    cluster = distributed.Ray(
        arguments.address,
        arguments.jobs,
        arguments.cpus,
        arguments.gpus,
        arguments.store,
        worker=arguments.worker,
        ort=arguments.ort,
        timeout=arguments.timeout,
        identity=identity,
    )

    def hang_up() -> None:
        while os.read(0, 4096):
            pass
        ended.put(0)

    def work() -> None:
        try:
            server = distributed.Server(cluster)
            line = f"{server.port} {server.token} {cluster.workers}\n"
        except BaseException as error:
            print(distributed.sentence(error), file=sys.stderr, flush=True)
            ended.put(1)
            return
        os.write(answer, line.encode())
        os.close(answer)
        server.serve_forever()

    for target in (hang_up, work):
        threading.Thread(target=target, daemon=True).start()
    code = ended.get()
    # A cluster that was started here ends with everything else that was; of one that others use, only the actors do.
    if not below(os.getpid()):
        parting = threading.Thread(target=cluster.close, daemon=True)
        parting.start()
        parting.join(PARTING)
    end_all()
    return code


def adopt() -> None:
    """Makes this process the parent of those that lose theirs, where the system has that: so none is overlooked."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def end_all() -> None:
    """Ends all processes that were started from here, none of which starts another one meanwhile."""
    known: list[int] = []
    while new := [process for process in below(os.getpid()) if process not in known]:
        known += new
        for process in new:
            with suppress(OSError):
                os.kill(process, signal.SIGSTOP)
    # Those that were started first come last: Ray ends this process when it misses them.
    for process in reversed(known):
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)


def below(process: int) -> list[int]:
    """The processes that one has started, and those that these have, where the system tells."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return [one for child in found for one in (child, *below(child))]


def main(arguments: Sequence[str] | None = None) -> int:
    """What the program starts for ``--on ray``."""
    parser = argparse.ArgumentParser(prog="onnx_lathe.distributed", description=main.__doc__)
    ray = parser.add_subparsers(required=True).add_parser("serve-ray", description=serve_ray.__doc__)
    ray.set_defaults(call=serve_ray)
    ray.add_argument("--address", help="the cluster; without it that of this machine, or a new one")
    ray.add_argument("--jobs", type=int, help="workers; without it as many as there is room for")
    ray.add_argument("--cpus", type=float, default=1, help="processors of a worker")
    ray.add_argument("--gpus", type=float, default=0, help="graphics processors of a worker")
    ray.add_argument("--store", help="a folder that all machines share")
    ray.add_argument("--worker", help="an `optimize` that serves where it exists")
    ray.add_argument("--ort", help="the ONNX Runtime library of the workers")
    ray.add_argument("--timeout", type=float, default=600, help="seconds that a worker may say nothing")
    ray.add_argument("--version", help="the version that workers have to be of")
    ray.add_argument("--engine", help="the engine that workers have to have")
    found = parser.parse_args(arguments)
    return int(found.call(found))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Threads that wait for a cluster keep nobody here.
    os._exit(code)
