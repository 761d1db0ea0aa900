"""Venom V:N:M activations: columns shared by a block of tokens, then N of four within.

`h [T, f]` is cut into blocks of V tokens by M neurons. All V rows of a block keep the same 4 of the M columns,
those of largest sum over the block; inside those 4 each row keeps its N largest. So a product that reduces
over f gathers 4f/M columns once for V rows (dense tiles, any hardware), and for N = 2 what it gathers is 2:4
(sparse tensor cores). Density is N/M.

With V = 1 and M = 4 every column is a chosen one, and V:2:4 is plain 2:4 sparsity a token.

Products (4) and (6) reduce over the tokens instead, where this pattern saves nothing; `token_mask` cuts h a second
time for them.

This module is the specification: masks over the dense h, then the compact form and its products written with them.

Source: VENOM, Castro et al., SC 2023; on activations: arXiv 2602.06183.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 4  # columns that a block keeps: the group size of the hardware's N:4 formats
TILE = 128  # columns of a tile of the compact form, where there are so many
DENSE_FEATURES = 0.05  # share of the neurons that 2:4 activations leave whole in (4) and (6): arXiv 2503.16672


def _blocks(h: Tensor, v: int) -> Tensor:
    """`[B, v, f]`: h in blocks of v tokens, the last one filled up with zeros."""
    blocks = -(-h.shape[0] // v)
    return F.pad(h, (0, 0, 0, blocks * v - h.shape[0])).view(blocks, v, h.shape[1])


def _kept_columns(windows: Tensor) -> Tensor:
    """Of `[B, v, f/m, m]` the columns `[B, f/m, 4]` of largest sum, ascending; the lower index among equal sums."""
    sums = windows.to(torch.promote_types(windows.dtype, torch.float32)).sum(1)
    return sums.sort(dim=-1, descending=True, stable=True).indices[..., :COLUMNS].sort(dim=-1).values


def venom_mask(h: Tensor, v: int, n: int, m: int, sums: Tensor | None = None) -> Tensor:
    """Which entries of h the V:N:M pattern keeps.

    Among equal column sums or equal entries the lower index wins. An exact zero never counts as kept; NaN does,
    so that it is not hidden.

    Args:
        h: `[T, f]`, non-negative. T need not be a multiple of v: the last block is shorter.
        v: tokens in a block, at least 1.
        n: entries that a row keeps of its block's four columns, 2 or 4.
        m: columns in a block, a multiple of 4 that divides f.
        sums: `[B, f]` float32, what each of the B = ceil(T/v) blocks chooses its columns by instead of its own sums
            over the v tokens.

    Returns:
        bool mask `[T, f]`.

    Raises:
        ValueError: a pattern outside these bounds.
    """
    tokens, hidden_dim = h.shape
    Venom(v, n, m).check(hidden_dim)
    h = h.detach()
    windows = _blocks(h, v).unflatten(-1, (-1, m))
    kept = _kept_columns(windows if sums is None else sums.view(-1, 1, hidden_dim // m, m))
    index = kept.unsqueeze(1).expand(-1, v, -1, -1)
    chosen = windows.gather(-1, index)
    keep = chosen != 0
    if n < COLUMNS:
        # Rank of entry i in its four: how many j beat it, an equal one to the left counting as better.
        mine, other = chosen.unsqueeze(-1), chosen.unsqueeze(-2)
        left = torch.ones(COLUMNS, COLUMNS, dtype=torch.bool, device=h.device).tril(-1)
        keep = keep & (((other > mine) | ((other == mine) & left)).sum(-1) < n)
    mask = torch.zeros_like(windows, dtype=torch.bool).scatter(-1, index, keep)
    return mask.view(-1, hidden_dim)[:tokens]


@dataclass(frozen=True)
class Venom:
    """The pattern V:N:M, see `venom_mask`."""

    v: int
    n: int
    m: int

    def density(self, hidden_dim: int) -> float:
        """Share of h that is kept at most, in an FFN of any width."""
        return self.n / self.m

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, where the pattern does not fit an FFN of width `hidden_dim`."""
        if self.v < 1:
            raise ValueError(f"v = {self.v}: a block needs at least one token")
        if self.n not in (2, 4):
            raise ValueError(f"n = {self.n}: a row keeps 2 or 4 of its block's four columns")
        if self.m < COLUMNS or self.m % COLUMNS:
            raise ValueError(f"m = {self.m}: a block's columns are a multiple of {COLUMNS}")
        if hidden_dim % self.m:
            raise ValueError(f"m = {self.m} does not divide the FFN's hidden_dim = {hidden_dim}")

    def mask(self, h: Tensor, sums: Tensor | None = None) -> Tensor:
        return venom_mask(h, self.v, self.n, self.m, sums)


def densest_neurons(h: Tensor) -> Tensor:
    """Indices `[round(0.05 f)]` of the neurons of h `[T, f]` that fire most often; the lower index wins a tie."""
    return (h != 0).sum(0).sort(descending=True, stable=True).indices[: round(DENSE_FEATURES * h.shape[1])]


