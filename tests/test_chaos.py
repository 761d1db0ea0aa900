"""A sample of the faults of scripts/chaos.py: a run that resumes after one is the run that nothing happened to."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import PROCESSES

from scripts.chaos import AT_RANDOM, DAMAGES, FULL, KINDS, NAN, READ_ONLY, STOPPED, Fault, _same, make_job, try_fault

DRAWN = [Fault.draw(0, number) for number in range(200)]
# One of each kind that needs neither the start of torchrun nor a timeout, at a moment that is sure to come, and SIGKILL
# at both moments of a save in which files are there and not yet valid.
UNSURE = AT_RANDOM, "while a checkpoint's data is written"
SAMPLE = {fault.kind: fault for fault in reversed(DRAWN) if fault.moment not in UNSURE and fault.kind != STOPPED}
KILLS = [fault for fault in DRAWN if fault.kind == "SIGKILL" and fault.moment.startswith("between")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_a_resumed_run_is_the_undisturbed_one():
    PROCESSES.set_forkserver_preload(["train"])
    sample = {(fault.kind, fault.moment): fault for fault in (*SAMPLE.values(), KILLS[0])}
    assert {FULL, READ_ONLY, NAN, *DAMAGES, "SIGKILL", "SIGTERM"} <= {kind for kind, _ in sample}
    with tempfile.TemporaryDirectory() as folder:  # whom root becomes for a read-only folder may not enter pytest's
        job = make_job(Path(folder))
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
