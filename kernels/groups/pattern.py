"""Column groups V x G: a block of tokens keeps whole groups of neighbouring neurons.

`h [T, f]` is divided into tiles of V tokens by G neurons. Each block of V tokens keeps the same number of groups, those
with the largest sum of h over the V tokens, and drops the others. If neurons are clustered so that a group is active
for the same tokens, and tokens are sorted so that a block needs the same groups, little is lost. With G = 64 or 128 the
kept tiles are dense, so products (2) to (6) are block-sparse, with exact gradients and no second pattern along the
tokens.

If blocks choose by the sums alone, a neuron that is weakly active for all tokens is never chosen, gets no gradient and
stays weak. `balance` divides the sums of a group by a power of their mean over the blocks: 0 leaves them unchanged;
with 1 all groups have the same mean, and less of h is kept. Its effect on a run: docs/studies/branch_40m.

A large block can choose from a sample of its tokens, every `sample`-th, so that the choice is known before the other
tokens are multiplied by W1.

With a `window`, each window of that many neighbouring neurons keeps the share `keep` of its groups. With G = 1 this is
Venom's choice of columns: V:4:M keeps four of M (SC 2023).

Source: this project.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def group_mask(
    h: Tensor,
    v: int,
    g: int,
    keep: float,
    sums: Tensor | None = None,
    sample: int = 1,
    balance: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Which entries of h lie in a kept group.

    A block of v tokens keeps the `round(keep * f / g)` groups with the largest sums, at least one; with a window, the
    `keep * window / g` groups with the largest sums in each window. Among equal sums the lower group index wins. An
    entry that is exactly zero is not in the mask; NaN is, so that it is not hidden.

    Args:
        h: `[T, f]`, non-negative. T need not be a multiple of v: the last block is shorter.
        v: tokens in a block, at least 1.
        g: neurons in a group, a divisor of f.
        keep: share of the groups to keep, in (0, 1].
        sums: `[B, f]` float32, B = ceil(T/v): sums that each block chooses by, instead of the sums of h over its own
            tokens.
        sample: the sums are over the tokens 0, sample, 2 sample, ... of a block.
        balance: a group's sums are divided by their mean over all blocks, if there are several, to this power, in
            [0, 1].
        window: neurons in a window, a multiple of g that divides f; 0: all f.

    Returns:
        bool mask `[T, f]`.

    Raises:
        ValueError: a pattern outside these bounds.
    """
    tokens, hidden_dim = h.shape
    pattern = Groups(v, g, keep, sample, balance, window)
    pattern.check(hidden_dim)
    h = h.detach()
    blocks, groups = -(-tokens // v), hidden_dim // g
    tiles = F.pad(h, (0, 0, 0, blocks * v - tokens)).view(blocks, v, groups, g)
    if sums is None:
        energies = tiles[:, ::sample].to(torch.promote_types(h.dtype, torch.float32)).sum((1, 3))
    else:
        energies = sums.view(blocks, groups, g).sum(2)
    energies, kept = balanced(energies, balance), pattern.kept_groups(hidden_dim)
    if window:
        energies, kept = energies.view(-1, window // g), kept * window // hidden_dim
    order = energies.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    chosen = torch.zeros_like(energies, dtype=torch.bool).scatter(-1, order, True).view(blocks, groups)
    mask = chosen[:, None, :, None] & (tiles != 0)
    return mask.reshape(blocks * v, hidden_dim)[:tokens]


def balanced(sums: Tensor, balance: float, kind: Tensor | None = None, kinds: int = 1) -> Tensor:
    """The values that blocks rank groups by: sums `[B, G]`, divided by a power of their mean over blocks.

    Sums of a block that has no other to be balanced with stay as they are. A power below 1 of its own sums would rank
    them alike, and the power 1 would make all of them equal.

    Args:
        sums: `[B, G]`.
        balance: the power.
        kind: `[B]` int64: the mean is over the blocks of one kind, such as those of an expert; blocks of kind -1 are in
            no mean. None: over all B blocks.
        kinds: number of kinds.
    """
    if not balance or (kind is None and sums.shape[0] == 1):
        return sums
    tiny = torch.finfo(sums.dtype).tiny
    if kind is None:
        return sums * sums.mean(0).clamp(min=tiny).pow(-balance)
    of_kind = torch.arange(kinds, device=sums.device)[:, None] == kind  # [kinds, B]
    # A product, since the order in which an indexed addition adds differs from run to run on a GPU.
    count = of_kind.sum(1, keepdim=True)
    means = of_kind.to(sums.dtype) @ sums / count.clamp(min=1)
    return sums * torch.where(count > 1, means.clamp(min=tiny).pow(-balance), 1.0)[kind]


@dataclass(frozen=True)
class Groups:
    """The pattern V x G with a keep share, see `group_mask`."""

    v: int
    g: int
    keep: float
    sample: int = 1
    balance: float = 0.0
    window: int = 0

    def density(self, hidden_dim: int) -> float:
        """Largest share of h that is kept in an FFN of width `hidden_dim`."""
        return self.kept_groups(hidden_dim) * self.g / hidden_dim

    def kept_groups(self, hidden_dim: int) -> int:
        """Number of groups that a block of tokens keeps in an FFN of width `hidden_dim`."""
        return max(1, round(self.keep * hidden_dim / self.g))

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, if the pattern does not fit an FFN of width `hidden_dim`."""
        if self.v < 1:
            raise ValueError(f"v = {self.v}: a block needs at least one token")
        if self.g < 1:
            raise ValueError(f"g = {self.g}: a group needs at least one neuron")
        if not 1 <= self.sample <= self.v:
            raise ValueError(f"sample = {self.sample}: a block of v = {self.v} tokens has every 1st to {self.v}th")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance = {self.balance}: the power of a group's mean is in [0, 1]")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep = {self.keep}: the share of groups to keep is above 0 and at most 1")
        if self.window:
            if self.window < 0 or self.window % self.g or hidden_dim % self.window:
                raise ValueError(
                    f"window = {self.window}: it is a multiple of g = {self.g} that divides the FFN's hidden_dim = "
                    f"{hidden_dim}, or 0 for one window of all neurons"
                )
            kept = self.keep * self.window / self.g
            if abs(kept - round(kept)) > 1e-6 or not round(kept):
                raise ValueError(
                    f"window = {self.window}: the share keep = {self.keep} of its {self.window // self.g} groups is "
                    f"{kept:g}, not a whole number of groups"
                )
        if hidden_dim % self.g:
            raise ValueError(f"g = {self.g} does not divide the FFN's hidden_dim = {hidden_dim}")

    def mask(self, h: Tensor, sums: Tensor | None = None) -> Tensor:
        return group_mask(h, self.v, self.g, self.keep, sums, self.sample, self.balance, self.window)

    def causal(self) -> "Groups":
        return replace(self, balance=0.0)  # the mean over all blocks depends on later tokens

    def of_one_token(self) -> "Groups":
        return replace(self, v=1, sample=1)
