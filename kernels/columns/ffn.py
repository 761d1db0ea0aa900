"""The family `columns`: the six products over the neurons that each large block keeps, in batches `[B, V, d]`."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal import Preceding
from kernels.columns import choose, in_blocks, reduce_neurons, reduce_tokens, sample
from kernels.family import (
    Cost,
    Family,
    FeedForwardSparsity,
    Operands,
    Saved,
    Shape,
    Stages,
    refuses_device,
)
from kernels.groups.ffn import groups_of
from kernels.groups.pattern import Groups
from kernels.weights import thresholded

LARGE = 512  # smallest block, in tokens: copying the rows of its neurons is then cheap compared with its products


class LargeBlocks(Family):
    """Column groups of large blocks; the family `groups` has their names in recipes (`TileGroups.patterns`)."""

    name = "columns"
    operators: ClassVar[Mapping[str, Stages]] = {
        "columns_keep_largest": (("selection",), ()),
        "columns_sample": (("(1)",), ("(3)",)),
        "columns_reduce_neurons": (("(2)",), ("(5)",)),
        "columns_reduce_tokens": ((), ("(4)", "(6)")),
    }

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        return groups_of(sparsity) is not None

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        if refusal := refuses_device(device, dtype):
            return refusal
        if isinstance(sparsity.pattern, Preceding) and sparsity.weight_products:
            return "a choice made from the preceding block needs dense weights"
        pattern = groups_of(sparsity)
        assert pattern is not None
        return "" if pattern.v >= LARGE else f"large blocks need v of at least {LARGE}"

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        pattern = groups_of(sparsity)
        assert pattern is not None
        chosen = " by the preceding block" if isinstance(sparsity.pattern, Preceding) else ""
        return f"blocks of {pattern.v} tokens as dense FFNs of the neurons chosen{chosen}, cuBLAS"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        pattern = groups_of(sparsity)
        assert pattern is not None
        kept = pattern.density(shape.hidden_dim)
        return Cost(
            (kept,) * 6,
            beside=1 / pattern.sample,
            kept_h=kept,
            gradients=kept,
            copied_rows=kept * -(-shape.tokens // pattern.v),
            chosen_by=1 / pattern.sample,
        )

    # Not in `forward`: if it returned a contiguous view, compiled code of torch 2.11 would compute zero gradients.
    def arrange(self, x: Tensor, sparsity: FeedForwardSparsity) -> Tensor:
        assert isinstance(sparsity.pattern, Groups)
        return in_blocks(x, sparsity.pattern.v)

    def restore(self, y: Tensor, sparsity: FeedForwardSparsity, tokens: int) -> Tensor:
        return y.flatten(0, 1)[:tokens]

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        w1, w2, w1_scale, _ = weights
        pattern = sparsity.pattern
        assert isinstance(pattern, Groups)
        kept = pattern.kept_groups(w1.shape[0]) * pattern.g
        w1_thresholded = thresholded(w1, w1_scale)
        chosen_by = x[:, :: pattern.sample].flatten(0, 1) @ w1_thresholded.T
        place = choose(chosen_by.unflatten(0, (x.shape[0], -1)), pattern)
        active = sample(x, w1_thresholded, place, kept).relu()  # (1)
        h = active * active
        return reduce_neurons(h, w2.T, place), (x, h, place)  # (2)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        w1, w2, w1_scale, w2_scale = weights
        x, h, place = saved
        assert x is not None and h is not None and place is not None
        dy1 = 2 * h.sqrt() * sample(dy, thresholded(w2.T, w2_scale), place, h.shape[2])  # (3)
        dw2 = reduce_tokens(h, dy, place, True)  # (4)
        dx = reduce_neurons(dy1, thresholded(w1, w1_scale), place)  # (5)
        dw1 = reduce_tokens(dy1, x, place, False)  # (6)
        return dx, dw1, dw2

    def infer(self, x: Tensor, weights: Operands, pattern: Preceding) -> Tensor:
        w1, w2, _, _ = weights
        choice, width = pattern.pattern, x.shape[1]
        assert isinstance(choice, Groups)
        kept, parts = choice.kept_groups(w1.shape[0]) * choice.g, []
        whole = x.shape[0] // pattern.seq_len * pattern.seq_len
        for tokens in (x[:whole].view(-1, pattern.seq_len, width), x[None, whole:]):
            sequences, length, _ = tokens.shape
            if not tokens.numel():
                continue
            v = min(choice.v, length)
            blocks = F.pad(tokens, (0, 0, 0, -length % v)).unflatten(1, (-1, v))  # [S, B, V, d]
            active = (blocks[:, :1] @ w1.T).relu()
            y = (active * active) @ w2.T
            if length > v:
                place = choose(blocks[:, :-1].flatten(0, 1)[:, :: choice.sample] @ w1.T, choice)
                active = sample(blocks[:, 1:].flatten(0, 1), w1, place, kept).relu()  # (1)
                rest = reduce_neurons(active * active, w2.T, place)  # (2)
                y = torch.cat([y, rest.unflatten(0, (sequences, -1))], 1)
            parts.append(y.flatten(1, 2)[:, :length].flatten(0, 1))
        return torch.cat(parts)


LARGE_BLOCKS = LargeBlocks()
