"""Venom V:N:M activations: a block of tokens shares four of M columns, and each token keeps N of the four.

`h [T, f]` is divided into blocks of V tokens by M neurons. All V rows of a block keep the same 4 of the M columns,
those with the largest sums over the block. Each row keeps the N largest of its 4 entries. So a product that reduces
over f gathers 4f/M columns once for V rows (dense tiles, any hardware), and for N = 2 the gathered columns are 2:4
sparse (sparse tensor cores). The density is N/M.

With V = 1 and M = 4 all columns are kept, and V:2:4 is plain 2:4 sparsity for each token.

Products (4) and (6) reduce over the tokens, where this pattern saves nothing; for them, `token_mask` applies a second
2:4 pattern to 2:4 activations, along the tokens.

Source: VENOM, Castro et al., SC 2023; on activations: arXiv 2602.06183.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 4  # columns that a block keeps: the group size of 2:4 sparsity
DENSE_FEATURES = 0.05  # share of the neurons that stay dense in (4) and (6) of 2:4 activations: arXiv 2503.16672


def token_blocks(h: Tensor, v: int) -> Tensor:
    """h `[T, f]` as blocks of v tokens `[B, v, f]`; the last block is padded with zeros."""
    blocks = -(-h.shape[0] // v)
    return F.pad(h, (0, 0, 0, blocks * v - h.shape[0])).view(blocks, v, h.shape[1])


def kept_columns(windows: Tensor) -> Tensor:
    """The 4 columns with the largest sums in each window of `[B, v, f/m, m]`: int64 `[B, f/m, 4]`, ascending.

    Among equal sums the lower index wins.
    """
    sums = windows.to(torch.promote_types(windows.dtype, torch.float32)).sum(1)
    return sums.sort(dim=-1, descending=True, stable=True).indices[..., :COLUMNS].sort(dim=-1).values


def venom_mask(h: Tensor, v: int, n: int, m: int, sums: Tensor | None = None) -> Tensor:
    """Which entries of h the V:N:M pattern keeps.

    Among equal column sums or equal entries the lower index wins. An entry that is exactly zero is not in the mask; NaN
    is, so that it is not hidden.

    Args:
        h: `[T, f]`, non-negative. T need not be a multiple of v: the last block is shorter.
        v: tokens in a block, at least 1.
        n: entries that a row keeps of its block's four columns, 2 or 4.
        m: columns in a block, a multiple of 4 that divides f.
        sums: `[B, f]` float32, B = ceil(T/v): sums that each block chooses by, instead of the sums of h over its own
            tokens.

    Returns:
        bool mask `[T, f]`.

    Raises:
        ValueError: a pattern outside these bounds.
    """
    tokens, hidden_dim = h.shape
    Venom(v, n, m).check(hidden_dim)
    h = h.detach()
    windows = token_blocks(h, v).unflatten(-1, (-1, m))
    kept = kept_columns(windows if sums is None else sums.view(-1, 1, hidden_dim // m, m))
    index = kept.unsqueeze(1).expand(-1, v, -1, -1)
    chosen = windows.gather(-1, index)
    keep = chosen != 0
    if n < COLUMNS:
        # The rank of entry i is the number of larger entries of its four; an equal one to the left counts as larger.
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
    sample: ClassVar[int] = 1

    def density(self, hidden_dim: int) -> float:
        """Largest share of h that is kept, for any width."""
        return self.n / self.m

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, if the pattern does not fit an FFN of width `hidden_dim`."""
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

    def causal(self) -> "Venom":
        return self

    def of_one_token(self) -> "Venom":
        return replace(self, v=1)


def densest_neurons(h: Tensor) -> Tensor:
    """Indices `[round(0.05 f)]` of the neurons of h `[T, f]` that are non-zero for most tokens; ties: lower index."""
    return (h != 0).sum(0).sort(descending=True, stable=True).indices[: round(DENSE_FEATURES * h.shape[1])]


def token_mask(h: Tensor, pattern: Venom) -> Tensor:
    """The second pattern of 2:4 activations, along the tokens: which entries of h products (4) and (6) read.

    A neuron keeps two of every four tokens. The four tokens are T/4 apart, since neighbouring tokens activate the same
    neurons. The 5% of the neurons that are active most often stay dense (arXiv 2503.16672).

    Args:
        h: `[T, f]`, non-negative, T a multiple of 4.
        pattern: one with m = 4.

    Returns:
        bool mask `[T, f]`.
    """
    tokens, neurons = h.shape
    strided = h.view(COLUMNS, tokens // COLUMNS, neurons).permute(2, 1, 0).reshape(neurons, tokens)
    mask = venom_mask(strided, 1, pattern.n, COLUMNS).view(neurons, tokens // COLUMNS, COLUMNS)
    mask = mask.permute(2, 1, 0).reshape(tokens, neurons)
    return mask.index_fill(1, densest_neurons(h), True) & (h != 0)
