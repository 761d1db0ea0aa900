"""Groups of neurons that a large block of tokens keeps: every block is a small dense FFN of its own.

With blocks of a thousand sorted tokens a block can keep single neurons: the rows of W1 and W2^T that it keeps are
gathered once and used by a thousand tokens, so the gathering costs little beside the products, which are batches of
dense ones, and cuBLAS's. With `[B, V, d]` the tokens in blocks and `[B, K]` the neurons that each keeps:

    choose       sums of h over every `sample`-th token of a block, the K neurons of largest sum: [B, K]
    embedding    rows of a weight: [f, d] to [B, K, d]
    bmm          (1) x W1^T, (2) h W2^T, (3) dy W2, (5) dy1 W1 in the gathered rows; (4) and (6) to parts [B, K, d]
    scatter_sum  parts [B, K, d] to the weight's gradient [f, d]

Product (1) is needed at the kept neurons alone, once they are chosen; and for choosing, a sample of the block's tokens
does. Of the dense product 1/sample + keep is left, where tiles of 128 tokens need all of it. What that gains, and what
choosing neurons one by one for so many tokens loses, is predicted (kernels/README.md) and not measured yet.

The specification is `kernels.groups.group_mask`. Source: this project.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups.reference import Groups
from kernels.operators import operator, register_fake

WIDTH = 1024  # entries of a row that a program adds up


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
        `[B, K]` int64, ascending in a row.
    """
    count, hidden_dim = blocks.shape[0], w1.shape[0]
    active = (blocks[:, :: pattern.sample].flatten(0, 1) @ w1.T).relu()
    h = (active * active).view(count, -1, hidden_dim)
    sums = h.to(torch.promote_types(h.dtype, torch.float32)).sum(1).view(count, -1, pattern.g).sum(2)
    kept = sums.sort(dim=1, descending=True, stable=True).indices[:, : pattern.kept_groups(hidden_dim)]
    groups = kept.sort(dim=1).values
    return (groups[:, :, None] * pattern.g + torch.arange(pattern.g, device=w1.device)).view(count, -1)


@triton.jit
def _add_rows(parts, slot, out, blocks, hidden_dim, kept, D, WIDTH: tl.constexpr):
    SUM: tl.constexpr = tl.float64 if parts.dtype.element_ty == tl.float64 else tl.float32
    neuron, column = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], SUM)
    for block in range(blocks):
        place = tl.load(slot + block * hidden_dim + neuron)
        row = (block * kept + place).to(tl.int64)
        width = tl.where(place >= 0, D, 0)
        total += tl.load(parts + row * D + column, mask=column < width, other=0.0).to(SUM)
    tl.store(out + neuron.to(tl.int64) * D + column, total.to(out.dtype.element_ty), mask=column < D)


def _launch(parts: Tensor, chosen: Tensor, hidden_dim: int) -> Tensor:
    blocks, kept, width = parts.shape
    place = torch.arange(kept, dtype=torch.int32, device=parts.device).expand(blocks, -1)
    slot = torch.full((blocks, hidden_dim), -1, dtype=torch.int32, device=parts.device).scatter_(1, chosen, place)
    out = parts.new_empty(hidden_dim, width)
    grid = hidden_dim, triton.cdiv(width, WIDTH)
    _add_rows[grid](parts.contiguous(), slot, out, blocks, hidden_dim, kept, width, WIDTH=WIDTH)
    return out


def _reference(parts: Tensor, chosen: Tensor, hidden_dim: int) -> Tensor:
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32)).flatten(0, 1)
    return wide.new_zeros(hidden_dim, parts.shape[2]).index_add_(0, chosen.flatten(), wide).to(parts.dtype)


@operator("columns_scatter_sum")
def scatter_sum(parts: Tensor, chosen: Tensor, hidden_dim: int) -> Tensor:
    """Add up the blocks' rows of a weight's gradient, in the order of the blocks, so that every run adds alike.

    Args:
        parts: `[B, K, d]`, summed in float32 or wider.
        chosen: `[B, K]` int64: the neuron of each row, none twice in a block.
        hidden_dim: f.

    Returns:
        `[f, d]`, dtype of parts; zero where no block keeps a neuron.
    """
    with torch.cuda.device_of(parts):
        return (_launch if parts.is_cuda else _reference)(parts, chosen, hidden_dim)


@register_fake(scatter_sum)
def _(parts: Tensor, chosen: Tensor, hidden_dim: int) -> Tensor:
    return parts.new_empty(hidden_dim, parts.shape[2])