def token_mask(h: Tensor, pattern: Venom) -> Tensor:
    """The second cut, along the tokens: which entries of h products (4) and (6) read.

    For V:N:M with M > 4 it is the same pattern on h^T: blocks of V neurons by M tokens. For 2:4 (M = 4) a neuron
    keeps two of every four tokens; the four are T/4 apart, since neighbouring tokens fire the same neurons, and the
    5% of the neurons that fire most often are left whole.

    Args:
        h: `[T, f]`, non-negative, T a multiple of the pattern's m.

    Returns:
        bool mask `[T, f]`.
    """
    if pattern.m > COLUMNS:
        return venom_mask(h.T, pattern.v, pattern.n, pattern.m).T
    tokens, neurons = h.shape
    strided = h.view(COLUMNS, tokens // COLUMNS, neurons).permute(2, 1, 0).reshape(neurons, tokens)
    mask = venom_mask(strided, 1, pattern.n, COLUMNS).view(neurons, tokens // COLUMNS, COLUMNS)
    mask = mask.permute(2, 1, 0).reshape(tokens, neurons)
    return mask.index_fill(1, densest_neurons(h), True) & (h != 0)


def tile_width(kept: int) -> int:
    """Columns of a tile where a block keeps `kept`: the largest power of two, up to 128, that divides it."""
    return min(TILE, kept & -kept)


def compact(h: Tensor, columns: Tensor, v: int) -> Tensor:
    """The compact form of h.

    Args:
        h: `[T, f]`.
        columns: `[B, C]`, integer: the columns that each of the B = ceil(T/v) blocks keeps.
        v: tokens in a block.

    Returns:
        tiles `[B * C/W, v, W]`, W = `tile_width(C)`: tile b * C/W + i holds columns i * W to (i+1) * W of
        those that block b keeps, and zeros for tokens after the last.
    """
    values = _blocks(h, v).gather(2, columns.long().unsqueeze(1).expand(-1, v, -1))
    tiles = values.unflatten(2, (-1, tile_width(columns.shape[1]))).transpose(1, 2)
    return tiles.flatten(0, 1).contiguous()


def expand(tiles: Tensor, columns: Tensor, tokens: int, hidden_dim: int) -> Tensor:
    """h `[T, f]` of its compact form `tiles [P, v, W]`, `columns [P, W]`: zero in the columns that a block dropped."""
    v, blocks = tiles.shape[1], -(-tokens // tiles.shape[1])
    values = tiles.unflatten(0, (blocks, -1)).transpose(1, 2).flatten(2)
    index = columns.reshape(blocks, 1, -1).long().expand(-1, v, -1)
    h = values.new_zeros(blocks, v, hidden_dim).scatter(2, index, values)
    return h.flatten(0, 1)[:tokens]


def _select(h: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The pattern's mask `[T, f]` and the kept columns `[B, 4f/m]` int32."""
    columns = _kept_columns(_blocks(h, v).unflatten(-1, (-1, m)))
    first = torch.arange(0, h.shape[1], m, device=h.device)
    return venom_mask(h, v, n, m), (columns + first[:, None]).flatten(1).int()


def select_columns(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    h = y1.relu()
    h = h * h
    mask, columns = _select(h, v, n, m)
    tiles = compact(torch.where(mask, h, 0), columns, v)
    return tiles, columns.view(-1, tiles.shape[2])


def cut_tokens(
    h_tiles: Tensor, dy1_tiles: Tensor, columns: Tensor, tokens: int, hidden_dim: int, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    v = h_tiles.shape[1]
    h = expand(h_tiles, columns, tokens, hidden_dim)
    dy1 = expand(dy1_tiles, columns, tokens, hidden_dim)
    mask, kept = _select(h.T, v, n, m)
    h_token_tiles, dy1_token_tiles = (
        compact(torch.where(mask, value.T, 0), kept, v).transpose(1, 2).contiguous() for value in (h, dy1)
    )
    return h_token_tiles, dy1_token_tiles, kept.view(-1, h_token_tiles.shape[1])


def reduce_columns(
    tiles: Tensor, columns: Tensor, weight_rows: Tensor, tokens: int, order: Tensor | None = None
) -> Tensor:
    y = expand(tiles, columns, tokens, weight_rows.shape[0]) @ weight_rows
    return y if order is None else torch.empty_like(y).index_copy(0, order, y)


def sample_columns(dy: Tensor, weight_rows: Tensor, columns: Tensor, h_tiles: Tensor) -> Tensor:
    v = h_tiles.shape[1]
    blocks = -(-dy.shape[0] // v)
    return 2 * h_tiles.sqrt() * compact(dy @ weight_rows.T, columns.view(blocks, -1), v)


def reduce_tokens(token_tiles: Tensor, token_ids: Tensor, x: Tensor, hidden_dim: int) -> Tensor:
    return expand(token_tiles.transpose(1, 2), token_ids, hidden_dim, x.shape[0]) @ x
