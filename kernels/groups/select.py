"""Selection of tiles on a GPU, in Triton, without a device-to-host synchronisation.

The first pass reads y1 = x W1^T and sums h = relu(y1)^2 over each tile. The groups of each block are then ranked by
their sums, and the lists by block and by group are built from the ranks. The second pass reads the kept tiles of y1
again and stores the tiles of h. The number of tiles follows from the shapes, so the host need not wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.groups.pattern import balanced
from kernels.groups.tiles import COUNTERS, TILE, TileLists


@triton.jit
def squared_relu(y1):
    # Rounded like the reference: h has y1's dtype. NaN propagates.
    active = tl.maximum(y1.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return (active * active).to(y1.dtype)


@triton.jit
def _tile_sums(y1, sums, tokens, groups, TILE: tl.constexpr):
    """sums[b, j] = sum of h over tile (b, j), in float32."""
    group, block = tl.program_id(0), tl.program_id(1)
    rows = block * TILE + tl.arange(0, TILE)
    columns = group * TILE + tl.arange(0, TILE)
    at = rows[:, None].to(tl.int64) * (groups * TILE) + columns[None, :]
    h = squared_relu(tl.load(y1 + at, mask=rows[:, None] < tokens, other=0.0))
    tl.store(sums + block * groups + group, tl.sum(h.to(tl.float32)))


@triton.jit
def sort_key(value):
    """Integers with the order of non-negative floats; NaN is the largest."""
    return tl.where(value != value, 0x7FFFFFFF, value.to(tl.int32, bitcast=True))


@triton.jit
def _choose(
    sums, start, tile_group, tile_block, slot, counters, groups, kept, GROUPS: tl.constexpr, COUNTERS: tl.constexpr
):  # fmt: skip
    """Choose the `kept` groups with the largest sums in a block: NaN first, the lower index among equal sums.

    slot[b, j] becomes the number of the tile of group j in block b, or -1 if the block drops the group.
    """
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    inside = group < groups
    mine = sort_key(tl.load(sums + block * groups + group, mask=inside, other=0.0))
    rank = tl.zeros([GROUPS], tl.int32)
    for other_group in range(groups):
        other = sort_key(tl.load(sums + block * groups + other_group))
        better = (other > mine) | ((other == mine) & (other_group < group))
        rank += better.to(tl.int32)
    keep = inside & (rank < kept)
    first = block * kept
    tl.store(start + block + 1, (block + 1) * kept)
    tl.store(start, 0, mask=block == 0)
    tile = first + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(tile_group + tile, group, mask=keep)
    tl.store(tile_block + tile, tl.zeros_like(group) + block, mask=keep)
    tl.store(slot + block * groups + group, tl.where(keep, tile, -1), mask=inside)
    for counter in tl.static_range(COUNTERS):
        tl.store(counters + counter, 0, mask=block == 0)


@triton.jit
def _by_group(slot, group_tiles, group_count, blocks, groups, BLOCKS: tl.constexpr):
    """Write group_tiles and group_count of one group from its column of `slot`."""
    group = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    tile = tl.load(slot + block * groups + group, mask=block < blocks, other=-1)
    keep = tile >= 0
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(group_tiles + group * blocks + place, tile, mask=keep)
    tl.store(group_count + group, tl.sum(keep.to(tl.int32)))


@triton.jit
def _fullest_first(group_count, group_order, groups, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    inside = group < groups
    mine = tl.load(group_count + group, mask=inside, other=0)
    rank = tl.zeros([GROUPS], tl.int32)
    for other_group in range(groups):
        other = tl.load(group_count + other_group)
        rank += ((other > mine) | ((other == mine) & (other_group < group))).to(tl.int32)
    tl.store(group_order + rank, group, mask=inside)


@triton.jit
def _store_tiles(y1, tiles, tile_group, tile_block, tokens, groups, TILE: tl.constexpr):
    tile = tl.program_id(0)
    row, column = tl.arange(0, TILE), tl.arange(0, TILE)
    rows = tl.load(tile_block + tile) * TILE + row
    columns = tl.load(tile_group + tile) * TILE + column
    at = rows[:, None].to(tl.int64) * (groups * TILE) + columns[None, :]
    h = squared_relu(tl.load(y1 + at, mask=rows[:, None] < tokens, other=0.0))
    to = tile.to(tl.int64) * TILE * TILE + row[:, None] * TILE + column[None, :]
    tl.store(tiles + to, h)


def select_tiles(y1: Tensor, kept: int, by: Tensor | None = None, balance: float = 0.0) -> tuple[Tensor, TileLists]:
    """See `kernels.groups.select_tiles`; y1 and `by` are bf16 on a CUDA device."""
    by = y1 if by is None else by
    tokens, hidden_dim = y1.shape
    blocks, groups = triton.cdiv(tokens, TILE), hidden_dim // TILE
    capacity = blocks * kept
    buffer = y1.new_empty(TileLists.size(blocks, groups, capacity), dtype=torch.int32)
    lists = TileLists(buffer, blocks, groups, capacity)
    sums = y1.new_empty((blocks, groups), dtype=torch.float32)
    slot = y1.new_empty((blocks, groups), dtype=torch.int32)
    tiles = y1.new_empty((capacity, TILE, TILE))
    _tile_sums[(groups, blocks)](by, sums, by.shape[0], groups, TILE=TILE)
    sums = balanced(sums, balance)
    width = triton.next_power_of_2(groups)
    _choose[(blocks,)](
        sums, lists.start, lists.tile_group, lists.tile_block, slot, lists.counters, groups, kept,
        GROUPS=width, COUNTERS=COUNTERS,
    )  # fmt: skip
    height = triton.next_power_of_2(blocks)
    _by_group[(groups,)](slot, lists.group_tiles, lists.group_count, blocks, groups, BLOCKS=height)
    _fullest_first[(1,)](lists.group_count, lists.group_order, groups, GROUPS=width)
    _store_tiles[(capacity,)](y1, tiles, lists.tile_group, lists.tile_block, tokens, groups, TILE=TILE)
    return tiles, lists
