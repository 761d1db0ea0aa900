"""A sample of the faults of scripts/chaos.py: a run that resumes after one is the run that nothing happened to."""

import multiprocessing
import os
import re
import signal
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import PROCESSES
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

import scripts.chaos as chaos
import train
from configs.repository import ROOT
from recipes.check import UNSHARED
from scripts.chaos import (
    AT_RANDOM,
    DAMAGES,
    DATA_PROCESS,
    FULL,
    HANGS,
    KINDS,
    NAN,
    READ_ONLY,
    STOPPED,
    Fault,
    _same,
    make_job,
    try_fault,
)

DRAWN = [Fault.draw(0, number) for number in range(200)]
# One of each kind that needs neither the start of torchrun nor a timeout, at a moment that is sure to come, and SIGKILL
# within a save, when files are there and not yet valid.
UNSURE = AT_RANDOM, "while a checkpoint's data is written"
WAITS = STOPPED, HANGS
SURE = [fault for fault in DRAWN if fault.moment not in UNSURE and fault.kind not in WAITS]
# Two processes where they have to agree on what happened to one, or where both fail and one of them says so.
TWO = "SIGKILL in a resume", "SIGTERM", READ_ONLY, DATA_PROCESS
SAMPLE = {fault.kind: fault for fault in reversed(SURE) if fault.processes == 1 + (fault.kind in TWO)}
KILLS = [fault for fault in DRAWN if fault.kind == "SIGKILL" and fault.moment.startswith("between")]


@pytest.fixture(scope="module")
def job():
    """The job, and the undisturbed runs that there were of it."""
    with tempfile.TemporaryDirectory() as folder:  # whom root becomes for a read-only folder may not enter pytest's
        yield make_job(Path(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_a_resumed_run_is_the_undisturbed_one(job):
    PROCESSES.set_forkserver_preload(["train"])
    sample = {(fault.kind, fault.moment): fault for fault in (*SAMPLE.values(), KILLS[0])}
    assert {FULL, READ_ONLY, NAN, *DAMAGES, "SIGKILL", "SIGTERM"} <= {kind for kind, _ in sample}
    tried = [try_fault(job, Fault.draw(0, fault.number)) for fault in sample.values()]
    assert all(fault.happened for fault in tried), [asdict(fault) for fault in tried if not fault.happened]
    assert not any(fault.problems for fault in tried), [asdict(fault) for fault in tried if fault.problems]


def test_a_fault_follows_from_the_seed_and_its_number_and_every_kind_is_drawn():
    assert Fault.draw(0, 7) == DRAWN[7] != Fault.draw(1, 7)
    assert {fault.kind for fault in DRAWN} == {kind for kind, *_ in KINDS}


def test_checkpoints_are_compared_bit_by_bit():
    one = {"weight": torch.ones(3), "data": b"\x80\x04K\x01.", "rows": [{"epoch": 1}]}
    assert _same(one, one | {"weight": torch.ones(3), "data": b"\x80\x02K\x01."})
    for change in ({"weight": torch.tensor([1, 1, 1.0000001])}, {"data": b"\x80\x04K\x02."}, {"rows": [{"epoch": 2}]}):
        assert not _same(one, one | change)
    assert not _same(one, {name: one[name] for name in ("weight", "data")})


# What happens in each start of one job: the moment that a rank gets SIGKILL at, the call of it, and the rank. The job
# has checkpoints of steps 2, 4, ... and is sparse in steps 4 to 8.
DEATHS = [
    ("in a training step", 3, 1),  # step 3, dense
    ("in the switch to sparse", 1, 0),
    ("while a checkpoint's data is written", 3, 1),  # that of step 4
    ("in a training step", 4, 0),  # step 6, sparse
    ("between a checkpoint's data and its manifest", 1, 0),  # of step 6
]
RESUMED = [2, 2, 2, 4, 4]


def _under_torchrun(command: list[str], output: Path, status) -> None:
    """torchrun's own command line and agent; the processes are forked from one that has imported the trainer."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    os.environ[UNSHARED] = "1"
    words = ["--nproc_per_node=2", f"--max-restarts={len(DEATHS)}", "--start-method=forkserver"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py", *command]
    config, _, _ = config_from_args(get_args_parser().parse_args(words))
    elastic_launch(config, _rank)(command, output)
    status.value = 0


def _rank(command: list[str], output: Path) -> None:
    """A process of the job; the rank that dies in this start sends itself SIGKILL."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)
    os.chdir(ROOT)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(DEATHS) and DEATHS[start][2] == int(os.environ["RANK"]):
        moment, call, _ = DEATHS[start]
        chaos._aim(chaos.MOMENTS[moment], call, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    train.main(command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_torchrun_restarts_a_job_that_loses_ranks_and_it_ends_as_if_it_had_lost_none(job, tmp_path):
    expected, reference, _ = job.reference(2, 0)
    run, output, status = tmp_path / "run", tmp_path / "log", PROCESSES.Value("i", 1)
    launcher = PROCESSES.Process(target=_under_torchrun, args=(job.command(run, 0), output, status))
    launcher.start()
    launcher.join(240)
    log = output.read_text()
    assert status.value == 0, log
    assert [int(step) for step in re.findall(r"resumed after step (\d+)", log)] == RESUMED, log
    assert chaos.losses(run) == (expected, list(range(1, chaos.STEPS + 1)))
    assert chaos.same_checkpoint(chaos.last_checkpoint(run), chaos.last_checkpoint(reference))
