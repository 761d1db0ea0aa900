"""Column groups of large blocks: each block of tokens is a small dense FFN of the neurons that it keeps.

A block of a thousand sorted tokens can keep single neurons: the rows of W1 and W2^T that it keeps are copied once and
used by a thousand tokens, so copying costs little compared with the products, which are batched dense products by
cuBLAS. With `[B, V, d]` the tokens in blocks and K the number of neurons that each block keeps:

    choose           sum h over every `sample`-th token of a block and keep the K neurons with the largest sums, of all
                     neurons or of each window; `balance` divides the sums by a power of their mean over the blocks
    sample           (1) x W1^T and (3) dy W2 at the chosen neurons: [B, V, K]
    reduce_neurons   (2) h W2^T and (5) dy1 W1: [B, V, d]
    reduce_tokens    (4) dy^T h and (6) dy1^T x: parts [B, K, d], which are added to the gradient of the weight

The choice needs product (1) only for a sample of the block's tokens, and after it (1) is needed only at the kept
neurons. The cost is 1/sample + keep of the dense product. A small sample is cheap but increases the loss
(docs/studies/windows_12m). With sample = 1, y1 is known for all neurons and is still computed again at the kept ones,
because gathering them from y1 took longer (see kernels/README.md). Copied rows are freed after each product: they are
inside the operators, because torch.compile would otherwise store them for the backward pass.

The specification is `kernels.groups.group_mask`; `ffn` combines the operators. Source: this project.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups.pattern import Groups, balanced
from kernels.groups.select import sort_key
from kernels.operators import operator, register_fake


def in_blocks(x: Tensor, v: int) -> Tensor:
    """x `[T, d]` as blocks of tokens `[B, V, d]`, V = min(v, T); the last block is padded with zeros."""
    v = min(v, x.shape[0])
    missing = -x.shape[0] % v
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).view(-1, v, x.shape[1])


def choose(y1: Tensor, pattern: Groups, kind: Tensor | None = None, kinds: int = 1) -> Tensor:
    """Choose the neurons that each block of tokens keeps.

    Args:
        y1: `[B, S, f]`, floating point: x W1^T of every `sample`-th token of each block, S = ceil(V / sample).
        pattern: the column groups to keep.
        kind, kinds: blocks balance their choices among those of one kind, see `kernels.groups.pattern.balanced`.

    Returns:
        place `[B, f]` int32: the index of a kept neuron among the K kept neurons of the block, ascending; -1 for a
        neuron that the block drops.
    """
    active = y1.relu()
    h = active * active
    sums = h.to(torch.promote_types(h.dtype, torch.float32)).sum(1)
    sums = balanced(sums.view(y1.shape[0], -1, pattern.g).sum(2), pattern.balance, kind, kinds)
    groups = sums.shape[1]
    in_window = pattern.window // pattern.g if pattern.window else groups
    place = keep_largest(sums, pattern.kept_groups(y1.shape[2]) * in_window // groups, in_window)
    if pattern.g == 1:
        return place
    inside = torch.arange(pattern.g, dtype=torch.int32, device=y1.device)
    return torch.where(place >= 0, place * pattern.g, -pattern.g)[:, :, None].add(inside).flatten(1).clamp(min=-1)


@triton.jit
def _keep_largest(
    sums, place, rows, windows, groups, kept, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Rank the groups of ROWS windows. A window has `groups` groups, and a block has `windows` windows."""
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GROUPS)
    at, inside = row[:, None] * groups + group[None, :], (row < rows)[:, None] & (group < groups)[None, :]
    key = tl.where(inside, sort_key(tl.load(sums + at, mask=inside, other=0.0)), -1)
    # The smallest kept key, found bit by bit: the largest number that at least `kept` keys are not below.
    least = tl.zeros([ROWS], tl.int32)
    for bit in range(31):
        higher = least | (1 << (30 - bit))
        least = tl.where(tl.sum((key >= higher[:, None]).to(tl.int32), 1) >= kept, higher, least)
    above, equal = key > least[:, None], key == least[:, None]
    left = kept - tl.sum(above.to(tl.int32), 1)
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= left[:, None]))
    first = (row % windows) * kept - 1
    tl.store(place + at, tl.where(keep, first[:, None] + tl.cumsum(keep.to(tl.int32), 1), -1), mask=inside)


