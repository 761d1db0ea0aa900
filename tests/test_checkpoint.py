"""What a run may find on its disk, and that it resumes from the newest checkpoint that is whole."""

import json
import logging
import os
import shutil
import threading
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import PROCESSES
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from configs.errors import ConfigError
from configs.titan import (
    AsyncMode,
    CheckpointManager,
    ParallelDims,
    build_lr_schedulers,
    build_optimizers,
    titan_config,
)
from recipes import checkpoint
from recipes.checkpoint import SafeCheckpointManager


@pytest.fixture(scope="module", autouse=True)
def single_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    logger = logging.getLogger("sparsetitan")
    monkeypatch.setattr(logger, "propagate", True)  # training switches it off
    caplog.set_level(logging.INFO, "sparsetitan")
    return caplog


class Progress:
    """The trainer's own state: how many steps are done."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.step = int(state["step"])


class Run:
    """A linear model with AdamW, its scheduler, and the checkpoint manager under test."""

    def __init__(self, folder, dim=8, **settings):
        torch.manual_seed(0)
        self.model = nn.Linear(dim, dim)
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
        self.optimizers = build_optimizers([self.model], titan_config.Optimizer(implementation="for-loop"), dims)
        self.schedulers = build_lr_schedulers(self.optimizers, titan_config.LRScheduler(warmup_steps=2), 100)
        self.progress = Progress()
        settings = {"enable": True, "interval": 10, "last_save_model_only": False, **settings}
        self.manager = SafeCheckpointManager(
            dataloader=Progress(),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.progress},
            checkpoint_config=titan_config.Checkpoint(**settings),
            sd_adapter=None,
            base_folder=str(folder),
        )

    def train_to(self, step):
        while self.progress.step < step:
            self.progress.step += 1
            torch.manual_seed(self.progress.step)
            self.optimizers.zero_grad()
            self.model(torch.randn(4, self.model.in_features)).square().sum().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.manager.save(self.progress.step)
        return self

    def weight(self):
        return self.model.weight.detach().clone()


@pytest.fixture
def folder(tmp_path):
    """The checkpoint folder of a run that saved steps 10, 20 and 30."""
    Run(tmp_path).train_to(30).manager.close()
    return tmp_path / "checkpoint"


def read_latest(folder):
    return (folder / "latest").read_text()


def names(folder):
    return {path.name for path in folder.iterdir()}


def data_file(folder, step):
    return max((folder / f"step-{step}").glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder, step):
    os.truncate(data_file(folder, step), data_file(folder, step).stat().st_size // 2)


def flip_byte(folder, step):
    data = bytearray(data_file(folder, step).read_bytes())
    data[len(data) // 2] ^= 1
    data_file(folder, step).write_bytes(data)


def drop_metadata(folder, step):
    (folder / f"step-{step}" / ".metadata").unlink()


def drop_manifest(folder, step):
    (folder / f"step-{step}" / "manifest.json").unlink()


def garble_manifest(folder, step):
    (folder / f"step-{step}" / "manifest.json").write_text('{"files": {".metadata": 3}}')


def messages(log, level=logging.WARNING):
    return [r.getMessage() for r in log.records if r.name == "sparsetitan" and r.levelno >= level]


def test_resume_is_exact(folder, log):
    straight = Run(folder.parent / "straight").train_to(37)
    resumed = Run(folder.parent)
    assert resumed.manager.load()
    assert resumed.progress.step == 30
    resumed.train_to(37)
    assert torch.equal(resumed.weight(), straight.weight())
    assert messages(log) == []


def test_manifest_lists_every_file(folder):
    files = json.loads((folder / "step-20" / "manifest.json").read_text())["files"]
    assert set(files) == names(folder / "step-20") - {"manifest.json"}
    assert ".metadata" in files
    assert read_latest(folder) == "step-30"


@pytest.mark.parametrize(
    "damage, fault",
    [
        (truncate, "bytes instead of"),
        (flip_byte, "other contents than were saved"),
        (drop_metadata, ".metadata is missing"),
        (garble_manifest, "manifest.json cannot be read"),
        (drop_manifest, "no manifest.json"),
    ],
)
def test_falls_back_from_a_bad_newest(folder, log, damage, fault):
    damage(folder, 30)
    run = Run(folder.parent)
    assert run.manager.load()
    assert run.progress.step == 20
    assert torch.equal(run.weight(), Run(folder.parent / "other").train_to(20).weight())
    (warning,) = messages(log)
    assert "step-30" in warning and fault in warning and "using step-20" in warning and "broken-30" in warning
    assert names(folder) == {"step-10", "step-20", "broken-30", "latest"}
    assert read_latest(folder) == "step-20"

    run.train_to(30).manager.close()
    assert checkpoint.find_fault(str(folder / "step-30")) is None
    flip_byte(folder, 30)
    Run(folder.parent).manager.load()
    assert "broken-30-2" in names(folder)


def test_two_bad_ones(folder, log):
    drop_manifest(folder, 30)
    flip_byte(folder, 20)
    run = Run(folder.parent)
    assert run.manager.load() and run.progress.step == 10
    assert len(messages(log)) == 2
    assert names(folder) == {"step-10", "broken-20", "broken-30", "latest"}


@pytest.mark.parametrize("text", ["\x00\xff garbage", "step-70", ""])
def test_bad_pointer(folder, log, text):
    (folder / "latest").write_bytes(text.encode("latin-1"))
    run = Run(folder.parent)
    assert run.manager.load() and run.progress.step == 30
    assert len(messages(log)) == (1 if text else 0)
    assert read_latest(folder) == "step-30"


def test_load_only_leaves_the_folder_alone(folder, log):
    flip_byte(folder, 30)
    before = names(folder)
    run = Run(folder.parent, load_only=True)
    assert run.manager.load() and run.progress.step == 20
    assert names(folder) == before and read_latest(folder) == "step-30"


def test_all_damaged_is_an_error(folder):
    truncate(folder, 30)
    flip_byte(folder, 20)
    drop_manifest(folder, 10)
    before = names(folder)
    with pytest.raises(ConfigError, match=r"remove the folder to start over") as error:
        Run(folder.parent).manager.load()
    assert str(folder) in str(error.value)
    assert names(folder) == before


def test_only_incomplete_starts_from_zero(folder, log):
    for step in (10, 20, 30):
        drop_manifest(folder, step)
    run = Run(folder.parent)
    assert run.manager.load() is False
    assert run.progress.step == 0
    assert len(messages(log)) == 3 and all("using step 0" in m for m in messages(log))
    assert names(folder) == {"broken-10", "broken-20", "broken-30"}


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_load(tmp_path, log, exists):
    if exists:
        (tmp_path / "checkpoint").mkdir()
    assert Run(tmp_path).manager.load() is False
    assert Run(tmp_path, enable=False).manager.load() is False
    assert messages(log) == []


class KilledError(Exception):
    pass


@pytest.mark.parametrize("stage, resumes_at", [("write_manifest", 20), ("_move_pointer", 30)])
def test_killed_between_data_and_pointer(tmp_path, monkeypatch, stage, resumes_at):
    run = Run(tmp_path).train_to(29)

    def die(*args):
        raise KilledError

    owner = checkpoint if stage == "write_manifest" else SafeCheckpointManager
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(owner, stage, die)
        run.train_to(30)
    folder = tmp_path / "checkpoint"
    assert (folder / "step-30" / ".metadata").exists()
    assert read_latest(folder) == "step-20"
    resumed = Run(tmp_path)
    assert resumed.manager.load() and resumed.progress.step == resumes_at
    assert read_latest(folder) == f"step-{resumes_at}"


def test_overwriting_a_step_moves_the_pointer_first(folder, monkeypatch):
    """load_step = 20 and on to 30 again: while step-30 is rewritten, `latest` names another one."""
    run = Run(folder.parent)
    assert run.manager.load(20)
    seen = []
    write = checkpoint.write_manifest

    def look_and_write(path):
        seen.append(read_latest(folder))
        write(path)

    monkeypatch.setattr(checkpoint, "write_manifest", look_and_write)
    (folder / "step-30" / "__7_0.distcp").write_text("from a run with more ranks")
    run.train_to(30)
    assert seen == ["step-20"] and read_latest(folder) == "step-30"
    assert "__7_0.distcp" not in names(folder / "step-30")


@pytest.fixture
def gate(monkeypatch):
    """Holds every commit until it is set."""
    gate = threading.Event()
    write = checkpoint.write_manifest

    def wait_and_write(path):
        assert gate.wait(20)
        write(path)

    monkeypatch.setattr(checkpoint, "write_manifest", wait_and_write)
    yield gate
    gate.set()


def test_async_pointer_waits_for_the_commit(tmp_path, gate):
    gate.set()
    run = Run(tmp_path, async_mode="async").train_to(20)
    run.manager.wait_for_save()
    folder = tmp_path / "checkpoint"
    assert read_latest(folder) == "step-20"
    gate.clear()
    run.train_to(30)
    assert read_latest(folder) == "step-20"
    closing = threading.Thread(target=run.manager.close)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive() and read_latest(folder) == "step-20"
    gate.set()
    closing.join(20)
    assert not closing.is_alive() and read_latest(folder) == "step-30"
    resumed = Run(tmp_path)
    assert resumed.manager.load() and torch.equal(resumed.weight(), run.weight())


def test_async_failure_is_reported_and_stops_the_next_save(tmp_path, monkeypatch, log):
    run = Run(tmp_path, async_mode="async").train_to(10)
    run.manager.wait_for_save()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", full)
        run.train_to(20)
        run.manager.save_future.exception()
    assert "step-20 failed" in messages(log, logging.ERROR)[0]
    assert read_latest(tmp_path / "checkpoint") == "step-10"
    with pytest.raises(ConfigError, match=r"No space left.*resumes from step-10"):
        run.train_to(30)
    run.manager.save_now(29)
    assert read_latest(tmp_path / "checkpoint") == "step-29"


def test_pinned_memory_mode_commits_after_the_upload(tmp_path, monkeypatch):
    """The mode itself needs a GPU: its two futures are stand-ins."""
    run = Run(tmp_path).train_to(9)
    staging: Future = Future()
    upload: Future = Future()
    save = CheckpointManager.dcp_save

    def pinned(self, state_dict, checkpoint_id, async_mode, *args):
        save(self, state_dict, checkpoint_id, AsyncMode.DISABLED)
        return AsyncSaveResponse(staging, upload)

    monkeypatch.setattr(CheckpointManager, "dcp_save", pinned)
    states = run.manager.resumable_state()
    folder = tmp_path / "checkpoint"
    response = run.manager.dcp_save(states, str(folder / "step-9"), AsyncMode.ASYNC_WITH_PINNED_MEM)
    assert response.staging_completion is staging
    assert not response.upload_completion.done() and not (folder / "latest").exists()
    upload.set_result(None)
    assert response.upload_completion.done() and read_latest(folder) == "step-9"


def test_full_disk_is_an_error_that_names_the_remedy(tmp_path, monkeypatch, log):
    run = Run(tmp_path).train_to(19)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(ConfigError, match=r"step-20 could not be saved: .*No space left.*resumes from step-10"):
        run.train_to(20)
    assert len(messages(log, logging.ERROR)) == 1
    assert read_latest(tmp_path / "checkpoint") == "step-10"


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_save_now(tmp_path, async_mode):
    run = Run(tmp_path, async_mode=async_mode, last_save_model_only=True).train_to(13)
    run.manager.save_now(13)
    folder = tmp_path / "checkpoint"
    assert read_latest(folder) == "step-13"
    resumed = Run(tmp_path)
    assert resumed.manager.load() and resumed.progress.step == 13
    assert torch.equal(resumed.train_to(15).weight(), run.train_to(15).weight())


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_save_now_does_not_save_twice(tmp_path, monkeypatch, async_mode):
    run = Run(tmp_path, async_mode=async_mode).train_to(10)
    saves = []
    monkeypatch.setattr(CheckpointManager, "dcp_save", lambda *args: saves.append(args))
    run.manager.save_now(10)
    assert saves == [] and read_latest(tmp_path / "checkpoint") == "step-10"


@pytest.mark.parametrize("settings", [{"enable": False}, {"load_only": True}])
def test_save_now_without_saving(tmp_path, log, settings):
    Run(tmp_path, **settings).manager.save_now(3)
    assert len(messages(log)) == 1 and list(tmp_path.iterdir()) == []


def test_model_only_last_save_is_replaced_by_save_now(tmp_path):
    run = Run(tmp_path, last_save_model_only=True).train_to(5)
    run.manager.save(5, last_step=True)
    with pytest.raises(ConfigError, match=r"step-5 holds the model alone .* checkpoint.initial_load_path"):
        Run(tmp_path).manager.load()
    run.manager.save_now(5)
    assert Run(tmp_path).manager.load()


def test_purge_keeps_k_complete_ones_and_latest(folder):
    shutil.copytree(folder / "step-30", folder / "broken-40")
    drop_manifest(folder, 10)
    (folder / "latest").write_text("step-20")
    run = Run(folder.parent, keep_latest_k=2)
    run.manager.load()
    shutil.copytree(folder / "step-30", folder / "purged-1")  # left by a run that was killed while deleting
    run.train_to(49)
    run.manager.close()
    assert names(folder) == {"step-10", "step-30", "step-40", "broken-40", "latest"}
    assert read_latest(folder) == "step-40"


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_finished_run_keeps_as_many_as_it_was_told(tmp_path, async_mode):
    run = Run(tmp_path, keep_latest_k=2, async_mode=async_mode).train_to(39)
    run.manager.save(39, last_step=True)
    run.manager.close()
    assert names(tmp_path / "checkpoint") == {"step-30", "step-39", "latest"}


def test_purge_spares_what_latest_names(folder):
    run = Run(folder.parent, keep_latest_k=2)
    (folder / "latest").write_text("step-10")
    run.manager.delete_stale()
    run.manager.close()
    assert names(folder) == {"step-10", "step-20", "step-30", "latest"}


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint.keep_latest_k"):
        Run(tmp_path, keep_latest_k=1)


def test_load_step(folder, log):
    run = Run(folder.parent)
    assert run.manager.load(20) and run.progress.step == 20
    assert "newer checkpoints up to step-30" in messages(log)[0]
    with pytest.raises(ConfigError, match=r"load_step = 25.*available: 10, 20, 30"):
        run.manager.load(25)
    flip_byte(folder, 20)
    with pytest.raises(ConfigError, match=r"load_step = 20.*other contents"):
        run.manager.load(20)
    drop_manifest(folder, 10)
    with pytest.raises(ConfigError, match=r"load_step = 10.*no manifest"):
        run.manager.load(10)
    assert names(folder) == {"step-10", "step-20", "step-30", "latest"}


def test_load_step_without_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"load_step = 5.*available: none"):
        Run(tmp_path).manager.load(5)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_initial_load_path(folder, tmp_path, exists, ours):
    if not ours:
        drop_manifest(folder, 20)  # as torchtitan itself would have saved it
    if exists:
        (tmp_path / "new" / "checkpoint" / "step-5").mkdir(parents=True)  # incomplete
    run = Run(tmp_path / "new", initial_load_path=str(folder / "step-20"))
    assert run.manager.load()
    assert run.progress.step == 0  # the model alone
    assert torch.equal(run.weight(), Run(tmp_path / "other").train_to(20).weight())
    run.train_to(10)
    assert (tmp_path / "new" / "checkpoint" / "latest").read_text() == "step-10"
    again = Run(tmp_path / "new", initial_load_path=str(folder / "step-20"))
    assert again.manager.load() and again.progress.step == 10


def test_initial_load_path_errors(folder, tmp_path):
    flip_byte(folder, 20)
    for path, reason in (
        (folder / "step-99", "no such folder"),
        (folder, "no .metadata"),
        (folder / "step-20", "other"),
    ):
        with pytest.raises(ConfigError, match=rf"checkpoint.initial_load_path = .*{reason}"):
            Run(tmp_path / "new", initial_load_path=str(path)).manager.load()
    with pytest.raises(ConfigError, match=r"initial_load_path = .*does not fit"):
        Run(tmp_path / "new", dim=4, initial_load_path=str(folder / "step-30")).manager.load()


def test_state_that_does_not_fit(folder, tmp_path):
    before = names(folder)
    with pytest.raises(ConfigError, match=r"step-30 does not fit this configuration: .*[Ss]ize.*run.json.*dump_folder"):
        Run(tmp_path, dim=4).manager.load()
    assert names(folder) == before


def _resume_on_a_rank(rank, path):
    store = dist.FileStore(str(path / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run = Run(path).train_to(30)
    folder = path / "checkpoint"
    if rank == 0:
        flip_byte(folder, 30)
    dist.barrier()
    run = Run(path)
    assert run.manager.load()
    outcome: list[int | str] = [run.progress.step]
    if rank == 0:
        for step in (10, 20):
            truncate(folder, step)
    dist.barrier()
    for step in (20, -1):
        try:
            Run(path).manager.load(step)
        except ConfigError as error:
            outcome.append(str(error))
    (path / f"rank-{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    mp.start_processes(_resume_on_a_rank, (tmp_path,), nprocs=2, start_method=PROCESSES.get_start_method())
    outcomes = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 20 and len(outcomes[0]) == 3
