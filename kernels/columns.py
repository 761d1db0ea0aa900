"""Groups of neurons that a large block of tokens keeps: every block is a small dense FFN of its own.

With blocks of a thousand sorted tokens a block can keep single neurons: the rows of W1 and W2^T that it keeps are
gathered once and used by a thousand tokens, so the gathering costs little beside the products, which are batches of
dense ones, and cuBLAS's. With `[B, V, d]` the tokens in blocks and `[B, K]` the neurons that each keeps:

    choose           sums of h over every `sample`-th token of a block, the K neurons of largest sum: [B, K]
    sample           (1) x W1^T and (3) dy W2 at the chosen neurons: [B, V, K]
    reduce_neurons   (2) h W2^T and (5) dy1 W1: [B, V, d]
    reduce_tokens    (4) dy^T h and (6) dy1^T x: parts [B, K, d], added up to the weight's gradient

Product (1) is needed at the kept neurons alone, once they are chosen; and for choosing, a sample of the block's tokens
does. Of the dense product 1/sample + keep is left, where tiles of 128 tokens need all of it. The gathered rows live as
long as a product: the operators hide them from torch.compile, which would find the same gathering in the backward pass
and keep them for it.

The specification is `kernels.groups.group_mask`. Source: this project.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups.reference import Groups
from kernels.operators import operator, register_fake


def in_blocks(x: Tensor, v: int) -> Tensor:
    """`[T, d]` to `[B, V, d]`, V = min(v, T), the last block filled up with zeros."""
    v = min(v, x.shape[0])
    missing = -x.shape[0] % v
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).view(-1, v, x.shape[1])


def choose(blocks: Tensor, w1: Tensor, pattern: Groups) -> Tensor:
    """The neurons that each block of tokens keeps.

    Args:
        blocks: `[B, V, d]`.
        w1: `[f, d]`.
        pattern: with a budget of every block's own.

    Returns:
        `[B, K]` int32, ascending in a row.
    """
    count, hidden_dim = blocks.shape[0], w1.shape[0]
    active = (blocks[:, :: pattern.sample].flatten(0, 1) @ w1.T).relu()
    h = (active * active).view(count, -1, hidden_dim)
    sums = h.to(torch.promote_types(h.dtype, torch.float32)).sum(1).view(count, -1, pattern.g).sum(2)
    kept = sums.sort(dim=1, descending=True, stable=True).indices[:, : pattern.kept_groups(hidden_dim)]
    groups = kept.int().sort(dim=1).values  # int32 sorts in half the passes
    return (groups[:, :, None] * pattern.g + torch.arange(pattern.g, dtype=torch.int32, device=w1.device)).view(
        count, -1
    )


@triton.jit
def _copy_rows(weight, chosen, out, blocks, kept, D, WIDTH: tl.constexpr):
    # The blocks take turns: the rows that one of them reads are still in the cache when another wants them.
    row = tl.program_id(0) % blocks * kept + tl.program_id(0) // blocks
    source, target = weight + tl.load(chosen + row).to(tl.int64) * D, out + row.to(tl.int64) * D
    for start in range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        tl.store(target + column, tl.load(source + column, mask=column < D), mask=column < D)


@triton.jit
def _add_rows(
    parts,
    slot,
    out,
    blocks,
    hidden_dim,
    kept,
    D,
    neuron_stride,
    column_stride,
    NEURONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    SUM: tl.constexpr = tl.float64 if parts.dtype.element_ty == tl.float64 else tl.float32
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = (neuron < hidden_dim)[:, None] & (column < D)[None, :]
    total = tl.zeros([NEURONS, WIDTH], SUM)
    for block in range(blocks):
        place = tl.load(slot + block * hidden_dim + neuron, mask=neuron < hidden_dim, other=-1)
        row = parts + (block * kept + place).to(tl.int64) * D
        total += tl.load(row[:, None] + column[None, :], mask=exists & (place >= 0)[:, None], other=0.0).to(SUM)
    at = out + (neuron.to(tl.int64) * neuron_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=exists)


def _launch_copy(weight: Tensor, chosen: Tensor) -> Tensor:
    (blocks, kept), width = chosen.shape, weight.shape[1]
    out = weight.new_empty(blocks, kept, width)
    _copy_rows[(blocks * kept,)](weight.contiguous(), chosen, out, blocks, kept, width, WIDTH=1024)
    return out


def _launch_add(parts: Tensor, chosen: Tensor, hidden_dim: int, transposed: bool) -> Tensor:
    blocks, kept, width = parts.shape
    place = torch.arange(kept, dtype=torch.int32, device=parts.device).expand(blocks, -1)
    slot = torch.full((blocks, hidden_dim), -1, dtype=torch.int32, device=parts.device)
    slot.scatter_(1, chosen.long(), place)
    out = parts.new_empty((width, hidden_dim) if transposed else (hidden_dim, width))
    column, neuron = out.stride() if transposed else out.stride()[::-1]
    grid = triton.cdiv(hidden_dim, 32), triton.cdiv(width, 128)
    _add_rows[grid](parts, slot, out, blocks, hidden_dim, kept, width, neuron, column, NEURONS=32, WIDTH=128)
    return out


def _reference_add(parts: Tensor, chosen: Tensor, hidden_dim: int, transposed: bool) -> Tensor:
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32)).flatten(0, 1)
    out = wide.new_zeros(hidden_dim, parts.shape[2]).index_add_(0, chosen.flatten(), wide).to(parts.dtype)
    return out.T.contiguous() if transposed else out


def _rows(weight: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows of a weight, `[B, K, d]`."""
    if not weight.is_cuda:
        return F.embedding(chosen, weight)
    with torch.cuda.device_of(weight):
        return _launch_copy(weight, chosen)


