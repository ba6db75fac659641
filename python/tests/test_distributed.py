"""Tasks that other processes carry out, without Ray: `benches/ray.py` has what needs a cluster."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import onnx_lathe
import pytest
from onnx_lathe.distributed import Futures, Ray, served

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the worker of these tests is a script")

FRAME = "<4sQQ"

# Answers every request with its payload, after two frames that come before answers. A payload says what else to do.
WORKER = """#!{python}
import json, os, struct, sys, time
read, write = sys.stdin.buffer.read, sys.stdout.buffer.write
def say(header, payload=b""):
    text = json.dumps(header, separators=(",", ":")).encode()
    write(struct.pack("<4sQQ", b"LWF1", len(text), len(payload)) + text + payload)
    sys.stdout.flush()
while start := read(20):
    _, header, payload = struct.unpack("<4sQQ", start)
    header, payload = json.loads(read(header)), read(payload)
    if header == "Hello":
        say({{"Hello": {{"name": "an engine", "providers": [], "version": "{version}"}}}})
        continue
    say({{"Stage": "working"}})
    say({{"Progress": {{"done": 1, "total": 2, "unit": "samples"}}}})
    what, _, name = payload.decode().partition(" ")
    if what == "die" or what == "once" and not os.path.exists(name):
        open(name, "a").write("x")
        print("out of luck", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if what == "sleep":
        open(name, "w").write(str(os.getpid()))
        time.sleep(60)
    if what == "print":
        write(b"a library says hello to the world")
    say({{"Ran": [os.getpid(), sys.argv[1:]]}}, payload)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    return script(tmp_path / "worker", "1")


def script(path: Path, version: str) -> Path:
    path.write_text(WORKER.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


def task(payload: str) -> bytes:
    header = b'{"Run":{}}'
    return struct.pack(FRAME, b"LWF1", len(header), len(payload)) + header + payload.encode()


def frames(outcome: bytes) -> list[tuple[dict, bytes]]:
    found = []
    while outcome:
        magic, header, payload = struct.unpack(FRAME, outcome[:20])
        assert magic == b"LWF1"
        content, outcome = outcome[20 : 20 + header + payload], outcome[20 + header + payload :]
        found.append((json.loads(content[:header]), content[header:]))
    return found


def answer(outcome: bytes) -> dict:
    return frames(outcome)[-1][0]


def gone(process: int) -> None:
    """Waits until a process is."""
    deadline = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(process, 0)
            time.sleep(0.01)


def send(address: str, token: str, tasks: list[bytes]) -> bytes:
    """What a server answers, as the program asks it."""
    host, port = address.split("/")[0].split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(token.encode() + b"\n" + struct.pack("<I", len(tasks)))
        for one in tasks:
            connection.sendall(struct.pack("<Q", len(one)) + one)
        with connection.makefile("rb") as answers:
            return answers.read()


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_each_thread_or_process_keeps_one_worker(pool: type[Executor], worker: Path) -> None:
    with pool(2) as executor:
        futures = Futures(executor, 2, worker=worker)
        outcomes = futures.map([task(f"number {at}") for at in range(8)])
        assert futures.workers == 2
    assert [frames(outcome)[-1][1] for outcome in outcomes] == [b"number %d" % at for at in range(8)]
    assert all([next(iter(header)) for header, _ in frames(o)] == ["Stage", "Progress", "Ran"] for o in outcomes)
    assert 1 <= len({answer(outcome)["Ran"][0] for outcome in outcomes}) <= 2
    for outcome in outcomes:
        gone(answer(outcome)["Ran"][0])
    serve, keep, *more = answer(outcomes[0])["Ran"][1]
    assert serve == "__serve" and int(keep) > 0 and not more


def test_a_task_whose_worker_dies_is_carried_out_again(worker: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        futures = Futures(executor, 1, worker=worker)
        again, always, after = futures.map([task(f"once {tmp_path}/a"), task(f"die {tmp_path}/b"), task("work")])
    assert "Ran" in answer(again) and (tmp_path / "a").read_text() == "x"
    assert answer(always) == {"Error": 'the runtime crashed (signal 9, SIGKILL); its last words were "out of luck"'}
    assert (tmp_path / "b").read_text() == "xxx" and "Ran" in answer(after)


def test_a_worker_that_says_nothing_is_ended(worker: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        futures = Futures(executor, 1, worker=worker, timeout=0.4)
        asleep, after = futures.map([task(f"sleep {tmp_path}/a"), task("work")])
    assert answer(asleep) == {"Error": "the runtime was stopped: it said nothing for 0.4 s"} and "Ran" in answer(after)


def test_a_library_that_prints_is_noticed(worker: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        (outcome,) = Futures(executor, 1, worker=worker).map([task("print")])
    assert answer(outcome) == {"Error": "the runtime sent something that is no message"}


def test_work_that_is_called_off_ends_at_once(worker: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        futures = Futures(executor, 1, worker=worker)
        started = tmp_path / "a"
        said: list[str] = []

        def ask() -> None:
            try:
                futures.map([task(f"sleep {started}"), task("work")])
            except BaseException as why:
                said.append(str(why))

        thread = threading.Thread(target=ask)
        thread.start()
        while not started.exists() or not started.read_text():
            time.sleep(0.01)
        futures.cancel()
        thread.join(timeout=5)
        assert said == ["the work was called off"]
        gone(int(started.read_text()))
        # What comes later is carried out.
        assert "Ran" in answer(futures.map([task("work")])[0])


def test_workers_are_of_one_version(tmp_path: Path) -> None:
    here = script(tmp_path / "worker", "1")
    with ThreadPoolExecutor(2) as executor:
        futures = Futures(executor, 2, worker=here)
        futures._start = futures._start.like_here()
        script(here, "2")
        with pytest.raises(RuntimeError, match=r"is of version 2, and 1 is expected$"):
            futures.map([task("work")])


def test_batches_go_to_whoever_knows_the_token(worker: Path) -> None:
    with ThreadPoolExecutor(2) as executor, served(Futures(executor, 2, worker=worker)) as address:
        assert address.startswith("127.0.0.1:") and address.endswith("/2")
        token = address.split("/")[1]
        assert send(address, "0" * len(token), [task("work")]) == b""
        found = send(address, token, [task("one"), task("two")])
        assert struct.unpack("<BI", found[:5]) == (0, 2)
        (length,) = struct.unpack("<Q", found[5:13])
        assert frames(found[13 : 13 + length])[-1][1] == b"one"
        assert frames(found[13 + length + 8 :])[-1][1] == b"two"
        assert send(address, token, []) == struct.pack("<BI", 0, 0)


class Broken:
    workers = 1

    def __init__(self, outcomes: list[bytes]) -> None:
        self.outcomes = outcomes

    def map(self, tasks: list[bytes]) -> list[bytes]:
        return self.outcomes or [][len(tasks)]


def test_an_executor_that_fails_says_why() -> None:
    for executor, sentence in ((Broken([]), b"list index out of range"), (Broken([b"x"]), b"2 tasks have 1 outcomes")):
        with served(executor) as address:
            found = send(address, address.split("/")[1], [b"", b""])
        assert found == struct.pack("<BQ", 1, len(sentence)) + sentence


def test_hanging_up_ends_nobody_else(worker: Path) -> None:
    with ThreadPoolExecutor(1) as executor, served(Futures(executor, 1, worker=worker)) as address:
        token = address.split("/")[1]
        with socket.create_connection(("127.0.0.1", int(address.split("/")[0].split(":")[1]))) as connection:
            connection.sendall(token.encode() + b"\n" + struct.pack("<IQ", 1, 1 << 60) + b"half of a task")
        assert send(address, token, [task("work")])[:1] == b"\0"


# As much of Ray as starts for ever.
ENDLESS = """
import time
def is_initialized():
    return False
def init(**options):
    print("this is not for the program", flush=True)
    open("started", "w").close()
    time.sleep(60)
"""


def serve_ray(folder: Path, ray: str) -> subprocess.Popen:
    """The process that the program starts, where this is all there is of Ray."""
    (folder / "ray.py").write_text(ray)
    command = [sys.executable, Path(onnx_lathe.__file__).parent / "distributed", "serve-ray"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(folder)}, text=True, **pipes)


def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    with serve_ray(tmp_path, "raise ImportError('no ray')") as process:
        assert process.wait(timeout=30) == 1
        assert process.communicate() == ("", "--on ray needs Ray: pip install onnx_lathe[ray]\n")


@pytest.mark.parametrize("ending", ["standard input ends", signal.SIGINT, signal.SIGTERM])
def test_a_cluster_is_not_waited_for(tmp_path: Path, ending: object) -> None:
    with serve_ray(tmp_path, ENDLESS) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        start = time.monotonic()
        if isinstance(ending, signal.Signals):
            process.send_signal(ending)
            process.wait(timeout=10)
        output, _ = process.communicate(timeout=10)
        assert time.monotonic() - start < 2 and output == ""


def test_graphics_processors_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(onnx_lathe.UsageError, match="gpus=1"):
        onnx_lathe.inspect(tmp_path / "none.onnx", ep="cuda", on=Ray())


def test_a_store_that_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(onnx_lathe.InputError, match=r"^the store `.*file` cannot be used: "):
        onnx_lathe.inspect(tmp_path / "none.onnx", store=tmp_path / "file", on=Broken([]))


class Heard(Futures):
    """Knows how many tasks there were."""

    tasks = 0

    def map(self, tasks: list[bytes]) -> list[bytes]:
        self.tasks += len(tasks)
        return super().map(tasks)


def test_a_budget_is_met_with_the_same_bytes(classifier: Path, tmp_path: Path) -> None:
    from conftest import samples

    def run(name: str, **options: object) -> bytes:
        where = {"store": tmp_path / name, "calib": {"x": samples(64)}}
        onnx_lathe.optimize(classifier, tmp_path / f"{name}.onnx", size=0.3, threads=1, **where, **options)
        return (tmp_path / f"{name}.onnx").read_bytes()

    with ThreadPoolExecutor(2) as threads:
        heard = Heard(threads, 2)
        assert run("a", on=heard) == run("b") == run("c", jobs=2) and heard.tasks > 0
    assert list((tmp_path / "a" / "scratch").iterdir()) == []
