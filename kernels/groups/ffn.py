"""The family `groups`: the six products over column groups in tiles of TILE tokens by TILE neurons."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kernels import hopper
from kernels.causal import Preceding
from kernels.family import (
    Cost,
    Family,
    FeedForwardSparsity,
    FromRecipe,
    Operands,
    Saved,
    Shape,
    Stages,
    refuses_device,
)
from kernels.groups import TILE, reduce_neurons, reduce_tokens, sample_dy1, select_tiles
from kernels.groups.pattern import Groups
from kernels.weights import linear, refuses_packed, thresholded


def groups_of(sparsity: FeedForwardSparsity) -> Groups | None:
    """The column groups of a sparsity, also if the preceding block chooses them; None: it has another pattern."""
    pattern = sparsity.pattern.pattern if isinstance(sparsity.pattern, Preceding) else sparsity.pattern
    return pattern if isinstance(pattern, Groups) else None


class TileGroups(Family):
    name = "groups"
    takes_order = True
    operators: ClassVar[Mapping[str, Stages]] = {
        "groups_select_tiles": (("selection",), ()),
        "groups_reduce_neurons": (("(2)",), ("(5)",)),
        "groups_sample_dy1": ((), ("(3)",)),
        "groups_reduce_tokens": ((), ("(4)", "(6)")),
    }
    patterns: ClassVar[Mapping[str, FromRecipe]] = {
        "groups": FromRecipe(("v", "g", "keep", "sample", "balance", "window"), Groups)
    }

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        return groups_of(sparsity) is not None

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        if refusal := refuses_device(device, dtype):
            return refusal
        if sparsity.weight_products and (refusal := refuses_packed(shape, here)):
            return refusal
        if isinstance(sparsity.pattern, Preceding) and sparsity.weight_products:
            return "a choice made from the preceding block needs dense weights"
        pattern = groups_of(sparsity)
        assert pattern is not None
        if pattern.v != TILE or pattern.g != TILE or pattern.sample > 1 or pattern.window or shape.width % 64:
            return f"tiles need v = g = {TILE}, sample = 1, no window and a width divisible by 64"
        return ""

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        if isinstance(sparsity.pattern, Preceding):
            return "column groups chosen by the preceding block"
        if not here or not hopper.missing(device):
            return "column groups, CUDA C++ for Hopper"
        return f"column groups, Triton: {hopper.missing(device)}"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        assert sparsity.pattern is not None
        kept = sparsity.pattern.density(shape.hidden_dim)
        halved = tuple(n for n in sparsity.weight_products if n == 1)
        return Cost((1.0, kept, kept, kept, kept, kept), halved, kept_h=kept, gradients=kept)

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        w1, w2, w1_scale, _ = weights
        pattern = sparsity.pattern
        assert isinstance(pattern, Groups)
        order = None if order is None else order.int()
        x_ordered = x.contiguous() if order is None else x.index_select(0, order)
        y1 = linear(x_ordered, w1, w1_scale, packed=x.is_cuda)  # (1)
        tiles, lists = select_tiles(y1, pattern.kept_groups(w1.shape[0]), balance=pattern.balance)
        y = reduce_neurons(tiles, lists, w2.T, order, x.shape[0])  # (2)
        return y, (x_ordered, tiles, lists, order)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        w1, w2, w1_scale, w2_scale = weights
        x, tiles, lists, order = saved
        assert x is not None and tiles is not None and lists is not None
        dy = dy.contiguous() if order is None else dy.index_select(0, order)
        w2_thresholded = thresholded(w2.T, w2_scale).T.contiguous()
        dy1 = sample_dy1(dy, w2_thresholded.T, tiles, lists)  # (3)
        dw2 = reduce_tokens(tiles, lists, dy, w1.shape[0], True)  # (4)
        dx = reduce_neurons(dy1, lists, thresholded(w1, w1_scale), order, x.shape[0])  # (5)
        dw1 = reduce_tokens(dy1, lists, x, w1.shape[0], False)  # (6)
        return dx, dw1, dw2

    def infer(self, x: Tensor, weights: Operands, pattern: Preceding) -> Tensor:
        w1, w2, _, _ = weights
        assert isinstance(pattern.pattern, Groups)
        kept, parts = pattern.pattern.kept_groups(w1.shape[0]), []
        for y1 in (x @ w1.T).split(pattern.seq_len):
            active = y1[:TILE].relu()
            parts.append((active * active) @ w2.T)
            if y1.shape[0] > TILE:
                tiles, lists = select_tiles(y1[TILE:], kept, y1)
                parts.append(reduce_neurons(tiles, lists, w2.T, None, y1.shape[0] - TILE))
        return torch.cat(parts)


TILE_GROUPS = TileGroups()