@operator("columns_sample")
def sample(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """x times the transposed weight, at the neurons that a block keeps: products (1) and (3).

    Args:
        x: `[B, V, d]`: x, or dy.
        weight: `[f, d]`, same dtype: W1, or W2^T.
        chosen: `[B, K]` int32, as of `choose`. So below.

    Returns:
        `[B, V, K]`.
    """
    return torch.bmm(x, _rows(weight, chosen).mT)


@register_fake(sample)
def _(x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], chosen.shape[1])


@operator("columns_reduce_neurons")
def reduce_neurons(h: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """The kept columns times a weight's rows: products (2) and (5).

    Args:
        h: `[B, V, K]`: h, or dy1.
        weight: `[f, d]`, same dtype: W2^T, or W1.
        chosen: `[B, K]`.

    Returns:
        `[B, V, d]`.
    """
    return torch.bmm(h, _rows(weight, chosen))


@register_fake(reduce_neurons)
def _(h: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:2], weight.shape[1])


@operator("columns_reduce_tokens")
def reduce_tokens(h: Tensor, x: Tensor, chosen: Tensor, hidden_dim: int, transposed: bool) -> Tensor:
    """The transposed kept columns times x, blocks added up in their order: products (6) and, transposed, (4).

    Args:
        h: `[B, V, K]`: h, or dy1.
        x: `[B, V, d]`, same dtype: dy, or x.
        chosen: `[B, K]`.
        hidden_dim: f.
        transposed: give `[d, f]` instead of `[f, d]`.

    Returns:
        `[f, d]` or `[d, f]`, a block's part in the dtype of x, their sum in float32 or wider; zero where no block keeps
        a neuron.
    """
    parts = torch.bmm(h.mT, x)
    with torch.cuda.device_of(x):
        return (_launch_add if x.is_cuda else _reference_add)(parts, chosen, hidden_dim, transposed)


@register_fake(reduce_tokens)
def _(h: Tensor, x: Tensor, chosen: Tensor, hidden_dim: int, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[2], hidden_dim) if transposed else (hidden_dim, x.shape[2]))
