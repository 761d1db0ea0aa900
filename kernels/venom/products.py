"""Products (2), (3) and (5) over the compact form, in Triton: dense tiles times gathered rows of a weight.

The V tokens of a block share their columns, so the product of a block is a dense matrix product with gathered rows of
the weight as its second operand. The weights are stored with one row a neuron, so a gathered row is contiguous:

    reduce_neurons  y[block]      = sum over kept columns c:  tile[:, c] weight_rows[c, :]           (2) (5)
    sample_dy1      dy1[block, c] = 2 sqrt(h[block, c]) sum over d: dy[block, d] weight_rows[c, d]   (3)

The kernels address memory by pointers and load it with cp.async, so the same code runs on Ampere and Hopper. Operands
are bf16, sums float32; outputs are rounded once.

Every block of tokens that keeps a row reads it again. For L2 reuse, GROUP slabs of the second operand, narrow enough
for the L2 cache, are multiplied with all blocks before the next slabs.

Source: the gather along the reduction dimension is from VENOM, Castro et al., SC 2023.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def _tile(v: int) -> dict[str, int]:
    """Tile sizes and launch options for blocks of v tokens: sums fit into registers, stages into shared memory."""
    return {
        "BLOCK_N": min(256, 32768 // v),
        "BLOCK_K": 64,
        "GROUP": 4,  # slabs that fit into the L2 cache
        "num_warps": 8 if v >= 128 else 4,
        "num_stages": 3,
    }


@triton.jit
def _block_and_slab(blocks, slabs, GROUP: tl.constexpr):
    """The block and the slab of a program: all slabs of a group for one block, all blocks, then the next group."""
    pid = tl.program_id(0)
    first = pid // (GROUP * blocks) * GROUP
    size = min(slabs - first, GROUP)
    inside = pid % (GROUP * blocks)
    return inside // size, first + inside % size


@triton.jit
def _gather_reduce(
    out,
    tiles,
    index,
    source,
    order,
    rows,
    KEPT: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # KEPT and D are compile-time constants, so loops without a remainder need no masks.
    block, slab = _block_and_slab(tl.cdiv(rows, V), tl.cdiv(D, BLOCK_N), GROUP)
    row = tl.arange(0, V)
    n = slab * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles += block.to(tl.int64) * KEPT * V
    index += block * KEPT
    sums = tl.zeros((V, BLOCK_N), tl.float32)
    picked = tl.load(index + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < KEPT, other=0)
    for start in range(0, KEPT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        place = (k // WIDTH * (V * WIDTH) + k % WIDTH)[None, :] + row[:, None] * WIDTH
        left = tl.load(tiles + place, mask=(k < KEPT)[None, :], other=0)
        right = tl.load(
            source + picked.to(tl.int64)[:, None] * D + n[None, :],
            mask=(k < KEPT)[:, None] & (n < D)[None, :],
            other=0,
        )
        # Loaded one step ahead, so that the indices of a step's rows are in registers when it begins.
        picked = tl.load(index + BLOCK_K + k, mask=k + BLOCK_K < KEPT, other=0)
        sums = tl.dot(left, right, sums)
    row = block * V + row
    inside = row < rows
    if order is not None:
        row = tl.load(order + row, mask=inside, other=0)
    tl.store(
        out + row.to(tl.int64)[:, None] * D + n[None, :],
        sums.to(out.dtype.element_ty),
        mask=inside[:, None] & (n < D)[None, :],
    )


def reduce_neurons(
    tiles: Tensor, columns: Tensor, weight_rows: Tensor, tokens: int, order: Tensor | None = None
) -> Tensor:
    """See `kernels.venom.reduce_neurons`."""
    weight_rows = weight_rows.contiguous()
    v, d = tiles.shape[1], weight_rows.shape[1]
    blocks, tile = triton.cdiv(tokens, v), _tile(v)
    out = torch.empty(tokens, d, dtype=weight_rows.dtype, device=weight_rows.device)
    _gather_reduce[(blocks * triton.cdiv(d, tile["BLOCK_N"]),)](
        out,
        tiles,
        columns,
        weight_rows,
        order,
        tokens,
        columns.numel() // blocks,
        d,
        v,
        columns.shape[1],
        **tile,
    )
    return out


@triton.jit
def _sample_dy1(
    dy1_tiles,
    dy,
    weight_rows,
    columns,
    h_tiles,
    tokens,
    KEPT: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, slab = _block_and_slab(tl.cdiv(tokens, V), tl.cdiv(KEPT, BLOCK_N), GROUP)
    row = tl.arange(0, V)
    token = block * V + row
    c = slab * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.load(columns + block * KEPT + c, mask=c < KEPT, other=0)
    k = tl.arange(0, BLOCK_K)
    left = dy + token.to(tl.int64)[:, None] * D + k[None, :]
    right = weight_rows + column.to(tl.int64)[None, :] * D + k[:, None]
    sums = tl.zeros((V, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        sums = tl.dot(
            tl.load(left + start, mask=inside[None, :] & (token < tokens)[:, None], other=0),
            tl.load(right + start, mask=inside[:, None] & (c < KEPT)[None, :], other=0),
            sums,
        )
    place = block.to(tl.int64) * KEPT * V + (c // WIDTH * (V * WIDTH) + c % WIDTH)[None, :] + row[:, None] * WIDTH
    h = tl.load(h_tiles + place, mask=(c < KEPT)[None, :], other=0)
    dy1 = 2 * tl.sqrt(h.to(tl.float32)) * sums
    tl.store(dy1_tiles + place, dy1.to(dy1_tiles.dtype.element_ty), mask=(c < KEPT)[None, :])


def sample_dy1(dy: Tensor, weight_rows: Tensor, h_tiles: Tensor, columns: Tensor) -> Tensor:
    """See `kernels.venom.sample_dy1`."""
    dy, weight_rows = dy.contiguous(), weight_rows.contiguous()
    tokens, d = dy.shape
    v, width = h_tiles.shape[1:]
    blocks, tile = triton.cdiv(tokens, v), _tile(v)
    kept = columns.numel() // blocks
    dy1_tiles = torch.empty_like(h_tiles)
    _sample_dy1[(blocks * triton.cdiv(kept, tile["BLOCK_N"]),)](
        dy1_tiles,
        dy,
        weight_rows,
        columns,
        h_tiles,
        tokens,
        kept,
        d,
        v,
        width,
        **tile,
    )
    return dy1_tiles
