"""Column groups V x G: a block of tokens keeps whole groups of neighbouring neurons.

`h [T, f]` is cut into blocks of V tokens by G neurons. Every V tokens keep the same share of the groups, those in
which the sum of h over the V tokens is largest, and drop the others. With neurons clustered so that a group fires
together, and tokens sorted so that a block wants the same groups, little is lost; and with G of 64 or 128 what
remains are dense tiles, so that products (2) to (6) are block-sparse, with exact gradients and no second pattern
along the tokens.

Source: this project. With G = 1 and the choice made in every window of M neurons it would be Venom with N = 4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def group_mask(h: Tensor, v: int, g: int, keep: float) -> Tensor:
    """Which entries of h lie in a kept group.

    A block of v tokens keeps the `round(keep * f / g)` groups of largest sum, at least one. Among equal sums the
    lower index wins. An exact zero never counts as kept; NaN does, so that it is not hidden.

    Args:
        h: `[T, f]`, non-negative. T need not be a multiple of v: the last block is shorter.
        v: tokens in a block, at least 1.
        g: neurons in a group, a divisor of f.
        keep: share of the groups to keep, in (0, 1].

    Returns:
        bool mask `[T, f]`.

    Raises:
        ValueError: a pattern outside these bounds.
    """
    tokens, hidden_dim = h.shape
    pattern = Groups(v, g, keep)
    pattern.check(hidden_dim)
    h = h.detach()
    blocks, groups = -(-tokens // v), hidden_dim // g
    tiles = F.pad(h, (0, 0, 0, blocks * v - tokens)).view(blocks, v, groups, g)
    sums = tiles.to(torch.promote_types(h.dtype, torch.float32)).sum((1, 3))
    kept = sums.sort(dim=-1, descending=True, stable=True).indices[:, : pattern.kept_groups(hidden_dim)]
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter(-1, kept, True)
    mask = chosen[:, None, :, None] & (tiles != 0)
    return mask.reshape(blocks * v, hidden_dim)[:tokens]


@dataclass(frozen=True)
class Groups:
    """The pattern V x G with a keep share, see `group_mask`."""

    v: int
    g: int
    keep: float

    def density(self, hidden_dim: int) -> float:
        """Share of h that is kept at most in an FFN of width `hidden_dim`."""
        return self.kept_groups(hidden_dim) * self.g / hidden_dim

    def kept_groups(self, hidden_dim: int) -> int:
        """Groups that a block of tokens keeps in an FFN of width `hidden_dim`."""
        return max(1, round(self.keep * hidden_dim / self.g))

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, where the pattern does not fit an FFN of width `hidden_dim`."""
        if self.v < 1:
            raise ValueError(f"v = {self.v}: a block needs at least one token")
        if self.g < 1:
            raise ValueError(f"g = {self.g}: a group needs at least one neuron")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep = {self.keep}: the share of groups to keep is in (0, 1]")
        if hidden_dim % self.g:
            raise ValueError(f"g = {self.g} does not divide the FFN's hidden_dim = {hidden_dim}")

    def mask(self, h: Tensor) -> Tensor:
        return group_mask(h, self.v, self.g, self.keep)
