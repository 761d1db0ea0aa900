"""A run that hangs ends by itself and leaves the stacks of its threads; one that is slow or stopped does not."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, fork, merge, rows

from recipes.checkpoint import SafeCheckpointManager
from recipes.trainer import SparseTrainer
from recipes.watchdog import Watchdog


def _only_rank_1_gives_up():
    """Two ranks that write their stacks at once write into each other's lines."""
    begin = Watchdog.__init__

    def patient(self, seconds):
        begin(self, seconds if os.environ["RANK"] == "1" else 10 * seconds)

    Watchdog.__init__ = patient  # type: ignore[method-assign]


def hang_in_step_6():
    """On rank 1; rank 0 waits for it."""
    _only_rank_1_gives_up()
    step = SparseTrainer.forward_backward_step

    def stuck(self, **arguments):
        if self.step == 6 and os.environ["RANK"] == "1":
            time.sleep(600)
        return step(self, **arguments)

    SparseTrainer.forward_backward_step = stuck  # type: ignore[method-assign]


def hang_in_the_save_of_step_8():
    _only_rank_1_gives_up()
    save = SafeCheckpointManager.dcp_save

    def stuck(self, state_dict, checkpoint_id, *more, **named):
        if checkpoint_id.endswith("step-8") and os.environ["RANK"] == "1":
            time.sleep(600)
        return save(self, state_dict, checkpoint_id, *more, **named)

    SafeCheckpointManager.dcp_save = stuck  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "step", "stands"), [(hang_in_step_6, 6, "in train_step"), (hang_in_the_save_of_step_8, 8, "in save")]
)
def test_a_run_that_hangs_ends_with_its_stacks_and_resumes(tiny, tmp_path, prepare, step, stands):
    words = merge(["--config", "configs/debug.toml", *tiny], ["--checkpoint.interval", "4"])
    words = merge(words, ["--training.local_batch_size", "2", "--training.hang_timeout_seconds", "10"])
    words += ["--job.dump_folder", str(tmp_path / "run")]
    began = time.monotonic()
    hung = fork(*words, processes=2, prepare=prepare)
    assert hung.returncode == 1 and time.monotonic() - began < 60, hung.stderr
    said = f"error: step {step} has not ended after training.hang_timeout_seconds = 10 on rank 1"
    assert said in hung.stderr and "the same command resumes" in hung.stderr
    assert stands in hung.stderr, "where the main thread stands"
    resumed = fork(*words, processes=2)
    assert "resumed after step 4" in resumed.stdout, resumed.stderr
    assert list(rows(tmp_path / "run")) == list(range(1, 13))


def python(program: str) -> subprocess.Popen[str]:
    """A process that watches for a second, up to the line "ready"."""
    head = "import time, ctypes\nfrom recipes.watchdog import Watchdog\nwatchdog = Watchdog(1.0)\n"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", head + program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_what_is_no_hang_goes_on():
    stopped = python("with watchdog.watching(3):\n    print('ready')\n    time.sleep(0.5)")
    parts = "with watchdog.watching(3):\n    print('ready')\n    for _ in range(4):\n        time.sleep(0.5)\n"
    beats, idle = python(parts + "        watchdog.beat()"), python("print('ready')\ntime.sleep(2)\nwatchdog.close()")
    asked = python("print('ready')\ntime.sleep(1)")
    asked.send_signal(signal.SIGUSR2)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    stopped.send_signal(signal.SIGCONT)
    for process in (stopped, beats, idle, asked):
        _, error = process.communicate(timeout=30)
        assert process.returncode == 0 and "error" not in error, error
        if process is asked:
            assert "<module>" in error and "in _watch" in error, "the stacks of all threads"


def test_stacks_are_written_where_python_s_lock_is_held():
    process = python("with watchdog.watching(3):\n    print('ready')\n    ctypes.PyDLL(None).sleep(3)")
    _, error = process.communicate(timeout=30)
    assert "Timeout" in error and "<module>" in error
