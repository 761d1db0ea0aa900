"""The family `venom`: the six products over V:N:M activations in compact form."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

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
from kernels.venom import expand, reduce_neurons, sample_dy1, select_columns
from kernels.venom.pattern import COLUMNS, Venom
from kernels.weights import linear, refuses_packed, thresholded


class CompactVenom(Family):
    name = "venom"
    takes_order = True
    operators: ClassVar[Mapping[str, Stages]] = {
        "venom_select_columns": (("selection",), ()),
        "venom_reduce_neurons": (("(2)",), ("(5)",)),
        "venom_sample_dy1": ((), ("(3)",)),
    }
    patterns: ClassVar[Mapping[str, FromRecipe]] = {"venom": FromRecipe(("v", "n", "m"), Venom)}

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        pattern = sparsity.pattern
        return isinstance(pattern, Venom) and (pattern.n, pattern.m) != (2, COLUMNS)  # 2:4 is in `kernels.two_four`

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        if refusal := refuses_device(device, dtype):
            return refusal
        if sparsity.weight_products and (refusal := refuses_packed(shape, here)):
            return refusal
        pattern = sparsity.pattern
        assert isinstance(pattern, Venom)
        if pattern.m > 256 or not 16 <= pattern.v <= 256 or pattern.v & (pattern.v - 1):
            return f"tiles need v, a power of two from 16 to 256, and m up to 256, not v = {pattern.v}, m = {pattern.m}"
        return ""

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        return "Venom, Triton"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        pattern = sparsity.pattern
        assert isinstance(pattern, Venom)
        gathered = COLUMNS / pattern.m  # for any n
        return Cost(
            (1.0, gathered, gathered, 1.0, gathered, 1.0),
            halved=tuple(n for n in sparsity.weight_products if n == 1),
            kept_h=gathered,  # (4) and (6) read h and dy1 expanded
        )

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        w1, w2, w1_scale, _ = weights
        pattern = sparsity.pattern
        assert isinstance(pattern, Venom)
        x_ordered = x if order is None else x.index_select(0, order)
        y1 = linear(x_ordered, w1, w1_scale, packed=x.is_cuda)  # (1)
        tiles, columns = select_columns(y1, pattern.v, pattern.n, pattern.m)
        y = reduce_neurons(tiles, columns, w2.T.contiguous(), x.shape[0], order)  # (2)
        return y, (x_ordered, tiles, columns, order)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        w1, w2, w1_scale, w2_scale = weights
        x, tiles, columns, order = saved
        assert x is not None and tiles is not None and columns is not None
        tokens, hidden_dim = x.shape[0], w1.shape[0]
        dy = dy if order is None else dy.index_select(0, order)
        dy1 = sample_dy1(dy, thresholded(w2.T.contiguous(), w2_scale), tiles, columns)  # (3)
        dx = reduce_neurons(dy1, columns, thresholded(w1, w1_scale), tokens, order)  # (5)
        dw2 = dy.T @ expand(tiles, columns, tokens, hidden_dim)  # (4)
        dw1 = expand(dy1, columns, tokens, hidden_dim).T @ x  # (6)
        return dx, dw1, dw2


COMPACT_VENOM = CompactVenom()
