"""What the tests do about faults that are not theirs: hidden GPUs, and segmentation faults in compiled code."""

import ctypes
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, fork

RERUNS = "--reruns 1 --only-rerun Segmentation fault"  # as scripts/test.sh calls pytest
FAILS = """
from pathlib import Path

def test_of_a_crash():
    seen, there = Path(__file__).with_name("seen"), Path(__file__).with_name("seen").exists()
    seen.touch()
    assert there, "Segmentation fault in compiled code"

def test_of_an_error():
    assert False, "an error"
"""


def crash() -> None:
    """In a thread of C: it reads a string at address 8."""
    c, thread = ctypes.CDLL(None), ctypes.c_ulong()
    c.pthread_create(ctypes.byref(thread), None, ctypes.cast(c.strlen, ctypes.c_void_p), ctypes.c_void_p(8))
    time.sleep(60)


def test_a_crash_in_compiled_code_shows_the_stacks_of_all_threads():
    with pytest.raises(AssertionError, match="Segmentation fault in compiled code") as crashed:
        fork("--help", prepare=crash)
    assert len(set(re.findall(r"SIGSEGV\(11\), PID: \d+, Thread (\d+)", str(crashed.value)))) >= 2
    assert "frame #1" in str(crashed.value)


def test_only_a_crash_runs_again_and_the_summary_says_why(tmp_path):
    pytest.importorskip("pytest_rerunfailures")
    (tmp_path / "test_fails.py").write_text(FAILS)
    reruns = RERUNS.split(" ", 3)
    words = ("-q", "-p", "conftest", *reruns, "--rootdir", str(tmp_path), str(tmp_path))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "1 failed, 1 passed, 1 rerun in" in done.stdout, done
    before, why = done.stdout.split("test_fails.py::test_of_a_crash ran again, because of:")
    assert "Segmentation fault in compiled code" in why and "Segmentation" not in before


@pytest.mark.parametrize(
    "visible, context", [(None, "spawn"), ("0", "spawn"), ("", "forkserver"), ("-1", "forkserver")]
)
def test_hidden_gpus_leave_the_tests_as_fast_as_without(visible, context):
    code = (
        "from pathlib import Path; exists = Path.exists\n"
        "Path.exists = lambda path: str(path) == '/dev/nvidiactl' or exists(path)\n"
        "import conftest; print(conftest.PROCESSES.get_start_method())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | (
        {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == context
