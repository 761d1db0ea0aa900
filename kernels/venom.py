"""Venom V:N:M activations: columns shared by a block of tokens, then N of four within.

`h [T, f]` is cut into blocks of V tokens by M neurons. All V rows of a block keep the same 4 of the M columns,
those of largest sum over the block; inside those 4 each row keeps its N largest. So a product that reduces
over f gathers 4f/M columns once for V rows (dense tiles, any hardware), and for N = 2 what it gathers is 2:4
(sparse tensor cores). Density is N/M.

With V = 1 and M = 4 every column is a chosen one, and V:2:4 is plain 2:4 sparsity a token.

Source: VENOM, Castro et al., SC 2023; on activations: arXiv 2602.06183.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 4  # columns that a block keeps: the group size of the hardware's N:4 formats


def venom_mask(h: Tensor, v: int, n: int, m: int) -> Tensor:
    """Which entries of h the V:N:M pattern keeps.

    Among equal column sums or equal entries the lower index wins. An exact zero never counts as kept; NaN does,
    so that it is not hidden.

    Args:
        h: `[T, f]`, non-negative. T need not be a multiple of v: the last block is shorter.
        v: tokens in a block, at least 1.
        n: entries that a row keeps of its block's four columns, 2 or 4.
        m: columns in a block, a multiple of 4 that divides f.

    Returns:
        bool mask `[T, f]`.

    Raises:
        ValueError: a pattern outside these bounds.
    """
    tokens, hidden_dim = h.shape
    Venom(v, n, m).check(hidden_dim)
    h = h.detach()
    blocks = -(-tokens // v)
    tiles = F.pad(h, (0, 0, 0, blocks * v - tokens)).view(blocks, v, hidden_dim // m, m)
    sums = tiles.to(torch.promote_types(h.dtype, torch.float32)).sum(1)
    columns = sums.sort(dim=-1, descending=True, stable=True).indices[..., :COLUMNS].sort(dim=-1).values
    index = columns.unsqueeze(1).expand(-1, v, -1, -1)
    chosen = tiles.gather(-1, index)
    keep = chosen != 0
    if n < COLUMNS:
        # Rank of entry i in its four: how many j beat it, an equal one to the left counting as better.
        mine, other = chosen.unsqueeze(-1), chosen.unsqueeze(-2)
        left = torch.ones(COLUMNS, COLUMNS, dtype=torch.bool, device=h.device).tril(-1)
        keep = keep & (((other > mine) | ((other == mine) & left)).sum(-1) < n)
    mask = torch.zeros_like(tiles, dtype=torch.bool).scatter(-1, index, keep)
    return mask.view(blocks * v, hidden_dim)[:tokens]


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

    def mask(self, h: Tensor) -> Tensor:
        return venom_mask(h, self.v, self.n, self.m)
