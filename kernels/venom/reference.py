"""The compact form of V:N:M and its products in plain PyTorch: the specification of the kernels, and the CPU path.

The pattern itself is specified in `kernels.venom.pattern`.
"""

import torch
from torch import Tensor

from kernels.venom.pattern import kept_columns, token_blocks, venom_mask

TILE = 128  # largest number of columns in a tile of the compact form


def tile_width(kept: int) -> int:
    """Columns of a tile if a block keeps `kept`: the largest power of two, up to 128, that divides `kept`."""
    return min(TILE, kept & -kept)


def compact(h: Tensor, columns: Tensor, v: int) -> Tensor:
    """The compact form of h.

    Args:
        h: `[T, f]`.
        columns: `[B, C]`, integer: the columns that each of the B = ceil(T/v) blocks keeps.
        v: tokens in a block.

    Returns:
        tiles `[B * C/W, v, W]` in h's dtype, W = `tile_width(C)`: tile b * C/W + i holds the kept columns i * W to
        (i+1) * W - 1 of block b; zeros for the missing tokens of the last block.
    """
    values = token_blocks(h, v).gather(2, columns.long().unsqueeze(1).expand(-1, v, -1))
    tiles = values.unflatten(2, (-1, tile_width(columns.shape[1]))).transpose(1, 2)
    return tiles.flatten(0, 1).contiguous()


def expand(tiles: Tensor, columns: Tensor, tokens: int, hidden_dim: int) -> Tensor:
    """The reverse of `compact`: h `[T, f]` from `tiles [P, v, W]` and `columns [P, W]`; zero in dropped columns."""
    v, blocks = tiles.shape[1], -(-tokens // tiles.shape[1])
    values = tiles.unflatten(0, (blocks, -1)).transpose(1, 2).flatten(2)
    index = columns.reshape(blocks, 1, -1).long().expand(-1, v, -1)
    h = values.new_zeros(blocks, v, hidden_dim).scatter(2, index, values)
    return h.flatten(0, 1)[:tokens]


def _select(h: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The mask of the pattern, bool `[T, f]`, and the kept columns `[B, 4f/m]` int32."""
    columns = kept_columns(token_blocks(h, v).unflatten(-1, (-1, m)))
    first = torch.arange(0, h.shape[1], m, device=h.device)
    return venom_mask(h, v, n, m), (columns + first[:, None]).flatten(1).int()


def select_columns(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """See `kernels.venom.select_columns`."""
    h = y1.relu()
    h = h * h
    mask, columns = _select(h, v, n, m)
    tiles = compact(torch.where(mask, h, 0), columns, v)
    return tiles, columns.view(-1, tiles.shape[2])


def reduce_neurons(
    tiles: Tensor, columns: Tensor, weight_rows: Tensor, tokens: int, order: Tensor | None = None
) -> Tensor:
    """See `kernels.venom.reduce_neurons`."""
    y = expand(tiles, columns, tokens, weight_rows.shape[0]) @ weight_rows
    return y if order is None else torch.empty_like(y).index_copy(0, order, y)


def sample_dy1(dy: Tensor, weight_rows: Tensor, h_tiles: Tensor, columns: Tensor) -> Tensor:
    """See `kernels.venom.sample_dy1`."""
    v = h_tiles.shape[1]
    blocks = -(-dy.shape[0] // v)
    return 2 * h_tiles.sqrt() * compact(dy @ weight_rows.T, columns.view(blocks, -1), v)