@triton.jit
def _copy_rows(
    weight, place, bounds, out, blocks, hidden_dim, kept, D, neuron_stride, column_stride,
    NEURONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy rows of a tile of the weight to every block that keeps them; `_add_rows` is its transpose."""
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = (neuron < hidden_dim)[:, None] & (column < D)[None, :]
    expert, first, last = tl.program_id(2).to(tl.int64), 0, blocks
    if bounds is not None:
        first, last = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    row_of_weight = expert * hidden_dim + neuron
    at = (row_of_weight * neuron_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    tile = tl.load(weight + at, mask=exists)
    for block in range(first, last):
        where = tl.load(place + block * hidden_dim + neuron, mask=neuron < hidden_dim, other=-1)
        row = out + (block * kept + where).to(tl.int64) * D
        tl.store(row[:, None] + column[None, :], tile, mask=exists & (where >= 0)[:, None])


@triton.jit
def _add_rows(
    parts, place, bounds, out, blocks, hidden_dim, kept, D, neuron_stride, column_stride,
    NEURONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if parts.dtype.element_ty == tl.float64 else tl.float32
    neuron = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = (neuron < hidden_dim)[:, None] & (column < D)[None, :]
    expert, first, last = tl.program_id(2).to(tl.int64), 0, blocks
    if bounds is not None:
        first, last = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    total = tl.zeros([NEURONS, WIDTH], SUM)
    for block in range(first, last):
        where = tl.load(place + block * hidden_dim + neuron, mask=neuron < hidden_dim, other=-1)
        row = parts + (block * kept + where).to(tl.int64) * D
        total += tl.load(row[:, None] + column[None, :], mask=exists & (where >= 0)[:, None], other=0.0).to(SUM)
    row_of_weight = expert * hidden_dim + neuron
    at = (row_of_weight * neuron_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=exists)


def _launch_largest(sums: Tensor, kept: int, window: int) -> Tensor:
    place = sums.new_empty(sums.shape, dtype=torch.int32)
    rows, width = sums.numel() // window, triton.next_power_of_2(window)
    at_once = max(1, 1024 // width)  # windows of a program, so that it has at least 1024 groups
    _keep_largest[(triton.cdiv(rows, at_once),)](
        sums.contiguous(), place, rows, sums.shape[1] // window, window, kept,
        ROWS=at_once, GROUPS=width, num_warps=16 if width > 1024 else 4,
    )  # fmt: skip
    return place


def _launch_copy(weight: Tensor, place: Tensor, kept: int, bounds: Tensor | None = None) -> Tensor:
    (blocks, hidden_dim), width = place.shape, weight.shape[1]
    out = weight.new_empty(blocks, kept, width)
    grid = triton.cdiv(hidden_dim, 32), triton.cdiv(width, 128), parts_of(bounds)
    _copy_rows[grid](
        weight, place, bounds, out, blocks, hidden_dim, kept, width, *weight.stride(), NEURONS=32, WIDTH=128
    )
    return out


def _launch_add(parts: Tensor, place: Tensor, transposed: bool, bounds: Tensor | None = None) -> Tensor:
    (blocks, kept, width), hidden_dim = parts.shape, place.shape[1]
    rows = hidden_dim * parts_of(bounds)
    out = parts.new_empty((width, rows) if transposed else (rows, width))
    grid = triton.cdiv(hidden_dim, 32), triton.cdiv(width, 128), parts_of(bounds)
    strides = (out.T if transposed else out).stride()
    _add_rows[grid](parts, place, bounds, out, blocks, hidden_dim, kept, width, *strides, NEURONS=32, WIDTH=128)
    return out


def parts_of(bounds: Tensor | None) -> int:
    """Parts of the weight, such as experts, of which a block keeps rows of one."""
    return 1 if bounds is None else bounds.shape[0] - 1


def _kept_rows(place: Tensor, bounds: Tensor | None) -> Tensor:
    """`[B K]` int64, the rows of the weight that each block keeps."""
    block, neuron = (place >= 0).nonzero().unbind(1)
    if bounds is None:
        return neuron
    return torch.searchsorted(bounds[1:], block, right=True) * place.shape[1] + neuron


def _reference_largest(sums: Tensor, kept: int, window: int) -> Tensor:
    windows = sums.unflatten(1, (-1, window))
    largest = windows.sort(dim=2, descending=True, stable=True).indices[:, :, :kept]
    keep = torch.zeros_like(windows, dtype=torch.bool).scatter_(2, largest, True).flatten(1)
    return torch.where(keep, keep.cumsum(1) - 1, -1).int()


def _reference_copy(weight: Tensor, place: Tensor, kept: int, bounds: Tensor | None = None) -> Tensor:
    return weight[_kept_rows(place, bounds)].view(-1, kept, weight.shape[1])


def _reference_add(parts: Tensor, place: Tensor, transposed: bool, bounds: Tensor | None = None) -> Tensor:
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32)).flatten(0, 1)
    out = wide.new_zeros(place.shape[1] * parts_of(bounds), parts.shape[2])
    out.index_add_(0, _kept_rows(place, bounds), wide)
    return (out.T if transposed else out).to(parts.dtype).contiguous()


def _copied(weight: Tensor, place: Tensor, kept: int, bounds: Tensor | None) -> Tensor:
    """The rows of a weight that each block keeps, `[B, K, d]`."""
    with torch.cuda.device_of(weight):
        return (_launch_copy if weight.is_cuda else _reference_copy)(weight, place, kept, bounds)


def add_rows(parts: Tensor, place: Tensor, transposed: bool, bounds: Tensor | None = None) -> Tensor:
    """Add the rows of each block's kept neurons, parts `[B, K, d]`, over the blocks.

    Returns:
        `[E f, d]` or, transposed, `[d, E f]`, contiguous, in the dtype of parts; sums are float32 or wider.
    """
    with torch.cuda.device_of(parts):
        return (_launch_add if parts.is_cuda else _reference_add)(parts, place, transposed, bounds)


@operator("columns_keep_largest")
def keep_largest(sums: Tensor, kept: int, window: int) -> Tensor:
    """Keep the `kept` largest entries in every window of a row; the lower index wins a tie, NaN is the largest.

    Args:
        sums: `[B, G]`, non-negative. On a GPU the kernel ranks float32; PyTorch's sort ranks other dtypes.
        kept: entries that a window keeps.
        window: entries in a window, a divisor of G; G: a row is one window.

    Returns:
        `[B, G]` int32: for a kept entry the number of kept entries before it in its row; -1 for the others.
    """
    ranked = sums.is_cuda and sums.dtype == torch.float32  # the kernel compares the bits as int32
    with torch.cuda.device_of(sums):
        return (_launch_largest if ranked else _reference_largest)(sums, kept, window)


@register_fake(keep_largest)
def _(sums: Tensor, kept: int, window: int) -> Tensor:
    return sums.new_empty(sums.shape, dtype=torch.int32)


@operator("columns_sample")
def sample(x: Tensor, weight: Tensor, place: Tensor, kept: int, bounds: Tensor | None = None) -> Tensor:
    """Products (1) and (3) at the kept neurons of each block: x W1^T and dy W2.

    Args:
        x: `[B, V, d]`: x for (1), dy for (3).
        weight: `[E f, d]`, dtype of x, any strides: W1 for (1), W2^T for (3).
        place: `[B, f]` int32, from `choose`.
        kept: K, the number of neurons that a block keeps.
        bounds: `[E + 1]` int32: of the E experts whose weights are the parts of `weight`, expert e has the blocks
            bounds[e] to bounds[e + 1] - 1. None: E = 1, of all blocks.

    Returns:
        `[B, V, K]` in the dtype of x.
    """
    return torch.bmm(x, _copied(weight, place, kept, bounds).mT)


@register_fake(sample)
def _(x: Tensor, weight: Tensor, place: Tensor, kept: int, bounds: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:2], kept)


@operator("columns_reduce_neurons")
def reduce_neurons(h: Tensor, weight: Tensor, place: Tensor, bounds: Tensor | None = None) -> Tensor:
    """Products (2) and (5): h W2^T and dy1 W1, over the kept neurons of each block.

    Args:
        h: `[B, V, K]`: h for (2), dy1 for (5).
        weight: `[E f, d]`, dtype of h, any strides: W2^T for (2), W1 for (5).
        place: `[B, f]` int32, from `choose`.
        bounds: as of `sample`.

    Returns:
        `[B, V, d]` in the dtype of h.
    """
    return torch.bmm(h, _copied(weight, place, h.shape[2], bounds))


@register_fake(reduce_neurons)
def _(h: Tensor, weight: Tensor, place: Tensor, bounds: Tensor | None = None) -> Tensor:
    return h.new_empty(*h.shape[:2], weight.shape[1])


@operator("columns_reduce_tokens")
def reduce_tokens(h: Tensor, x: Tensor, place: Tensor, transposed: bool, bounds: Tensor | None = None) -> Tensor:
    """Products (4) and (6): dW2 = dy^T h and dW1 = dy1^T x. Blocks are added in ascending order.

    Args:
        h: `[B, V, K]`: h for (4), dy1 for (6).
        x: `[B, V, d]`, dtype of h: dy for (4), x for (6).
        place: `[B, f]` int32, from `choose`.
        transposed: return x^T h `[d, E f]`, as (4) needs; otherwise h^T x `[E f, d]`.
        bounds: as of `sample`.

    Returns:
        `[d, E f]` or `[E f, d]` in the dtype of x. The part of each block is rounded to that dtype; the sum over blocks
        is float32 or wider. Zero for neurons that no block keeps.
    """
    return add_rows(torch.bmm(h.mT, x), place, transposed, bounds)


@register_fake(reduce_tokens)
def _(h: Tensor, x: Tensor, place: Tensor, transposed: bool, bounds: Tensor | None = None) -> Tensor:
    rows = place.shape[1] * parts_of(bounds)
    return x.new_empty((x.shape[2], rows) if transposed else (rows, x.shape[2]))
