"""Tensor parallelism in sparse phases equals one process whose patterns choose inside the shards, to rounding.

One process can be made to: it clusters neurons inside halves, and Venom's columns and a window of groups lie inside a
half already.
"""

import os
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import PROCESSES, fork, losses, merge, rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from configs.errors import ConfigError
from kernels import FeedForwardSparsity, Groups, Venom
from models.feed_forward import FeedForward
from recipes.restore import find_checkpoint
from recipes.sparsity import Sparsity
from scripts.trained import export_weights

LAST_STEP = 8
# Sparse from the first step: after some dense ones weights differ in their last digits, and clusters with them.
PHASES = ("--schedule.phases", '[{mode = "sparse", end = 5}, {mode = "dense", end = 1.0}]')
SHARDABLE = (
    "--model.n_kv_heads",
    "2",
    "--activations.v",
    "32",
    "--checkpoint.interval",
    "3",
    *PHASES,
    "--training.steps",
    "8",
)
TENSOR = ("--parallelism.tensor_parallel_degree", "2")
COMPILED = ("--compile.enable", "true", "--compile.components", "model", "--compile.backend", "aot_eager")


@pytest.fixture
def inside_halves(train, monkeypatch):
    """Train in this process with neurons clustered inside halves, as two ranks of tensor parallelism cluster them."""
    begin = Sparsity.__init__

    def init(self, *arguments):
        begin(self, *arguments)
        self.shards = 2

    monkeypatch.setattr(Sparsity, "__init__", init)
    return train


