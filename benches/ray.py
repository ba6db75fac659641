"""Ray beside one machine: are the bytes the same whoever is killed, and what does it cost?

    pip install "ray>=2.49" onnxruntime==1.32.0
    cargo build --release
    python benches/ray.py target/release/optimize vit.onnx:calib.npz resnet.onnx:calib.npz --options "--size 0.3"

Every model comes with its calibration set. Runs `optimize` by itself, with `--jobs 2`, on Ray with one and two workers, with
two of which a worker process and an actor are killed in the middle, and with two after an interrupt; each in a store of its
own, which only the interrupted run and the one that takes it up have in common. Prints how long each took, how many tasks
there were and whether the result has the bytes of the first. Last comes the time that a task takes beyond its worker's.
The environment of this script needs no onnx_lathe: the workers are the program.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import pathlib
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "python" / "onnx_lathe"
# In the place of this script's folder, in which Ray is this script.
sys.path[0] = str(PACKAGE)
import distributed

del sys.path[0]


class Counted:
    """A cluster whose tasks are counted."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.workers = cluster.workers
        self.tasks = 0

    def map(self, tasks):
        self.tasks += len(tasks)
        return self.cluster.map(tasks)


def children(process):
    found = []
    for task in pathlib.Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def below(process):
    """All descendants of a process."""
    return [one for child in children(process) for one in (child, *below(child))]


def command_of(process):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def actors():
    """Actors of this process's cluster that have a worker process, with that."""
    found = []
    for process in below(os.getpid()):
        if command_of(process).startswith("ray::"):
            found += [(process, child) for child in children(process) if "__serve" in command_of(child)]
    return found


def kill_in_the_middle(process, after):
    """Kills a worker process, then an actor, while `process` runs; says which were there to be killed."""
    killed = []
    for at, what in ((1, "a worker process"), (0, "an actor")):
        time.sleep(after)
        found = actors()
        if process.poll() is None and found:
            os.kill(found[0][at], signal.SIGKILL)
            killed.append(what)
    return "killed: " + " and ".join(killed or ["nothing"])


class Case:
    """A model, its set and the options of the runs."""

    def __init__(self, a, model, folder):
        self.model, self.calib = model.split(":")
        self.optimize = str(a.optimize)
        self.options = shlex.split(a.options)
        self.folder = folder
        self.bytes = None

    def command(self, name, *more):
        out = self.folder / f"{name}.onnx"
        out.unlink(missing_ok=True)
        where = ["-o", str(out), "--store", str(self.folder / name)]
        return [self.optimize, self.model, "--calib", self.calib, *self.options, *where, *more]

    def same(self, name):
        """Whether a result has the bytes of the first run."""
        found = hashlib.blake2b((self.folder / f"{name}.onnx").read_bytes()).hexdigest()
        self.bytes = self.bytes or found
        return found == self.bytes

    def run(self, name, *more, meanwhile=None):
        """Seconds, whether the bytes are those of the first run, and what `meanwhile(process)` gave."""
        start = time.monotonic()
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(self.command(name, *more), text=True, **pipes) as process:
            found = meanwhile(process) if meanwhile else None
            said = process.communicate()[1]
        if process.returncode:
            sys.exit(f"{name}: exit code {process.returncode}\n{said}")
        return time.monotonic() - start, self.same(name), found


def on_cluster(case, cluster, name, meanwhile=None):
    counted = Counted(cluster)
    with distributed.served(counted) as address:
        seconds, same, found = case.run(name, "--on", address, meanwhile=meanwhile)
    return seconds, same, counted.tasks, found


def interrupted(case, cluster, after):
    """A run that is interrupted, and one that takes it up; how long the first one took to end."""
    counted = Counted(cluster)
    with distributed.served(counted) as address:
        command = case.command("resumed", "--on", address)
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            time.sleep(after)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            code = process.wait()
            ended = time.monotonic() - start
    done = counted.tasks
    seconds, same, tasks, _ = on_cluster(case, cluster, "resumed")
    return seconds, same, tasks, f"after {done} tasks; ended with {code} in {ended:.2f} s"


