"""Batches whose loss or gradient is not finite: never saved, and skipped where the configuration allows it."""

import errno
import json
import math
import os
import shutil

import pytest
import torch
from conftest import fork, losses, merge, rows

import recipes.trainer
from configs.errors import ConfigError
from configs.titan import Trainer, dist_utils
from recipes.trainer import SparseTrainer


@pytest.fixture
def poison(monkeypatch):
    """`poison(what, *steps)` lets the loss or the gradient of these steps be bad, whenever they are run."""
    original = Trainer.forward_backward_step

    def use(what: str, *steps: int) -> None:
        def step(self, **kwargs):
            loss = original(self, **kwargs)
            if self.step in steps:
                if what == "loss":
                    return loss * math.inf
                next(self.model_parts[0].parameters()).grad.view(-1)[3] = {"nan": math.nan, "inf": math.inf}[what]
            return loss

        monkeypatch.setattr(Trainer, "forward_backward_step", step)

    return use


@pytest.mark.parametrize("what", ["loss", "nan", "inf"])
def test_bad_batches_are_skipped_and_counted_and_a_resume_is_exact(train, tmp_path, poison, what):
    poison(what, 3, 6)
    words = "--training.skip_bad_batches", "2"
    straight = train(tmp_path / "straight", *words)
    assert sorted(straight) == list(range(1, 13))
    assert [straight[step]["skipped_batches"] for step in range(1, 13)] == [0, 0, 1, 1, 1, *[2] * 7]
    bad = "loss" if what == "loss" else "grad_norm"
    assert [step for step in straight if straight[step][bad] is None] == [3, 6]
    assert all(math.isfinite(straight[step]["loss"]) for step in straight if step not in (3, 6))
    for stop in (3, 6):
        train(tmp_path / "stopped", *words, stop_after=stop)
    assert losses(train(tmp_path / "stopped", *words)) == losses(straight)
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["skipped_batches"] == 2
    assert [row["lr"] for row in straight.values()] == [row["lr"] for row in rows(tmp_path / "stopped").values()]


def test_one_bad_batch_too_many_ends_the_run_before_it_is_taken(train, tmp_path, poison):
    poison("nan", 2, 6)
    said = r"bad_batches = 1, 1 batches were skipped before, .* not finite at step 6: .* checkpoint is .*step-4"
    with pytest.raises(ConfigError, match=said):
        train(tmp_path, "--training.skip_bad_batches", "1", "--metrics.log_freq", "100", "--validation.freq", "100")
    assert (tmp_path / "checkpoint" / "latest").read_text() == "step-4"


def poison_rank_1() -> None:
    """On rank 1 alone the loss of step 3 is infinite, the reduced gradient of step 6 NaN, both of step 8 NaN."""
    bad = os.environ["RANK"] == "1"
    forward_backward, clip = Trainer.forward_backward_step, dist_utils.clip_grad_norm_
    now = 0

    def step(self, **kwargs):
        nonlocal now
        now = self.step
        loss_fn = self.loss_fn
        if bad and now == 8:
            self.loss_fn = lambda *given: loss_fn(*given) * math.nan
        loss = forward_backward(self, **kwargs)
        self.loss_fn = loss_fn
        return loss * math.inf if bad and now == 3 else loss

    def spoil_and_clip(parameters, *args, **kwargs):
        parameters = list(parameters)
        if bad and now == 6:
            parameters[0].grad.to_local().view(-1)[3] = math.nan
        return clip(parameters, *args, **kwargs)

    Trainer.forward_backward_step, dist_utils.clip_grad_norm_ = step, spoil_and_clip  # type: ignore[method-assign]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_all_ranks_skip_a_batch_that_is_bad_on_one(train, tiny, tmp_path, poison):
    """As one process does that skips the batches of the same steps; counted once; a resume is exact."""
    dense = ["--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false"]
    words = ["--training.skip_bad_batches", "3", *dense]
    poison("nan", 3, 6, 8)
    one = train(tmp_path / "one", *words, recipe="dense")
    shared = ["--training.local_batch_size", "2", "--training.global_batch_size", "4"]
    words += [*shared, "--job.dump_folder", str(tmp_path / "two")]
    command = ["--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *merge(tiny, words)]
    result = fork(*command, processes=2, prepare=poison_rank_1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the batch is skipped") == 3, result.stdout
    two = rows(tmp_path / "two")
    assert [two[step]["skipped_batches"] for step in range(1, 13)] == [0, 0, 1, 1, 1, 2, 2, *[3] * 5]
    good = [step for step in one if step not in (3, 6, 8)]
    assert [losses(two)[step] for step in good] == pytest.approx([losses(one)[step] for step in good], rel=1e-4)

    for step in (8, 12):
        shutil.rmtree(tmp_path / "two" / "checkpoint" / f"step-{step}")
    (tmp_path / "two" / "checkpoint" / "latest").write_text("step-4")
    result = fork(*command, processes=2, prepare=poison_rank_1)
    assert result.returncode == 0 and "resumed after step 4" in result.stdout, result.stdout + result.stderr
    resumed = rows(tmp_path / "two")
    assert losses(resumed) == losses(two)
    assert resumed[12]["skipped_batches"] == 3


def test_a_full_disk_while_a_batch_is_skipped_loses_nothing(train, tmp_path, poison, monkeypatch):
    poison("nan", 3, 6)
    words = "--training.skip_bad_batches", "2"
    straight = train(tmp_path / "straight", *words)
    write = recipes.trainer.write_atomically

    def on_a_full_disk(path, text):
        if '"skipped_batches": 2' in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(recipes.trainer, "write_atomically", on_a_full_disk)
        with pytest.raises(ConfigError, match=r"run.json cannot be written \(No space left on device\)"):
            train(tmp_path / "full", *words)
    assert losses(train(tmp_path / "full", *words)) == losses(straight)
    assert json.loads((tmp_path / "full" / "run.json").read_text())["skipped_batches"] == 2


def test_a_limit_that_a_resume_lowers_holds(train, tmp_path, poison):
    poison("nan", 2, 3, 6)
    train(tmp_path, "--training.skip_bad_batches", "5", stop_after=4)
    with pytest.raises(ConfigError, match=r"skip_bad_batches = 1, 2 batches were skipped before, .* at step 6"):
        train(tmp_path, "--training.skip_bad_batches", "1")


def test_skipping_costs_nothing_where_it_is_off_and_changes_no_loss(train, tmp_path, monkeypatch):
    clip = dist_utils.clip_grad_norm_
    watched = []
    monkeypatch.setattr(SparseTrainer, "_step_unless_bad", lambda *_: watched.append(1))
    off = train(tmp_path / "off", "--training.steps", "9")
    assert not watched and dist_utils.clip_grad_norm_ is clip
    monkeypatch.undo()
    on = train(tmp_path / "on", "--training.steps", "9", "--training.skip_bad_batches", "5")
    assert losses(on) == losses(off)
    assert "skipped_batches" not in off[9] and on[9]["skipped_batches"] == 0
