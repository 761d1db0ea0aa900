"""A run that hangs ends by itself and leaves the stacks of its threads; one that is slow or stopped does not."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, fork, merge, rows

import recipes.data
import recipes.trainer
from recipes.checkpoint import SafeCheckpointManager
from recipes.sparsity import Sparsity
from recipes.trainer import SparseTrainer, _Batches
from recipes.validation import Validator
from recipes.watchdog import Watchdog


def _only_rank_1_gives_up():
    """Two ranks that write their stacks at once write into each other's lines."""
    begin = Watchdog.__init__

    def patient(self, seconds, start_seconds):
        begin(self, seconds if os.environ["RANK"] == "1" else 10 * seconds, start_seconds)

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
    ("prepare", "part", "stands"),
    [(hang_in_step_6, "step 6", "in train_step"), (hang_in_the_save_of_step_8, "the save of step 8", "in save")],
)
def test_a_run_that_hangs_ends_with_its_stacks_and_resumes(tiny, tmp_path, prepare, part, stands):
    words = ["--config", "configs/debug.toml", *tiny]
    words = merge(words, ["--training.local_batch_size", "2", "--training.hang_timeout_seconds", "6"])
    words += ["--job.dump_folder", str(tmp_path / "run")]
    began = time.monotonic()
    hung = fork(*words, processes=2, prepare=prepare)
    assert hung.returncode == 1 and time.monotonic() - began < 60, hung.stderr
    said = f"error: {part} has not ended after training.hang_timeout_seconds = 6 on rank 1"
    assert said in hung.stderr and "the same command resumes" in hung.stderr
    assert stands in hung.stderr, "where the main thread stands"
    resumed = fork(*words, processes=2)
    assert "resumed after step 4" in resumed.stdout, resumed.stderr
    assert list(rows(tmp_path / "run")) == list(range(1, 13))


def hang_where_data_is_looked_for():
    recipes.data.check_data = lambda config: time.sleep(600)  # type: ignore[assignment]


def test_a_start_that_hangs_ends_by_its_own_limit(tiny, tmp_path):
    words = ["--config", "configs/debug.toml", *tiny, "--job.dump_folder", str(tmp_path / "run")]
    hung = fork(*words, "--training.start_timeout_seconds", "1", prepare=hang_where_data_is_looked_for, timeout=60)
    said = "error: the start (looking for the data) has not ended after training.start_timeout_seconds = 1 on rank 0"
    assert hung.returncode == 1 and said in hung.stderr, hung.stderr


def test_each_part_of_a_run_has_its_name_and_limit(train, tmp_path, monkeypatch):
    part, seen = ["", ""], []  # the part that is watched, with its limit; the calls that are made in each

    def watch(watchdog, name, starts=False):
        part[:] = name, "start" if starts else "hang"

    def note(owner, name):
        call = getattr(owner, name)

        def noted(*args, **kwargs):
            if (name, *part) not in seen:
                seen.append((name, *part))
            if part[0] == "step 7":
                signal.raise_signal(signal.SIGTERM)
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    monkeypatch.setattr(Watchdog, "watch", watch)
    for owner, name in (
        (recipes.trainer, "load_corpus"),
        (recipes.trainer, "prepare_tokenizer"),
        (SparseTrainer, "init_distributed"),
        (SafeCheckpointManager, "load"),
        (_Batches, "peek"),
        (Sparsity, "_cluster"),
        (SparseTrainer, "forward_backward_step"),
        (Validator, "validate"),
        (SafeCheckpointManager, "dcp_save"),
        (SafeCheckpointManager, "close"),
    ):
        note(owner, name)
    phases = '[{mode="dense", end=3}, {mode="sparse", end=6}, {mode="dense", end=1.0}]'
    words = "--schedule.phases", phases, "--validation.freq", "2"
    train(tmp_path / "run", *words, recipe="columns_quarter")
    assert seen == [
        ("load_corpus", "the start (reading the data)", "start"),
        ("prepare_tokenizer", "the start (preparing the tokenizer)", "start"),
        ("init_distributed", "the start (connecting the ranks, building the model)", "start"),
        ("load", "the start (loading a checkpoint)", "start"),
        ("peek", "the start (reading the first batch)", "start"),
        ("load_corpus", "the start (reading the first batch)", "start"),
        ("forward_backward_step", "step 1", "start"),  # it compiles
        ("forward_backward_step", "step 2", "hang"),
        ("validate", "the validation of step 2", "start"),  # it compiles, too
        ("forward_backward_step", "step 3", "hang"),
        ("peek", "step 4", "start"),
        ("_cluster", "step 4", "start"),
        ("forward_backward_step", "step 4", "start"),
        ("validate", "the validation of step 4", "start"),
        ("validate", "the validation of step 4 with the pattern", "start"),
        ("dcp_save", "the save of step 4", "hang"),
        ("forward_backward_step", "step 5", "hang"),
        ("forward_backward_step", "step 6", "hang"),
        ("validate", "the validation of step 6", "hang"),
        ("validate", "the validation of step 6 with the pattern", "hang"),
        ("forward_backward_step", "step 7", "start"),  # dense again: a resumed run compiles here
        ("dcp_save", "the save of step 7", "hang"),
        ("close", "the end (ending data processes, waiting for a save)", "hang"),
    ]


def test_a_part_does_not_get_the_time_of_the_one_before(monkeypatch):
    """A step begins at every tenth look: each has been looked at nine times when it ends, and a tenth would end it."""
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    watchdog, looks, ended = Watchdog(0, 0), [], []

    def wait(seconds: float) -> bool:
        looks.append(seconds)
        if len(looks) % 10 == 0 and len(looks) < 50:
            watchdog.watch(f"step {len(looks)}")
        return len(looks) == 52

    monkeypatch.setattr(watchdog, "_seconds", 10.0)
    monkeypatch.setattr(watchdog, "_closed", SimpleNamespace(wait=wait))
    monkeypatch.setattr(watchdog, "_end", lambda part: ended.append(part.name))
    watchdog.watch("step 0")
    watchdog._watch()
    watchdog.close()
    assert ended == ["step 40", "step 40"] and set(looks) == {1.0}, "the last one takes too long"


def python(program: str) -> subprocess.Popen[str]:
    """A process that watches for a second, up to the line "ready"."""
    head = "import time, ctypes\nfrom recipes.watchdog import Watchdog\nwatchdog = Watchdog(1.0, 600.0)\n"
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
    stopped = python("watchdog.watch('step 3')\nprint('ready')\ntime.sleep(0.5)")
    beats = python("print('ready')\nfor n in range(4):\n    watchdog.watch(f'step {n}')\n    time.sleep(0.5)")
    idle = python("print('ready')\ntime.sleep(2)\nwatchdog.close()")
    starts = python("watchdog.watch('the start', starts=True)\nprint('ready')\ntime.sleep(2)\nwatchdog.close()")
    asked = python("print('ready')\ntime.sleep(1)")
    asked.send_signal(signal.SIGUSR2)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    stopped.send_signal(signal.SIGCONT)
    for process in (stopped, beats, idle, starts, asked):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "error" not in error, error
        if process is asked:
            assert "<module>" in error and "in _watch" in error, "the stacks of all threads"


def test_stacks_are_written_where_python_s_lock_is_held():
    process = python("watchdog.watch('step 3')\nprint('ready')\ntime.sleep(0.3)\nctypes.PyDLL(None).sleep(3)")
    _, error = process.communicate(timeout=120)
    assert "Timeout" in error and "<module>" in error