def by_the_command(case, folder):
    """The command alone, which starts a cluster for itself, and the same interrupted: what is left of it afterwards?"""
    # The package without its extension, where the interpreter of this script finds it.
    package = folder / "package" / "onnx_lathe"
    package.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (package / "distributed").symlink_to(PACKAGE / "distributed")
    os.environ["PYTHONPATH"] = str(package.parent)
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    seconds, same, _ = case.run("command", "--on", "ray", "--jobs", "2")
    command = case.command("stopped", "--on", "ray", "--jobs", "2")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        time.sleep(0.7 * seconds)
        known = below(process.pid)
        process.send_signal(signal.SIGINT)
        code = process.wait()
    time.sleep(2)
    left = [one for one in known if command_of(one)]
    return seconds, same, "", f"interrupted: ended with {code}, {len(known)} processes, {len(left)} left after 2 s"


def overhead(cluster, count=400):
    """Milliseconds of a task that does nothing, as the program asks for it."""
    header = b'"Hello"'
    task = struct.pack("<4sQQ", b"LWF1", len(header), 0) + header

    def timed(call):
        call(2)
        start = time.monotonic()
        call(count)
        return 1e3 * (time.monotonic() - start) / count

    def ask(address, token, tasks):
        with socket.create_connection(address) as connection:
            connection.sendall(token.encode() + b"\n" + struct.pack("<I", len(tasks)))
            for one in tasks:
                connection.sendall(struct.pack("<Q", len(one)) + one)
            with connection.makefile("rb") as answers:
                assert answers.read(1) == b"\0"

    with distributed.served(cluster) as where:
        address, token, _ = where.split("/")
        host, port = address.split(":")
        one = timed(lambda n: [ask((host, int(port)), token, [task]) for _ in range(n)])
        batch = timed(lambda n: [ask((host, int(port)), token, [task] * 8) for _ in range(n // 8)])
    return f"{one:.2f} ms a task asked for one by one, {batch:.2f} ms in batches of eight"


def measure(a, given, row):
    """Everything about one model."""
    model = pathlib.Path(given.split(":")[0]).stem
    with tempfile.TemporaryDirectory() as name:
        case = Case(a, given, pathlib.Path(name))
        row(model, "plain", *case.run("plain")[:2])
        row(model, "--jobs 2", *case.run("jobs", "--jobs", "2")[:2])
        with distributed.Ray(workers=1, worker=a.optimize) as cluster:
            row(model, "Ray, 1 worker", *on_cluster(case, cluster, "one"))
        with distributed.Ray(workers=2, worker=a.optimize) as cluster:
            seconds, *others = on_cluster(case, cluster, "two")
            row(model, "Ray, 2 workers", seconds, *others)
            kill = functools.partial(kill_in_the_middle, after=seconds / 3)
            row(model, "Ray, killed", *on_cluster(case, cluster, "killed", meanwhile=kill))
            row(model, "Ray, interrupted and resumed", *interrupted(case, cluster, seconds / 2))
        row(model, "--on ray --jobs 2", *by_the_command(case, pathlib.Path(name)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("optimize", type=pathlib.Path)
    ap.add_argument("models", nargs="+", metavar="MODEL:CALIB")
    ap.add_argument("--options", default="--size 0.3", help="of every run; one thread unless told")
    a = ap.parse_args()
    a.optimize = a.optimize.resolve()
    if "--threads" not in a.options:
        a.options += " --threads 1"
    differ = []

    def row(model, name, seconds, same, tasks="", note=""):
        differ.extend([] if same else [f"{model}: {name}"])
        print(f"| {model} | {name} | {seconds:.1f} | {'yes' if same else 'NO'} | {tasks} | {note or ''} |", flush=True)

    print("| model | run | s | same bytes | tasks | |\n|---|---|---|---|---|---|", flush=True)
    for given in a.models:
        measure(a, given, row)
    for workers in (1, 2):
        start = time.monotonic()
        with distributed.Ray(workers=workers, worker=a.optimize) as cluster:
            cluster.open()
            started = time.monotonic() - start
            print(f"{workers} workers started in {started:.1f} s; {overhead(cluster)}", flush=True)
    if differ:
        sys.exit("other bytes: " + ", ".join(differ))


if __name__ == "__main__":
    main()
