"""Tensor parallelism in sparse phases equals one process whose patterns choose inside the shards, to rounding.

Each step is compared from the same state, a checkpoint of the sharded run that one process goes on from: after several
steps, rounding has grown and moved some choices of neurons. One process can be made to choose inside the shards: it
clusters neurons inside halves, and Venom's columns and a window of groups lie inside a half already.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import PROCESSES, go_on_after, losses, merge, rows, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from configs.errors import ConfigError
from kernels import FeedForwardSparsity, Groups, Venom
from models.feed_forward import FeedForward
from recipes.restore import find_checkpoint
from recipes.sparsity import Sparsity
from scripts.chaos import _read
from scripts.trained import export_weights

LAST_STEP = 6
# Sparse from the first step: after some dense ones weights differ in their last digits, and clusters with them.
PHASES = ("--schedule.phases", '[{mode = "sparse", end = 4}, {mode = "dense", end = 1.0}]')
SHARDABLE = (
    *("--model.n_kv_heads", "2", "--activations.v", "32", "--checkpoint.interval", "1"),
    *(*PHASES, "--training.steps", str(LAST_STEP), "--validation.freq", "3"),
    *("--validation.sequences", "8"),  # without rows that fill up a batch, which the health would count
)
# One sequence, of two blocks, to a micro-batch: validation has the same micro-batches whatever the ranks.
ALONE = ("--training.local_batch_size", "1", "--training.seq_len", "64")
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


def gradients(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The whole gradient of each parameter in a step, clipped: Adam's mean m became b1 m + (1 - b1) g."""
    before, after = (_read(run / "checkpoint" / f"step-{each}")["optimizer"] for each in (step - 1, step))
    beta = json.loads((run / "run.json").read_text())["config"]["optimizer"]["beta1"]
    means = [name for name in after if name.endswith(".exp_avg")]
    return {name.split(".", 1)[1]: (after[name] - beta * before[name]) / (1 - beta) for name in means}


# Two layouts add the same float32 numbers in another order. Each addition rounds by up to 6e-8, and a number passes
# through about 2000 of them on its way forward and back (the widths of two layers and of the vocabulary, and the
# tokens). Independent roundings grow by the root of that, to 3e-6, and the gradient is a difference of means, which
# makes it ten times as much. One neuron that was chosen otherwise would move the gradient of W2 by 1e-2.
ROUNDING = 3e-5


def assert_same_step(run: Path, other: Path, step: int, tolerance: float = ROUNDING) -> None:
    """That from one checkpoint both took the same step: loss, gradient of every parameter, validation, health."""
    mine, theirs = rows(run)[step], rows(other)[step]
    compared = {"loss", "grad_norm", "tokens", "nonzero_share", "energy_kept", "router_balance"}
    compared |= {name for name in theirs if name.startswith("val_")}
    assert {name: mine[name] for name in compared & mine.keys()} == pytest.approx(
        {name: theirs[name] for name in compared & theirs.keys()}, rel=tolerance
    )
    found, expected = gradients(run, step), gradients(other, step)
    assert found.keys() == expected.keys() and len(found) == 2 * 8 + 3
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / gradient.norm()).item()
        assert error < tolerance, f"step {step}, {name}: {error:.1e}"


def assert_steps_of_one(
    run: Path, one_goes_on: Callable[[Path, int], object], steps: Sequence[int], tolerance: float = ROUNDING
) -> None:
    """That one process takes the steps of a run, each from the run's checkpoint before it."""
    for step in steps:
        copy = go_on_after(step - 1, run, run.with_name(f"{run.name}-{step}"))
        one_goes_on(copy, step)
        assert_same_step(copy, run, step, tolerance)


