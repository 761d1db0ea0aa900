"""Context parallelism: a rank has a share of each sequence, and its FFNs see the tokens of that share alone.

PyTorch's ring attention has no path on a CPU. There, ranks gather the keys and values of the whole sequences instead,
and attend by the positions of their own tokens: the same function, by which all else is tested. Then a run equals one
process whose sparse FFNs take the shares of a micro-batch one after the other, to rounding.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import fork, launch, merge, rows
from test_parallel import ALONE, LAST_STEP, ROUNDING, SHARDABLE, assert_steps_of_one
from torch import Tensor
from torchtitan.models.llama3.infra import parallelize

import recipes.check
from models.feed_forward import FeedForward

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


class Gather(torch.autograd.Function):
    """The tensors of all ranks, one above the other. Backward: all ranks' gradients of this one's tensor, added up."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


class GatheredAttention(torch.nn.Module):
    """What ring attention computes, from gathered keys and values: q, k, v are `[B, heads, S / ranks, D]`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.rank = group, dist.get_rank(group)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool = False) -> Tensor:
        k, v = (
            whole(list(Gather.apply(each.transpose(1, 2).contiguous(), self.group))).transpose(1, 2) for each in (k, v)
        )
        positions = torch.arange(k.shape[2]).view(1, -1, 1)
        own = shares(positions, self.group.size())[self.rank].flatten()
        mask = own[:, None] >= positions.flatten()
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=enable_gqa)


def gather_in_attention() -> None:
    """Let this process, of a run on CPUs, have context parallelism without ring attention."""

    def apply(modules, mesh, attention_type: str) -> None:
        gathered = GatheredAttention(mesh.get_group())
        for module in modules:
            module.forward = gathered.forward

    parallelize.apply_cp_to_attention_module = apply
    recipes.check.RING_ATTENTION["cpu"] = ("float32",)


def run(tiny, folder: Path, recipe: str, *words: str, processes: int = 2) -> dict[int, dict]:
    command = merge(tiny, [*words, "--job.dump_folder", str(folder)])
    words = ("--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *command)
    result = fork(*words, processes=processes, prepare=gather_in_attention)
    assert result.returncode == 0, result.stdout + result.stderr
    return rows(folder)


@pytest.fixture
def in_shares(train, monkeypatch):
    """Train in this process; sparse FFNs take the shares of two ranks one after the other."""
    sparse_forward = FeedForward._sparse_forward

    def by_share(self, x: Tensor) -> Tensor:
        return whole([sparse_forward(self, share) for share in shares(x, 2)])

    monkeypatch.setattr(FeedForward, "_sparse_forward", by_share)
    return train


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_two_shares_of_each_sequence_take_the_steps_of_one_process_and_resume_on_it(tiny, in_shares, tmp_path):
    """In both modes, with both validations, the switch, checkpoints, and the count of tokens."""
    folder, words = tmp_path / "two", (*WORDS, "16", "--activations.g", "32")
    two = run(tiny, folder, "groups_quarter", *words, *CONTEXT)
    one = in_shares(tmp_path / "one", *words, recipe="groups_quarter", stop_after=1)
    for name in ("loss", "grad_norm", "tokens"):
        assert two[1][name] == pytest.approx(one[1][name], rel=ROUNDING)
    assert_steps_of_one(
        folder, lambda copy, step: in_shares(copy, *words, recipe="groups_quarter", stop_after=step), (3, 5)
    )
    assert two[LAST_STEP]["tokens"] == LAST_STEP * 2 * 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_shares_of_sequences_on_shards_of_neurons_take_the_steps_of_one_process(tiny, in_shares, tmp_path):
    """With tensor parallelism: two ranks have a share of the tokens, and each of them half of the neurons."""
    folder, words = tmp_path / "four", (*WORDS, "32")
    run(tiny, folder, "venom_2of16", *words, *CONTEXT, *TENSOR, processes=4)
    assert_steps_of_one(folder, lambda copy, step: in_shares(copy, *words, stop_after=step), (3,))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", ["dense", "columns_quarter"])
def test_ring_attention_follows_one_gpu(tiny, train, tmp_path, recipe):
    """Compiled, in bf16. Dense it is one GPU's run to bf16; in sparse phases a rank chooses among its own tokens."""
    words = ("--model.dim", "128", "--training.seq_len", "1024", "--activations.v", "512", "--compile.enable", "true")
    words += ("--training.mixed_precision_param", "bfloat16")
    words += ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false") * (recipe == "dense")
    one = train(tmp_path / "one", *words, recipe=recipe)
    command = ["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *tiny]
    result = launch(*merge(command, [*words, *CONTEXT, "--job.dump_folder", str(tmp_path / "two")]), processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    two = rows(tmp_path / "two")
    for step, row in one.items():
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=0.01 if recipe == "dense" else 0.03)
        assert two[step]["tokens"] == row["tokens"]
