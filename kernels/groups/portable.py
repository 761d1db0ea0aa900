"""Products (2) to (6) over kept tiles in Triton, without Hopper's instructions: for A100 and other GPUs.

These are the functions of `kernels.groups.products`, which is faster on Hopper. A program computes one tile of the
output. Its reduction goes over the tiles of the block, or of the group, in steps of BK.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups.tiles import TILE, TileLists

BN, BK = 128, 64
WARPS = 8


@triton.jit
def _reduce_neurons(
    tiles, start, tile_group, weight, order, out, tokens, width, neuron_stride, column_stride,
    ORDERED: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block, row, k = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, BK)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < width
    acc = tl.zeros([TILE, BN], tl.float32)
    steps: tl.constexpr = TILE // BK
    for step in range(tl.load(start + block) * steps, tl.load(start + block + 1) * steps):
        tile, first = step // steps, step % steps * BK
        a = tl.load(tiles + tl.cast(tile, tl.int64) * TILE * TILE + row[:, None] * TILE + first + k[None, :])
        neurons = (tl.load(tile_group + tile) * TILE + first + k).to(tl.int64)
        at = neurons[:, None] * neuron_stride + columns[None, :].to(tl.int64) * column_stride
        b = tl.load(weight + at, mask=inside[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    token = block * TILE + row
    exists = token < tokens
    if ORDERED:
        token = tl.load(order + token, mask=exists, other=0)
    at = token[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit
def _sample(
    dy, w2, tiles, tile_block, tile_group, out, tokens, width, hidden_dim, TILE: tl.constexpr, BK: tl.constexpr
):
    tile, row, column, k = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, BK)
    token = tl.load(tile_block + tile) * TILE + row
    neuron = tl.load(tile_group + tile) * TILE + column
    acc = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, width, BK):
        inside = first + k < width
        mask = (token < tokens)[:, None] & inside[None, :]
        a = tl.load(dy + token[:, None].to(tl.int64) * width + first + k[None, :], mask=mask, other=0.0)
        at = (first + k)[:, None].to(tl.int64) * hidden_dim + neuron[None, :]
        b = tl.load(w2 + at, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = tile.to(tl.int64) * TILE * TILE + row[:, None] * TILE + column[None, :]
    h = tl.load(tiles + at).to(tl.float32)
    tl.store(out + at, (2 * tl.sqrt(h) * acc).to(out.dtype.element_ty))


@triton.jit
def _reduce_tokens(
    tiles, group_tiles, group_count, tile_block, x, out, tokens, width, blocks, neuron_stride, column_stride,
    TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    group, neuron, k = tl.program_id(0), tl.arange(0, TILE), tl.arange(0, BK)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = columns < width
    acc = tl.zeros([TILE, BN], tl.float32)
    steps: tl.constexpr = TILE // BK
    for step in range(tl.load(group_count + group) * steps):
        tile, first = tl.load(group_tiles + group * blocks + step // steps).to(tl.int64), step % steps * BK
        a = tl.load(tiles + tile * TILE * TILE + (first + k)[None, :] * TILE + neuron[:, None])
        token = tl.load(tile_block + tile) * TILE + first + k
        mask = (token < tokens)[:, None] & inside[None, :]
        b = tl.load(x + token[:, None].to(tl.int64) * width + columns[None, :], mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    neurons = (group * TILE + neuron).to(tl.int64)
    at = neurons[:, None] * neuron_stride + columns[None, :].to(tl.int64) * column_stride
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[None, :])


def reduce_neurons(tiles: Tensor, lists: TileLists, weight: Tensor, order: Tensor | None, tokens: int) -> Tensor:
    """See `kernels.groups.reduce_neurons`."""
    width = weight.shape[1]
    out = tiles.new_empty((tokens, width))
    _reduce_neurons[(lists.blocks, triton.cdiv(width, BN))](
        tiles, lists.start, lists.tile_group, weight, out if order is None else order, out, tokens, width,
        *weight.stride(), ORDERED=order is not None, TILE=TILE, BN=BN, BK=BK, num_warps=WARPS,
    )  # fmt: skip
    return out


def sample_dy1(dy: Tensor, weight: Tensor, tiles: Tensor, lists: TileLists) -> Tensor:
    """See `kernels.groups.sample_dy1`."""
    out = torch.empty_like(tiles)
    _sample[(lists.capacity,)](
        dy, weight, tiles, lists.tile_block, lists.tile_group, out, *dy.shape, weight.shape[0],
        TILE=TILE, BK=BK, num_warps=WARPS,
    )  # fmt: skip
    return out


def reduce_tokens(tiles: Tensor, lists: TileLists, x: Tensor, transposed: bool) -> Tensor:
    """See `kernels.groups.reduce_tokens`."""
    width, hidden_dim = x.shape[1], lists.groups * TILE
    out = tiles.new_empty((width, hidden_dim) if transposed else (hidden_dim, width))
    strides = out.stride()[::-1] if transposed else out.stride()
    _reduce_tokens[(lists.groups, triton.cdiv(width, BN))](
        tiles, lists.group_tiles, lists.group_count, lists.tile_block, x, out, *x.shape, lists.blocks, *strides,
        TILE=TILE, BN=BN, BK=BK, num_warps=WARPS,
    )  # fmt: skip
    return out