def run(tiny, folder, recipe: str, *words: str, processes: int) -> dict[int, dict]:
    command = merge(tiny, [*words, "--job.dump_folder", str(folder)])
    result = fork(
        *("--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *command), processes=processes
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return rows(folder)


def assert_alike(two: dict[int, dict], one: dict[int, dict]) -> None:
    # The same choice of the same weights. Another order of neurons changes the loss by 6e-5; the activations that they
    # are clustered by are equal to rounding, which moves some neurons.
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-4)
    # Adam divides by the root of small numbers, so rounding grows, and then some choices are others.
    assert losses(two) == pytest.approx(losses(one), rel=5e-3)
    assert two[LAST_STEP]["tokens"] == one[LAST_STEP]["tokens"]


def test_two_ranks_train_venom_and_2_4_weights_resume_and_export(tiny, inside_halves, tmp_path):
    """Checkpoints, their resume and the export are whole, whatever the layout."""
    one = inside_halves(tmp_path / "one", *SHARDABLE)
    two = run(tiny, tmp_path / "two", "venom_2of16", *SHARDABLE, *TENSOR, processes=2)
    assert_alike(two, one)
    assert two[4]["flip_rate"] == pytest.approx(one[4]["flip_rate"], rel=0.1)

    for name in ("again", "alone"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        for step in (6, LAST_STEP):
            shutil.rmtree(tmp_path / name / "checkpoint" / f"step-{step}")
        (tmp_path / name / "checkpoint" / "latest").write_text("step-3")
    again = run(tiny, tmp_path / "again", "venom_2of16", *SHARDABLE, *TENSOR, processes=2)
    assert losses(again) == losses(two)
    alone = inside_halves(tmp_path / "alone", *SHARDABLE)
    assert losses(alone) == pytest.approx(losses(two), rel=5e-3)
    # From the same neurons, scales and centroids one step leads to the same validation.
    for name in ("loss", "val_loss", "val_loss_sparse", "nonzero_share", "energy_kept", "router_balance"):
        assert alone[4][name] == pytest.approx(two[4][name], rel=1e-3 if name == "energy_kept" else 1e-4), name

    mine, theirs = (export_weights(find_checkpoint(str(tmp_path / name)), None) for name in ("two", "again"))
    assert mine["model.layers.0.mlp.up_proj.weight"].shape == (256, 32)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_compiled_ranks_give_the_losses_of_eager_ones(tiny, inside_halves, tmp_path):
    words = merge(list(SHARDABLE), ["--training.steps", "3", "--validation.enable", "false"])
    words = merge(words, ["--schedule.phases", '[{mode = "sparse", end = 2}, {mode = "dense", end = 1.0}]'])
    one = inside_halves(tmp_path / "one", *words)
    two = run(tiny, tmp_path / "two", "venom_2of16", *words, *TENSOR, *COMPILED, processes=2)
    assert {step: row["graphs_compiled"] for step, row in two.items() if row["graphs_compiled"]} == {1: 1, 3: 1}
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)


def test_four_ranks_shard_groups_by_fsdp_and_by_tensor(tiny, inside_halves, tmp_path):
    """With activation checkpointing; the rows of a shard of W1 are sharded again by FSDP."""
    words = (
        *SHARDABLE,
        *("--activations.window", "128", "--activations.g", "32", "--router.cluster_size", "32"),
        *("--router.cluster_by", "weights", "--activation_checkpoint.mode", "full"),
        *("--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    )
    one = inside_halves(tmp_path / "one", *words, recipe="groups_quarter")
    assert_alike(run(tiny, tmp_path / "four", "groups_quarter", *words, *TENSOR, processes=4), one)


def test_a_run_resumes_on_other_ranks_with_the_same_batches(tiny, train, tmp_path):
    dense = (
        "--schedule.phases",
        '[{mode = "dense"}]',
        "--schedule.decay_with_tail",
        "false",
        "--model.n_kv_heads",
        "2",
    )
    one = train(tmp_path / "one", *dense, recipe="dense")
    train(tmp_path / "run", *dense, recipe="dense", stop_after=4)
    with pytest.raises(ConfigError, match=r"batch is 8 sequences, but .* has 4: set training.global_batch_size = 4"):
        train(tmp_path / "run", *dense, "--training.local_batch_size", "8", recipe="dense")

    half = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    shutil.copytree(tmp_path / "run", tmp_path / "tensor")
    worker = ("--training.dataloader.num_workers", "1")
    found = run(tiny, tmp_path / "run", "dense", *dense, *half, *worker, processes=2)
    assert losses(found) == pytest.approx(losses(one), rel=1e-4)
    found = run(tiny, tmp_path / "tensor", "dense", *dense, *half, *TENSOR, processes=4)
    assert losses(found) == pytest.approx(losses(one), rel=1e-4)


PATTERNS = {
    "groups": (FeedForwardSparsity(Groups(16, 8, 0.5), clusters=4), Groups(16, 8, 0.5, window=32)),
    "venom": (FeedForwardSparsity(Venom(16, 2, 8), (1, 3), clusters=4), Venom(16, 2, 8)),
    "2:4": (FeedForwardSparsity(Venom(1, 2, 4), (1,)), Venom(1, 2, 4)),
    "weights": (FeedForwardSparsity(None, (1, 3)), None),
}


def _feed_forward(sparsity: FeedForwardSparsity) -> FeedForward:
    torch.manual_seed(0)
    ffn = FeedForward(16, 64, sparsity)
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(ffn.centroids)
    ffn.w1_scale.fill_(1.1)
    ffn.w2_scale.fill_(0.9)
    ffn.sparse = True
    return ffn


def _check_gradients(rank: int, port: str, failures) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    try:
        for name, (sparsity, whole) in PATTERNS.items():
            generator = torch.Generator().manual_seed(1)
            x, dy = (torch.randn(2, 32, 16, generator=generator) for _ in range(2))
            one = _feed_forward(replace(sparsity, pattern=whole))
            expected_x = x.clone().requires_grad_()
            expected = one(expected_x)
            expected.backward(dy)

            ffn = _feed_forward(sparsity)
            plan = {
                "": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "w1": ColwiseParallel(),
                "w2": RowwiseParallel(output_layouts=Shard(1)),
            }
            parallelize_module(ffn, mesh, plan)
            own_x = x.chunk(2, 1)[rank].clone().requires_grad_()
            y = ffn(own_x)
            y.backward(dy.chunk(2, 1)[rank])
            assert isinstance(ffn.w1.weight.grad, DTensor)
            pairs = {
                "y": (y, expected.chunk(2, 1)[rank]),
                "dx": (own_x.grad, expected_x.grad.chunk(2, 1)[rank]),
                "dW1": (ffn.w1.weight.grad.full_tensor(), one.w1.weight.grad),
                "dW2": (ffn.w2.weight.grad.full_tensor(), one.w2.weight.grad),
            }
            for what, (found, wanted) in pairs.items():
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f"{name}: {what}")
    except BaseException as error:
        failures.put(f"rank {rank}: {error!r}")
        raise
    finally:
        dist.destroy_process_group()


def test_gradients_of_a_sharded_ffn_are_those_of_a_pattern_that_chooses_inside_halves(free_port):
    failures = PROCESSES.Queue()
    started = [PROCESSES.Process(target=_check_gradients, args=(rank, free_port, failures)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0], failures.get(timeout=1)