def test_two_ranks_train_venom_and_2_4_weights_resume_and_export(tiny, inside_halves, tmp_path):
    """Checkpoints, their resume and the export are whole, whatever the layout."""
    folder = tmp_path / "two"
    two = run_ranks(tiny, folder, "venom_2of16", *SHARDABLE, *TENSOR, processes=2)
    one = inside_halves(tmp_path / "one", *SHARDABLE, stop_after=1)
    # Another order of neurons changes the loss by 6e-5; the activations that they are clustered by are equal to
    # rounding, which moves some neurons. From then on the order is in the checkpoints.
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    # Steps of the sparse phase and of the dense one, the third with the pattern's validation.
    assert_steps_of_one(folder, lambda copy, step: inside_halves(copy, *SHARDABLE, stop_after=step), (2, 3, 5))
    assert rows(tmp_path / "two-3")[3]["flip_rate"] == pytest.approx(two[3]["flip_rate"], rel=0.01)

    again = go_on_after(3, folder, tmp_path / "again")
    assert losses(run_ranks(tiny, again, "venom_2of16", *SHARDABLE, *TENSOR, processes=2)) == losses(two)
    mine, theirs = (export_weights(find_checkpoint(str(each)), None) for each in (folder, again))
    assert mine["model.layers.0.mlp.up_proj.weight"].shape == (256, 32)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("recipe", ["columns_quarter", "groups_quarter"])
def test_two_shards_of_neurons_sort_tokens_by_the_same_clusters(tiny, inside_halves, tmp_path, recipe):
    words = (*SHARDABLE, *ALONE, "--training.global_batch_size", "1", "--router.token_clusters", "4")
    words += ("--activations.window", "128", "--router.cluster_by", "weights", "--router.cluster_size", "32")
    words += ("--activations.g", "32") if recipe == "groups_quarter" else ()
    folder = tmp_path / "two"
    two = run_ranks(tiny, folder, recipe, *words, *TENSOR, processes=2)

    def one_goes_on(copy: Path, step: int) -> dict[int, dict]:
        return inside_halves(copy, *words, recipe=recipe, stop_after=step)

    one = one_goes_on(tmp_path / "one", 1)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=ROUNDING)
    assert_steps_of_one(folder, one_goes_on, (2, 5))


def test_compiled_ranks_take_the_steps_of_an_eager_process(tiny, inside_halves, tmp_path):
    words = merge(list(SHARDABLE), ["--training.steps", "3", "--validation.enable", "false"])
    words = merge(words, ["--schedule.phases", '[{mode = "sparse", end = 2}, {mode = "dense", end = 1.0}]'])
    two = run_ranks(tiny, tmp_path / "two", "venom_2of16", *words, *TENSOR, *COMPILED, processes=2)
    assert {step: row["graphs_compiled"] for step, row in two.items() if row["graphs_compiled"]} == {1: 1, 3: 1}
    assert_steps_of_one(
        tmp_path / "two", lambda copy, step: inside_halves(copy, *words, stop_after=step if step < 3 else None), (2, 3)
    )


def test_four_ranks_shard_groups_by_fsdp_and_by_tensor(tiny, inside_halves, tmp_path):
    """With activation checkpointing; the rows of a shard of W1 are sharded again by FSDP."""
    words = (
        *SHARDABLE,
        *("--activations.window", "128", "--activations.g", "32", "--router.cluster_size", "32"),
        *("--router.cluster_by", "weights", "--activation_checkpoint.mode", "full"),
        *(*ALONE, "--training.global_batch_size", "2"),
    )
    folder = tmp_path / "four"
    four = run_ranks(tiny, folder, "groups_quarter", *words, *TENSOR, processes=4)

    def one_goes_on(copy: Path, step: int) -> dict[int, dict]:
        return inside_halves(copy, *words, recipe="groups_quarter", stop_after=step)

    # Clustered by their weights, neurons have the same order on one process from the start.
    one = one_goes_on(tmp_path / "one", 1)
    assert four[1]["loss"] == pytest.approx(one[1]["loss"], rel=ROUNDING)
    assert four[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=ROUNDING)
    assert_steps_of_one(folder, one_goes_on, (3, 5))


@pytest.mark.parametrize("recipe", ["venom_2of16", "columns_quarter", "columns_quarter_fp8"])
def test_two_shards_take_the_steps_of_one(tiny, train, tmp_path, recipe):
    """FSDP2: a rank's micro-batch is one of two that one process computes after each other."""
    words = (*SHARDABLE, "--training.global_batch_size", "2")
    words += (
        FP8 if recipe.endswith("fp8") else (*ALONE, "--router.cluster_size", "32", "--router.cluster_by", "weights")
    )
    folder = tmp_path / "two"
    run_ranks(tiny, folder, recipe, *words, processes=2)
    assert_steps_of_one(folder, lambda copy, step: train(copy, *words, recipe=recipe, stop_after=step), (2, 3, 5))


