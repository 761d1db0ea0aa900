"""Operators of large blocks in fp8, in Triton: they cast operands, copy rows of weights and multiply.

The tensor cores multiply fp8 twice as fast as bf16, but only operands that are contiguous along the reduction
dimension. x and h are reduced over d and f in one product and over the tokens in another. So the pass that casts them
writes them twice, once transposed. The FFN needs most of these passes in bf16 as well: it permutes tokens, copies rows
of weights and squares y1. With `[B, V, d]` the tokens in blocks and K the number of neurons that each block keeps:

    cast             x or dy, permuted into blocks
    quantise         a weight
    chosen_by        y1 of the tokens that each block chooses by
    sample           (1) x W1^T and (3) dy W2 at the kept neurons, and the largest magnitude of each block
    cast_square      h, from y1
    reduce_neurons   (2) h W2^T and (5) dy1 W1, in the original order of the tokens
    cast_gradient    dy1 = 2 sqrt(h) * dh
    reduce_tokens    (4) dy^T h and (6) dy1^T x, added over the blocks

One Triton kernel, `_products`, computes the products of all blocks: TMA loads, tiles of 256 x 128 x 128, float32 sums.
Its epilogue saves a pass: it finds the largest magnitude, which the next scale needs, or restores the order of the
tokens. Scales: `kernels.float8`. Measurements: kernels/README.md. Source: this project.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.columns import add_rows, parts_of
from kernels.float8 import E4M3
from kernels.operators import operator, register_fake

ROWS, WIDTH = 64, 128  # tile of the kernels that cast and copy
TILE_M, TILE_N, TILE_K = 256, 128, 128  # tile of `_products`
# Epilogues of `_products`: none; the largest magnitude; that of the positive entries; rows in the order of the tokens.
PLAIN, PEAK, POSITIVE_PEAK, ORDERED = 0, 1, 2, 3


@triton.jit
def _store_both(values, out, out_t, block, row, column, rows, columns):
    """Store a tile to out `[B, rows, columns]` and, transposed, to out_t `[B, columns, rows]`."""
    first = block.to(tl.int64) * rows * columns
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + first + row[:, None] * columns + column[None, :], values, mask=inside)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out_t + first + column[:, None] * rows + row[None, :], tl.trans(values), mask=inside)


@triton.jit
def _cast(x, order, inverse, out, out_t, tokens, V, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    tiles = tl.cdiv(V, ROWS)
    block, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = block * V + row
    exists = (row < V) & (at < tokens)
    token = tl.load(order + at, mask=exists, other=0).to(tl.int64)
    inside = exists[:, None] & (column < D)[None, :]
    tile = tl.load(x + token[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_both((tile * tl.load(inverse + block)).to(tl.float8e4nv), out, out_t, block, row, column, V, D)


@triton.jit
def _cast_kept(
    y, h, inverse, scale_h, out, out_t, V, K, GRADIENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Cast h, from y = y1; or with GRADIENT dy1, from y = dh and h `[B, K, V]`."""
    tiles = tl.cdiv(V, ROWS)
    block, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = block.to(tl.int64) * V * K
    inside = (row < V)[:, None] & (column < K)[None, :]
    tile = tl.load(y + first + row[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GRADIENT:
        inside = (column < K)[:, None] & (row < V)[None, :]
        squares = tl.load(h + first + column[:, None] * V + row[None, :], mask=inside, other=0.0)
        tile *= 2.0 * tl.sqrt(tl.trans(squares).to(tl.float32) * tl.load(scale_h + block))
    else:
        tile = tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tile = tile * tile
    _store_both((tile * tl.load(inverse + block)).to(tl.float8e4nv), out, out_t, block, row, column, V, K)


@triton.jit
def _quantise(weight, inverse, out, F, D, neuron_stride, column_stride, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Cast a weight, each part of `rows` rows with a scale of its own."""
    neuron = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (neuron < F)[:, None] & (column < D)[None, :]
    at = (neuron.to(tl.int64) * neuron_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    factor = tl.load(inverse + neuron // rows, mask=neuron < F, other=0.0)
    tile = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(out + neuron.to(tl.int64)[:, None] * D + column[None, :], tile.to(tl.float8e4nv), mask=inside)


@triton.jit
def _copy(weight, kept, out, K, D, ROWS: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    tiles = tl.cdiv(K, ROWS)
    block, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    neuron = tl.load(kept + block * K + row, mask=row < K, other=0).to(tl.int64)
    inside = (row < K)[:, None] & (column < D)[None, :]
    tile = tl.load(weight + neuron[:, None] * D + column[None, :], mask=inside)
    first = block.to(tl.int64) * K * D
    if TRANSPOSED:
        inside = (column < D)[:, None] & (row < K)[None, :]
        tl.store(out + first + column[:, None] * K + row[None, :], tl.trans(tile), mask=inside)
    else:
        tl.store(out + first + row[:, None] * D + column[None, :], tile, mask=inside)


@triton.jit
def _products(
    a, b, out, scale_a, scale_b, peak, order, which, tokens, M, N, K,
    END: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """out[i] `[M, N]` = a[i] `[M, K]` times b[i]^T, b[i] `[N, K]`, times two scales, with the epilogue END.

    With `which`, b[which[i]] in the place of b[i].
    """
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    tile = tl.program_id(0)
    block, inside = tile // (tiles_m * tiles_n), tile % (tiles_m * tiles_n)
    m, n = inside % tiles_m * TILE_M, inside // tiles_m * TILE_N
    of_b = block if which is None else tl.load(which + block)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for k in range(0, K, TILE_K):
        left = a.load([block, m, k]).reshape(TILE_M, TILE_K)
        right = b.load([of_b, n, k]).reshape(TILE_N, TILE_K)
        total = tl.dot(left, right.T, total)
    total *= tl.load(scale_a + block) * tl.load(scale_b + block)
    value = total.to(out.dtype.element_ty)
    row, column = m + tl.arange(0, TILE_M), n + tl.arange(0, TILE_N)
    exists = (row < M)[:, None] & (column < N)[None, :]
    at = block.to(tl.int64) * M * N + row[:, None] * N + column[None, :]
    if END == 1 or END == 2:  # PEAK, POSITIVE_PEAK: the bits of magnitudes have their order, NaN is the largest
        size = value.to(tl.float32)
        size = tl.abs(size) if END == 1 else tl.abs(tl.maximum(size, 0.0, propagate_nan=tl.PropagateNan.ALL))
        tl.atomic_max(peak + block, tl.max(tl.where(exists, size, 0.0).to(tl.int32, bitcast=True)))
    if END == 3:  # ORDERED: each row is written to the row of its token
        exists = exists & (block * M + row < tokens)[:, None]
        token = tl.load(order + block * M + row, mask=(row < M) & (block * M + row < tokens), other=0)
        at = token.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out + at, value, mask=exists)


def _launch_products(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    end: int,
    peak: Tensor | None = None,
    order: Tensor | None = None,
    which: Tensor | None = None,
) -> Tensor:
    (blocks, m, k), n = a.shape, b.shape[1]
    grid = (blocks * triton.cdiv(m, TILE_M) * triton.cdiv(n, TILE_N),)
    # The kernel needs a pointer for every argument; one that the epilogue does not use may point anywhere.
    others = (out if each is None else each for each in (peak, order))
    _products[grid](
        TensorDescriptor.from_tensor(a, [1, TILE_M, TILE_K]), TensorDescriptor.from_tensor(b, [1, TILE_N, TILE_K]),
        out, scale_a, scale_b, *others, which, 0 if order is None else order.shape[0], m, n, k,
        END=end, TILE_M=TILE_M, TILE_N=TILE_N, TILE_K=TILE_K, num_stages=4, num_warps=8,
    )  # fmt: skip
    return out


def _launch_cast(x: Tensor, order: Tensor, inverse: Tensor, v: int) -> tuple[Tensor, Tensor]:
    (tokens, width), blocks = x.shape, inverse.shape[0]
    out, out_t = x.new_empty(blocks, v, width, dtype=E4M3), x.new_empty(blocks, width, v, dtype=E4M3)
    grid = blocks * triton.cdiv(v, ROWS), triton.cdiv(width, WIDTH)
    _cast[grid](x, order, inverse, out, out_t, tokens, v, width, ROWS=ROWS, WIDTH=WIDTH)
    return out, out_t


def _launch_kept(y: Tensor, inverse: Tensor, h: Tensor | None, scale_h: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks, v, kept = y.shape
    out, out_t = y.new_empty(y.shape, dtype=E4M3), y.new_empty(blocks, kept, v, dtype=E4M3)
    grid = blocks * triton.cdiv(v, ROWS), triton.cdiv(kept, WIDTH)
    others = (y, inverse, inverse) if h is None else (h, inverse, scale_h)
    _cast_kept[grid](y, *others, out, out_t, v, kept, GRADIENT=h is not None, ROWS=ROWS, WIDTH=WIDTH)
    return out, out_t


def _launch_quantise(weight: Tensor, inverse: Tensor) -> Tensor:
    out = weight.new_empty(weight.shape, dtype=E4M3)
    grid = triton.cdiv(weight.shape[0], ROWS), triton.cdiv(weight.shape[1], WIDTH)
    rows = weight.shape[0] // inverse.numel()
    _quantise[grid](weight, inverse, out, *weight.shape, *weight.stride(), rows, ROWS=ROWS, WIDTH=WIDTH)
    return out


def _launch_copy(weight: Tensor, kept: Tensor, transposed: bool) -> Tensor:
    (blocks, count), width = kept.shape, weight.shape[1]
    out = weight.new_empty((blocks, width, count) if transposed else (blocks, count, width))
    grid = blocks * triton.cdiv(count, ROWS), triton.cdiv(width, WIDTH)
    _copy[grid](weight, kept, out, count, width, ROWS=ROWS, WIDTH=WIDTH, TRANSPOSED=transposed)
    return out


def _reference_products(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide) @ b.to(wide).mT) * (scale_a * scale_b).to(wide)[:, None, None]


def _reference_cast(x: Tensor, order: Tensor, inverse: Tensor, v: int) -> tuple[Tensor, Tensor]:
    blocks = torch.zeros(inverse.shape[0] * v, x.shape[1], dtype=torch.float32)
    blocks[: x.shape[0]] = x[order]
    out = (blocks.view(-1, v, x.shape[1]) * inverse[:, None, None]).to(E4M3)
    return out, out.mT.contiguous()


def _reference_kept(y: Tensor, inverse: Tensor, h: Tensor | None, scale_h: Tensor | None) -> tuple[Tensor, Tensor]:
    y = y.float()
    value = y.relu() ** 2
    if h is not None and scale_h is not None:
        value = y * 2 * (h.mT.float() * scale_h[:, None, None]).sqrt()
    out = (value * inverse[:, None, None]).to(E4M3)
    return out, out.mT.contiguous()


def _reference_quantise(weight: Tensor, inverse: Tensor) -> Tensor:
    parts = weight.float().unflatten(0, (inverse.numel(), -1)) * inverse.view(-1, 1, 1)
    return parts.flatten(0, 1).to(E4M3).contiguous()


def _reference_copy(weight: Tensor, kept: Tensor, transposed: bool) -> Tensor:
    rows = weight.view(torch.uint8)[kept.long()].view(E4M3)
    return rows.mT.contiguous() if transposed else rows


def _check(x: Tensor) -> None:
    """Refuse float32 on a GPU: Triton 3.6 transposes an fp8 tile that was cast from it wrongly, leaving entries out."""
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f"fp8 casts on a GPU need bfloat16, got {x.dtype}")


def _copied(weight: Tensor, kept: Tensor, transposed: bool) -> Tensor:
    with torch.cuda.device_of(weight):
        return (_launch_copy if weight.is_cuda else _reference_copy)(weight, kept, transposed)


def kept_neurons(place: Tensor, kept: int) -> Tensor:
    """The neurons that each block keeps, `[B, K]` int32, ascending, from `place [B, f]` of `kernels.columns.choose`."""
    neurons = torch.arange(place.shape[1], dtype=torch.int32, device=place.device).expand_as(place)
    # Dropped neurons are all written to one more column.
    out = torch.zeros(place.shape[0], kept + 1, dtype=torch.int32, device=place.device)
    return out.scatter(1, torch.where(place < 0, kept, place).long(), neurons)[:, :kept].contiguous()


@operator("columns_fp8_cast")
def cast(x: Tensor, order: Tensor, inverse: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """Permute tokens into blocks and cast them to fp8: x[order] / scale.

    Args:
        x: `[T, d]`, bf16 on a GPU.
        order: `[T]` int32, a permutation.
        inverse: `[B]` float32, 1 / scale of each block, B = ceil(T / V).
        v: V, tokens in a block.

    Returns:
        `[B, V, d]` e4m3 and its transpose `[B, d, V]`; the last block is padded with zeros.

    Raises:
        ValueError: on a GPU, x is not bf16. So do `cast_square` and `cast_gradient`.
    """
    _check(x)
    with torch.cuda.device_of(x):
        return (_launch_cast if x.is_cuda else _reference_cast)(x.contiguous(), order, inverse, v)


@register_fake(cast)
def _(x: Tensor, order: Tensor, inverse: Tensor, v: int) -> tuple[Tensor, Tensor]:
    blocks, width = inverse.shape[0], x.shape[1]
    return x.new_empty(blocks, v, width, dtype=E4M3), x.new_empty(blocks, width, v, dtype=E4M3)


@operator("columns_fp8_cast_square")
def cast_square(y1: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Cast h = relu(y1)^2 to fp8.

    Args:
        y1: `[B, V, K]`, bf16 on a GPU.
        inverse: `[B]` float32, 1 / scale of h.

    Returns:
        `[B, V, K]` e4m3 and its transpose `[B, K, V]`.
    """
    _check(y1)
    with torch.cuda.device_of(y1):
        return (_launch_kept if y1.is_cuda else _reference_kept)(y1, inverse, None, None)


@operator("columns_fp8_cast_gradient")
def cast_gradient(dh: Tensor, inverse: Tensor, h: Tensor, scale_h: Tensor) -> tuple[Tensor, Tensor]:
    """Cast dy1 = 2 sqrt(h) * dh to fp8.

    Args:
        dh: `[B, V, K]`, bf16 on a GPU.
        inverse: `[B]` float32, 1 / scale of dy1.
        h: `[B, K, V]` e4m3, the transpose from `cast_square`.
        scale_h: `[B]` float32, scale of h.

    Returns:
        `[B, V, K]` e4m3 and its transpose `[B, K, V]`.
    """
    _check(dh)
    with torch.cuda.device_of(dh):
        return (_launch_kept if dh.is_cuda else _reference_kept)(dh, inverse, h, scale_h)


def _empty_kept(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape, dtype=E4M3), y.new_empty(y.shape[0], y.shape[2], y.shape[1], dtype=E4M3)


@register_fake(cast_square)
def _(y1: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_kept(y1)


@register_fake(cast_gradient)
def _(dh: Tensor, inverse: Tensor, h: Tensor, scale_h: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_kept(dh)


@operator("columns_fp8_quantise")
def quantise(weight: Tensor, inverse: Tensor) -> Tensor:
    """Cast a weight to fp8.

    Args:
        weight: `[E f, d]`, floating point, any strides: of an FFN, or of E experts.
        inverse: `[]` float32, 1 / scale of the weight; or `[E]`, of each expert's.

    Returns:
        `[E f, d]` e4m3, contiguous.
    """
    with torch.cuda.device_of(weight):
        return (_launch_quantise if weight.is_cuda else _reference_quantise)(weight, inverse)


@register_fake(quantise)
def _(weight: Tensor, inverse: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=E4M3)


@operator("columns_fp8_chosen_by")
def chosen_by(
    x: Tensor, weight: Tensor, every: int, scale: Tensor, dtype: torch.dtype, expert: Tensor | None = None
) -> Tensor:
    """y1, without the scale of x, of the tokens that each block chooses by, for all neurons.

    Args:
        x: `[B, V, d]` e4m3.
        weight: `[f, d]` e4m3: W1; with `expert` `[E, f, d]`, of E experts.
        every: a block chooses by its tokens 0, every, 2 every, ...
        scale: `[1]` float32, scale of the weight; with `expert` `[B]`, for each block. The caller multiplies by the
            scales of x.
        dtype: of the result.
        expert: `[B]` int32, the expert of each block; None: there is one weight.

    Returns:
        `[B, S, f]`, S = ceil(V / every).
    """
    tokens = x[:, ::every].contiguous()
    if expert is None:
        flat, weight = tokens.view(1, -1, x.shape[2]), weight[None]
    else:
        flat = tokens
    one = torch.ones_like(scale)
    if not x.is_cuda:
        rows = weight if expert is None else weight.view(torch.uint8)[expert.long()].view(E4M3)
        return _reference_products(flat, rows, one, scale, dtype).to(dtype).view(*tokens.shape[:2], -1)
    out = x.new_empty(*flat.shape[:2], weight.shape[1], dtype=dtype)
    with torch.cuda.device_of(x):
        return _launch_products(flat, weight, out, one, scale, PLAIN, which=expert).view(*tokens.shape[:2], -1)


@register_fake(chosen_by)
def _(x: Tensor, weight: Tensor, every: int, scale: Tensor, dtype: torch.dtype, expert: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // every), weight.shape[-2], dtype=dtype)


@operator("columns_fp8_sample")
def sample(
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    scale_x: Tensor,
    scale_weight: Tensor,
    positive: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Products (1) and (3) at the kept neurons of each block, x W1^T and dy W2, and the peak of each block.

    Args:
        x: `[B, V, d]` e4m3: x for (1), dy for (3).
        weight: `[E f, d]` e4m3: W1 for (1), W2^T for (3).
        kept: `[B, K]` int32, rows of the weight, from `kept_neurons`.
        scale_x, scale_weight: `[B]` float32, for each block the scales of x and of the weight.
        positive: whether the peak is the largest positive entry, instead of the largest magnitude.
        dtype: of the result.

    Returns:
        `[B, V, K]`, and the peaks `[B]` float32: of the entries as rounded to `dtype`; 0 if there is no positive entry,
        NaN if an entry is NaN.
    """
    rows = _copied(weight, kept, False)
    if not x.is_cuda:
        out = _reference_products(x, rows, scale_x, scale_weight, dtype).to(dtype)
        return out, (out.relu() if positive else out.abs()).float().amax((1, 2))
    out = x.new_empty(*x.shape[:2], kept.shape[1], dtype=dtype)
    peak = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _launch_products(x, rows, out, scale_x, scale_weight, POSITIVE_PEAK if positive else PEAK, peak)
    return out, peak.view(torch.float32)


@register_fake(sample)
def _(
    x: Tensor,
    weight: Tensor,
    kept: Tensor,
    scale_x: Tensor,
    scale_weight: Tensor,
    positive: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], kept.shape[1], dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@operator("columns_fp8_reduce_neurons")
def reduce_neurons(
    h: Tensor, weight: Tensor, kept: Tensor, scale_h: Tensor, scale_weight: Tensor, order: Tensor, dtype: torch.dtype
) -> Tensor:
    """Products (2) and (5) over the kept neurons of each block: h W2^T and dy1 W1.

    Args:
        h: `[B, V, K]` e4m3: h for (2), dy1 for (5).
        weight: `[E f, d]` e4m3: W2^T for (2), W1 for (5).
        kept: `[B, K]` int32, rows of the weight, from `kept_neurons`.
        scale_h, scale_weight: `[B]` float32, for each block the scales of h and of the weight.
        order: `[T]` int32, a permutation: row t of all blocks is written to row order[t].
        dtype: of the result.

    Returns:
        `[T, d]`, in the original order of the tokens.
    """
    tokens, rows = order.shape[0], _copied(weight, kept, True)
    if not h.is_cuda:
        found = _reference_products(h, rows, scale_h, scale_weight, dtype).flatten(0, 1)[:tokens].to(dtype)
        return torch.empty_like(found).index_copy_(0, order.long(), found)
    out = h.new_empty(tokens, weight.shape[1], dtype=dtype)
    with torch.cuda.device_of(h):
        return _launch_products(h, rows, out, scale_h, scale_weight, ORDERED, order=order)


@register_fake(reduce_neurons)
def _(
    h: Tensor, weight: Tensor, kept: Tensor, scale_h: Tensor, scale_weight: Tensor, order: Tensor, dtype: torch.dtype
) -> Tensor:
    return h.new_empty(order.shape[0], weight.shape[1], dtype=dtype)


@operator("columns_fp8_reduce_tokens")
def reduce_tokens(
    h: Tensor,
    x: Tensor,
    place: Tensor,
    scale_h: Tensor,
    scale_x: Tensor,
    transposed: bool,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
) -> Tensor:
    """Products (4) and (6): dW2 = dy^T h and dW1 = dy1^T x. Blocks are added in ascending order.

    Args:
        h: `[B, K, V]` e4m3, transposed: h for (4), dy1 for (6).
        x: `[B, d, V]` e4m3, transposed: dy for (4), x for (6).
        place: `[B, f]` int32, from `kernels.columns.choose`.
        scale_h, scale_x: `[B]` float32, for each block the scales of h and of x.
        transposed: return x^T h `[d, E f]`, as (4) needs; otherwise h^T x `[E f, d]`.
        dtype: of the result, and of the part of each block.
        bounds: `[E + 1]` int32, the blocks of each expert, as of `kernels.columns.sample`; None: E = 1, of all blocks.

    Returns:
        `[d, E f]` or `[E f, d]`; the sum over blocks is float32 or wider. Zero for neurons that no block keeps.
    """
    if not h.is_cuda:
        return add_rows(_reference_products(h, x, scale_h, scale_x, dtype).to(dtype), place, transposed, bounds)
    parts = h.new_empty(*h.shape[:2], x.shape[1], dtype=dtype)
    with torch.cuda.device_of(h):
        return add_rows(_launch_products(h, x, parts, scale_h, scale_x, PLAIN), place, transposed, bounds)


@register_fake(reduce_tokens)
def _(
    h: Tensor,
    x: Tensor,
    place: Tensor,
    scale_h: Tensor,
    scale_x: Tensor,
    transposed: bool,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
) -> Tensor:
    neurons, width = place.shape[1] * parts_of(bounds), x.shape[1]
    return x.new_empty((width, neurons) if transposed else (neurons, width), dtype=dtype)
