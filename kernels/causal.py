"""Activation patterns for inference: a block's pattern is chosen from earlier tokens.

In a sparse phase a block of V tokens shares a pattern that is chosen from all of them, and the router puts later tokens
of a sequence into the same block: the output of a token depends slightly on later tokens. At inference these do not
exist yet (decoding) or must not be used (a prompt's loss). Three choices avoid this:

    v = 1        every token chooses for itself: Groups(1, g, keep) and Venom(1, n, m). No pattern is shared, so a
                 product gathers rows for each token, which suits decoding but is slow for a prompt
    by cluster   every token keeps the entries that the centroid of its cluster would keep (`models.feed_forward`). The
                 pattern is known before product (1), and all tokens of a cluster share it: if a prompt is sorted by
                 cluster and the last block of each cluster is padded, its products are dense tiles. No kernel does this
    Preceding    a block of V consecutive tokens uses the pattern that the preceding V tokens choose, so it is known
                 before product (1) as well. Tiles stay dense, and the kernels run a prompt. The first block of a
                 sequence has no preceding block and stays dense

The last needs no router. It fits better than the choice by cluster, which is also known before product (1): in a 1b
model it keeps 96% of the sum of h^2, and the choice by cluster 65% (docs/studies/claim_1b).

Source: this project; arXiv 2503.16672 proposes activation sparsity for prompts as well.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.family import Pattern


@dataclass(frozen=True)
class Preceding:
    """A pattern whose blocks use the choice of the preceding block, in sequences of `seq_len` tokens."""

    pattern: Pattern
    seq_len: int

    def density(self, hidden_dim: int) -> float:
        """Largest share of h that is kept in an FFN of width `hidden_dim`, the first block included."""
        first = min(self.pattern.v, self.seq_len) / self.seq_len
        return first + (1 - first) * self.pattern.density(hidden_dim)

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError if the pattern does not fit the width `hidden_dim`, or depends on later tokens."""
        self.pattern.check(hidden_dim)
        if self.pattern.causal() != self.pattern:
            raise ValueError(f"{self.pattern}: a block's choice depends on later tokens; use {self.pattern.causal()}")

    def mask(self, h: Tensor) -> Tensor:
        """Which entries of `h [T, f]` are kept: bool `[T, f]`. The last of the T / seq_len sequences may be shorter."""
        self.check(h.shape[1])
        return torch.cat([self._mask(sequence) for sequence in h.detach().split(self.seq_len)])

    def _mask(self, h: Tensor) -> Tensor:
        v, (tokens, hidden_dim) = self.pattern.v, h.shape
        blocks, sample = -(-tokens // v), self.pattern.sample
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        sums = F.pad(wide, (0, 0, 0, blocks * v - tokens)).view(blocks, v, hidden_dim)[:, ::sample].sum(1)
        mask = self.pattern.mask(h, sums.roll(1, 0))
        mask[:v] = h[:v] != 0
        return mask
