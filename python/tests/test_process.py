"""The package as a process meets it: the command, interrupts, memory, runtimes, threads."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx_lathe
import pytest
from conftest import FIXTURES
from onnx import TensorProto, helper, save


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "onnx_lathe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def script(text: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, **options)


def test_the_command_is_the_program(transformer: Path, tmp_path: Path) -> None:
    done = run(transformer, "-o", tmp_path / "out.onnx")
    assert done.returncode == 0 and "verified against the original on ONNX Runtime" in done.stdout, done.stderr
    assert run("--version").stdout == f"optimize {onnx_lathe.__version__}\n"
    wrong = run(tmp_path / "none.onnx", "-o", tmp_path / "x.onnx")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ")
    assert run(transformer, "--size", "2").returncode == 2
    doctor = run("doctor").stdout
    assert "an installed Python package" in doctor.splitlines()[1], doctor


# Where the tests run in the background of a shell, interrupts are ignored from the start.
INTERRUPTED = """
import signal, sys, time, onnx_lathe
signal.signal(signal.SIGINT, signal.default_int_handler)
print("started", flush=True)
try:
    onnx_lathe.optimize(sys.argv[1], sys.argv[2])
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of other systems reach whole consoles")
def test_an_interrupt_ends_a_call_within_a_second(tmp_path: Path) -> None:
    # The model never ends.
    command = [sys.executable, "-c", INTERRUPTED, FIXTURES / "loop_endless.onnx", tmp_path / "out.onnx"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(2)
    assert process.poll() is None
    sent = time.time()
    process.send_signal(signal.SIGINT)
    noticed = float(process.communicate(timeout=30)[0])
    assert process.returncode == 0 and noticed - sent < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals of other systems reach whole consoles")
def test_an_interrupt_ends_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onnx_lathe", FIXTURES / "loop_endless.onnx", "-o", tmp_path / "out.onnx"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "interrupted; nothing was written" in said
    assert list(tmp_path.iterdir()) == []


def test_other_threads_go_on(transformer: Path, tmp_path: Path) -> None:
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    onnx_lathe.optimize(transformer, tmp_path / "out.onnx")
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    # A call that held the interpreter's lock would let none through until its end.
    assert ticks > 20 * seconds


def test_two_threads_work_side_by_side(transformer: Path, tmp_path: Path) -> None:
    results = {}

    def work(name: str) -> None:
        results[name] = onnx_lathe.optimize(transformer, tmp_path / name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a.onnx", "b.onnx")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a.onnx"].passed and (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


MEMORY = """
import sys, onnx_lathe
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak()
result = onnx_lathe.optimize(sys.argv[1], sys.argv[2], no_verify=True)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak of memory")
def test_a_model_of_a_gigabyte_passes_by_path(tmp_path: Path) -> None:
    width, layers = 8192, 4
    size = 4 * width * width
    tensors = []
    block = np.random.default_rng(0).standard_normal(width * 64).astype(np.float32)
    with open(tmp_path / "big.data", "wb") as data:
        for layer in range(layers):
            for part in range(width // 64):
                data.write((block + np.float32(layer * width + part)).tobytes())
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "big.data"), ("offset", layer * size), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("x0", f"x{layers}")]
    # Without something between them two constant matrices could be multiplied out.
    nodes = []
    for at in range(layers):
        nodes.append(helper.make_node("MatMul", [f"x{at}", f"w{at}"], [f"p{at}"]))
        nodes.append(helper.make_node("Relu", [f"p{at}"], [f"x{at + 1}"]))
    save(helper.make_model(helper.make_graph(nodes, "big", value[:1], value[1:], tensors)), tmp_path / "big.onnx")
    done = script(MEMORY, tmp_path / "big.onnx", tmp_path / "out.onnx")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10, f"{done.stdout} KiB"
    assert (tmp_path / "out.onnx.data").stat().st_size >= layers * size


EMBEDDED = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
import onnx_lathe
result = onnx_lathe.optimize(sys.argv[1], sys.argv[2])
print(result)
"""


def test_without_a_runtime_the_embedded_engine_runs_and_says_so(transformer: Path, tmp_path: Path) -> None:
    # No Python and no virtual environment to find a runtime in.
    outside = {name: value for name, value in os.environ.items() if name in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    outside |= {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = script(EMBEDDED, transformer, tmp_path / "out.onnx", cwd=tmp_path, env=outside)
    assert done.returncode == 0, done.stderr
    assert "verified against the original on tract" in done.stdout and "(embedded)" in done.stdout, done.stdout


def test_modules_of_the_current_folder_do_not_get_in_the_way(transformer: Path, tmp_path: Path) -> None:
    for name in ("signal", "importlib", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('wrong module')")
    # This process keeps the folder off its own path; the one that runs models must see to it by itself.
    text = "import sys; sys.path = [p for p in sys.path if p]; import onnx_lathe; onnx_lathe.optimize(*sys.argv[1:])"
    done = script(text, transformer, tmp_path / "out.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
