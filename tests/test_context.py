"""Context parallelism: a rank has a share of each sequence, and its FFNs see the tokens of that share alone.

A run equals one process whose sparse FFNs take the shares of a micro-batch one after the other, to rounding. PyTorch's
ring attention is for the attention kernels of GPUs; here the same ring is put around the one for CPUs.
"""

from pathlib import Path

import pytest
import torch
from conftest import launch, merge, rows, run_ranks
from test_parallel import ALONE, COMPILED, LAST_STEP, ROUNDING, SHARDABLE, assert_steps_of_one
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from models.feed_forward import FeedForward
from recipes.check import RING_ATTENTION

CONTEXT = ("--parallelism.context_parallel_degree", "2")
TENSOR = ("--parallelism.tensor_parallel_degree", "2")
WORDS = (
    *(*SHARDABLE, *ALONE, "--router.cluster_size", "32", "--router.cluster_by", "weights"),
    *("--training.global_batch_size", "2", "--activations.v"),
)


def shares(sequences: Tensor, ranks: int) -> list[Tensor]:
    """The shares `[B, S / ranks, d]` of sequences `[B, S, d]`: rank r has the r-th part from the start and the end."""
    parts = sequences.chunk(2 * ranks, 1)
    return [torch.cat([parts[rank], parts[-1 - rank]], 1) for rank in range(ranks)]


def whole(parts: list[Tensor]) -> Tensor:
    """The sequences of those shares."""
    heads, tails = zip(*(part.chunk(2, 1) for part in parts), strict=True)
    return torch.cat([*heads, *reversed(tails)], 1)


def ring_attention(op, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
    """PyTorch's ring around its attention for CPUs, forward or backward, of a rank's `[B, heads, S / ranks, D]`."""
    mesh = args[0].device_mesh
    names = [argument.name for argument in op._schema.arguments]
    given = {name: arg.to_local() if isinstance(arg, DTensor) else arg for name, arg in zip(names, args, strict=False)}
    given = {"dropout_p": 0.0, **given, **kwargs}
    if "grad_out" in given:
        results = ring._templated_ring_attention_backward(mesh.get_group(), 2, op, grad_out_name="grad_out", **given)
    else:
        results = ring._templated_ring_attention(mesh.get_group(), 2, op, **given)
    return tuple(DTensor.from_local(each, mesh, [Shard(2)], run_check=False) for each in results)


def ring_on_a_cpu() -> None:
    """Let this process, of a run on CPUs, have context parallelism."""
    aten = torch.ops.aten
    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu.default] = ring_attention
    ring.custom_ops[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] = ring_attention
    RING_ATTENTION["cpu"] = ("float32",)


def run(tiny, folder: Path, recipe: str, *words: str, processes: int = 2) -> dict[int, dict]:
    return run_ranks(tiny, folder, recipe, *words, processes=processes, prepare=ring_on_a_cpu)


@pytest.fixture
def in_shares(train, monkeypatch, request):
    """Train in this process; sparse FFNs take the shares of two ranks, or of so many, one after the other."""
    sparse_forward, ranks = FeedForward._sparse_forward, getattr(request, "param", 2)

    def by_share(self, x: Tensor) -> Tensor:
        return whole([sparse_forward(self, share) for share in shares(x, ranks)])

    monkeypatch.setattr(FeedForward, "_sparse_forward", by_share)
    return train


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_two_shares_of_each_sequence_take_the_steps_of_one_process(tiny, in_shares, tmp_path):
    """Compiled, in both modes, with both validations, the switch, checkpoints, the count of tokens; one key head.

    A micro-batch of a sparse phase is two of a dense one.
    """
    folder, words = tmp_path / "two", (*WORDS, "16", "--activations.g", "32", "--model.n_kv_heads", "1")
    words += ("--training.sparse_local_batch_size", "2")
    two = run(tiny, folder, "groups_quarter", *words, *CONTEXT, *COMPILED)
    one = in_shares(tmp_path / "one", *words, recipe="groups_quarter", stop_after=1)
    for name in ("loss", "grad_norm", "tokens"):
        assert two[1][name] == pytest.approx(one[1][name], rel=ROUNDING)
    assert_steps_of_one(
        folder, lambda copy, step: in_shares(copy, *words, recipe="groups_quarter", stop_after=step), (3, 5)
    )
    assert two[LAST_STEP]["tokens"] == LAST_STEP * 2 * 64


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("layout", [TENSOR, ("--parallelism.data_parallel_shard_degree", "2")], ids=["tensor", "fsdp"])
def test_shares_of_sequences_on_four_ranks_take_the_steps_of_one_process(tiny, in_shares, tmp_path, layout):
    """Two ranks have a share of the tokens: each half of the neurons, or each other sequences."""
    folder, words = tmp_path / "four", (*WORDS, "32")
    run(tiny, folder, "venom_2of16", *words, *CONTEXT, *layout, processes=4)
    assert_steps_of_one(folder, lambda copy, step: in_shares(copy, *words, stop_after=step), (3,))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("in_shares", [4], indirect=True)
def test_four_shares_of_each_sequence_take_the_steps_of_one_process(tiny, in_shares, tmp_path):
    folder, words = tmp_path / "four", (*WORDS, "16", "--schedule.dense_layers", "1")
    run(tiny, folder, "columns_quarter", *words, CONTEXT[0], "4", processes=4)
    assert_steps_of_one(
        folder, lambda copy, step: in_shares(copy, *words, recipe="columns_quarter", stop_after=step), (3, 5)
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_shares_of_sequences_pass_through_stages_and_take_the_steps_of_one_process(tiny, in_shares, tmp_path):
    folder, words = tmp_path / "four", (*WORDS, "16", "--activations.g", "32")
    pipeline = ("--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2")
    run(tiny, folder, "groups_quarter", *words, *CONTEXT, *pipeline, processes=4)
    assert_steps_of_one(
        folder, lambda copy, step: in_shares(copy, *words, recipe="groups_quarter", stop_after=step), (3, 5)
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", ["dense", "columns_quarter"])
def test_ring_attention_follows_one_gpu(tiny, train, tmp_path, recipe):
    """Compiled, in bf16. Dense it is one GPU's run to bf16; in sparse phases a rank chooses among its own tokens."""
    words = ("--model.dim", "128", "--training.seq_len", "1024", "--activations.v", "512", "--compile.enable", "true")
    # The tiny corpus holds out five sequences of this length.
    words += ("--training.mixed_precision_param", "bfloat16", "--validation.sequences", "4")
    words += ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false") * (recipe == "dense")
    one = train(tmp_path / "one", *words, recipe=recipe)
    command = ["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *tiny]
    result = launch(*merge(command, [*words, *CONTEXT, "--job.dump_folder", str(tmp_path / "two")]), processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    two = rows(tmp_path / "two")
    for step, row in one.items():
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=0.01 if recipe == "dense" else 0.03)
        assert two[step]["tokens"] == row["tokens"]