def test_replicated_shards_take_the_steps_of_one_and_go_on_under_fsdp(tiny, train, tmp_path):
    """HSDP: two replicas of two shards, in a sparse and a dense phase."""
    words = (*SHARDABLE, "--router.cluster_size", "32", "--router.cluster_by", "weights")
    words += (*ALONE, "--training.global_batch_size", "4")
    replicas = ("--parallelism.data_parallel_replicate_degree", "2")
    folder = tmp_path / "four"
    four = run_ranks(tiny, folder, "columns_quarter", *words, *replicas, processes=4)
    assert_steps_of_one(
        folder, lambda copy, step: train(copy, *words, recipe="columns_quarter", stop_after=step), (3, 5)
    )

    again = go_on_after(3, folder, tmp_path / "again")
    two = run_ranks(tiny, again, "columns_quarter", *words, processes=2)
    assert_same_step(again, folder, 4)
    assert two[LAST_STEP]["tokens"] == four[LAST_STEP]["tokens"]


def test_a_run_resumes_on_other_ranks_with_the_same_batches(tiny, train, tmp_path):
    dense = (
        "--schedule.phases",
        '[{mode = "dense"}]',
        "--schedule.decay_with_tail",
        "false",
        "--model.n_kv_heads",
        "2",
        "--checkpoint.interval",
        "4",
    )
    one = train(tmp_path / "one", *dense, recipe="dense")
    train(tmp_path / "run", *dense, recipe="dense", stop_after=4)
    with pytest.raises(ConfigError, match=r"batch is 8 sequences, but .* has 4: set training.global_batch_size = 4"):
        train(tmp_path / "run", *dense, "--training.local_batch_size", "8", recipe="dense")

    half = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    shutil.copytree(tmp_path / "run", tmp_path / "tensor")
    worker = ("--training.dataloader.num_workers", "1")
    found = run_ranks(tiny, tmp_path / "run", "dense", *dense, *half, *worker, processes=2)
    assert losses(found) == pytest.approx(losses(one), rel=1e-4)
    found = run_ranks(tiny, tmp_path / "tensor", "dense", *dense, *half, *TENSOR, processes=4)
    assert losses(found) == pytest.approx(losses(one), rel=1e-4)


def in_halves(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    """The FFN of tokens `x [T, dim]`, its two halves one after the other."""
    w1, w2 = ffn.w1.weight.chunk(2), ffn.w2.weight.chunk(2, 1)
    first, second = (ffn._sparse_tokens(x, *half) for half in zip(w1, w2, strict=True))
    return first + second


# Where a number lies between two of fp8's, rounding in float32 decides which it becomes: it is off by up to an eighth.
# That is 0.125 / sqrt(8192) = 1.4e-3 of the gradient of W1 or W2, which have 8192 entries, and a few may be: 7e-5 was
# seen. One process that chooses among all neurons, with scales of whole matrices, is off by 0.15.
FP8_ROUNDING = 3e-3
FP8 = (
    *("--activations.v", "512", "--training.seq_len", "512", "--training.local_batch_size", "1"),
    # Rounding moves a token between two clusters, and so which tokens of a block choose: few tokens, of few clusters.
    *("--router.token_clusters", "4"),
)


def test_two_ranks_train_in_fp8_with_a_scale_for_each_shard(tiny, train, tmp_path, monkeypatch):
    words = (*SHARDABLE, *FP8, "--training.global_batch_size", "1")
    folder = tmp_path / "two"
    run_ranks(tiny, folder, "columns_quarter_fp8", *words, *TENSOR, processes=2)
    monkeypatch.setattr(FeedForward, "_sparse_forward", lambda ffn, x: in_halves(ffn, x.flatten(0, -2)).view_as(x))

    def one_goes_on(copy: Path, step: int) -> dict[int, dict]:
        return train(copy, *words, recipe="columns_quarter_fp8", stop_after=step)

    assert_steps_of_one(folder, one_goes_on, (3, 5), FP8_ROUNDING)


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
