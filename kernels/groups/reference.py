"""Selection and products of column groups in plain PyTorch: the specification of the kernels, and the CPU path.

The pattern itself is specified in `kernels.groups.pattern`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.groups.pattern import balanced
from kernels.groups.tiles import TILE, TileLists


def select_tiles(y1: Tensor, kept: int, by: Tensor | None = None, balance: float = 0.0) -> tuple[Tensor, TileLists]:
    """See `kernels.groups.select_tiles`: the tiles that `group_mask` keeps with v = g = TILE, and their lists."""
    tokens, hidden_dim = y1.shape
    blocks, groups = -(-tokens // TILE), hidden_dim // TILE

    def squared_relu(matrix: Tensor) -> Tensor:
        matrix = matrix[: blocks * TILE]
        active = F.pad(matrix, (0, 0, 0, blocks * TILE - matrix.shape[0])).relu()
        return (active * active).view(blocks, TILE, groups, TILE)

    h = squared_relu(y1)
    sums = (h if by is None else squared_relu(by)).to(torch.promote_types(h.dtype, torch.float32)).sum((1, 3))
    sums = balanced(sums, balance)
    capacity = blocks * kept
    order = sums.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter(1, order, True)
    lists = TileLists(
        y1.new_zeros(TileLists.size(blocks, groups, capacity), dtype=torch.int32), blocks, groups, capacity
    )
    block, group = chosen.nonzero(as_tuple=True)
    lists.start[1:] = chosen.sum(1).cumsum(0)
    lists.tile_block.copy_(block)
    lists.tile_group.copy_(group)
    lists.group_count.copy_(chosen.sum(0))
    lists.group_order.copy_(lists.group_count.sort(descending=True, stable=True).indices)
    by_group = group.sort(stable=True).indices
    before = lists.group_count.cumsum(0) - lists.group_count
    place = torch.arange(capacity, device=y1.device) - before[group[by_group]]
    lists.group_tiles[group[by_group], place] = by_group.int()
    return h[block, :, group, :], lists


def _matrix(tiles: Tensor, lists: TileLists) -> Tensor:
    """The dense matrix `[B * TILE, f]` of the tiles, zero where no tile is kept."""
    matrix = tiles.new_zeros(lists.blocks, TILE, lists.groups, TILE)
    matrix[lists.tile_block.long(), :, lists.tile_group.long(), :] = tiles
    return matrix.view(lists.blocks * TILE, lists.groups * TILE)


def reduce_neurons(tiles: Tensor, lists: TileLists, weight: Tensor, order: Tensor | None, tokens: int) -> Tensor:
    """See `kernels.groups.reduce_neurons`."""
    product = _matrix(tiles, lists)[:tokens] @ weight
    return product if order is None else torch.empty_like(product).index_copy_(0, order.long(), product)


def sample_dy1(dy: Tensor, weight: Tensor, tiles: Tensor, lists: TileLists) -> Tensor:
    """See `kernels.groups.sample_dy1`."""
    dh = F.pad(dy, (0, 0, 0, lists.blocks * TILE - dy.shape[0])) @ weight.T
    dh = dh.view(lists.blocks, TILE, lists.groups, TILE)
    return 2 * tiles.sqrt() * dh[lists.tile_block.long(), :, lists.tile_group.long(), :]


def reduce_tokens(tiles: Tensor, lists: TileLists, x: Tensor, transposed: bool) -> Tensor:
    """See `kernels.groups.reduce_tokens`."""
    h = _matrix(tiles, lists)[: x.shape[0]]
    return x.T @ h if transposed else h.T @ x
