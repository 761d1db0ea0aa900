"""The family `two_four`: the six products with packed 2:4 operands, activations or weights."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
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
from kernels.masked import Masked
from kernels.two_four import (
    keep_largest_pack,
    pack_like,
    reduce_tokens,
    sparse_matmul,
    token_groups,
    unpack,
)
from kernels.two_four.reference import ROWS
from kernels.venom.pattern import COLUMNS, DENSE_FEATURES, Venom, densest_neurons
from kernels.weights import linear, refuses_packed, thresholded


def _two_of_four() -> Venom:
    return Venom(v=1, n=2, m=4)


class PackedWeights(Masked):
    """2:4 weights with dense activations: the reference, with products (1) and (3) on the sparse tensor cores."""

    name = "two_four"
    packed = True
    operators: ClassVar[Mapping[str, Stages]] = {"two_four_pack": (("packing",), ("packing",))}

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        return sparsity.pattern is None and bool(sparsity.weight_products)

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        return refuses_device(device, dtype) or refuses_packed(shape, here)

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        return "2:4 weights by cuSPARSELt"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        return Cost(halved=sparsity.weight_products)


class PackedActivations(Family):
    """2:4 activations: h and dy1 are packed, and the sparse tensor cores multiply them."""

    name = "two_four"
    operators: ClassVar[Mapping[str, Stages]] = {
        "two_four_pack": (("packing",), ("packing",)),
        "two_four_unpack": ((), ("packing",)),
        "two_four_reduce_tokens": ((), ("(4)", "(6)")),
    }
    patterns: ClassVar[Mapping[str, FromRecipe]] = {"2:4": FromRecipe((), _two_of_four, ("cut_along_tokens",))}

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        pattern = sparsity.pattern
        return isinstance(pattern, Venom) and (pattern.n, pattern.m) == (2, COLUMNS)

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        return refuses_device(device, dtype) or refuses_packed(shape, here)

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        return "2:4 activations by cuSPARSELt"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        along_tokens = (4, 6) if sparsity.cut_along_tokens else ()
        return Cost(
            halved=(*sparsity.weight_products, 2, 5, *along_tokens),
            # Neurons that stay dense along the tokens are computed twice: with all others, and densely.
            beside=DENSE_FEATURES * len(along_tokens),
            kept_h=1 / 2 + 1 / 16,  # half of the entries, and two bits of metadata for each of them
        )

    # With cut_along_tokens, a group of four has one token from each quarter of the micro-batch, so each is padded.
    def arrange(self, x: Tensor, sparsity: FeedForwardSparsity) -> Tensor:
        x = x.unflatten(0, (COLUMNS if sparsity.cut_along_tokens else 1, -1))
        parts, tokens, _ = x.shape
        missing = -tokens % (ROWS // parts)
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.flatten(0, 1)

    def restore(self, y: Tensor, sparsity: FeedForwardSparsity, tokens: int) -> Tensor:
        parts = COLUMNS if sparsity.cut_along_tokens else 1
        return y.unflatten(0, (parts, -1))[:, : tokens // parts].flatten(0, 1)

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        w1, w2, w1_scale, _ = weights
        y1 = linear(x, w1, w1_scale, packed=True)  # (1)
        h = keep_largest_pack(y1, relu_squared=True)
        return sparse_matmul(h, w2.T), (x, h)  # (2)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        w1, w2, w1_scale, w2_scale = weights
        x, h_packed = saved
        assert x is not None and h_packed is not None
        h = unpack(h_packed)
        if sparsity.cut_along_tokens:
            h_cut, whole = keep_largest_pack(token_groups(h)), densest_neurons(h)
            h_whole = h.T.index_select(0, whole)
            dw2 = reduce_tokens(h_cut, dy, whole, h_whole, transpose_result=True)  # (4)
        else:
            dw2 = dy.T @ h  # (4)
        dh = linear(dy, w2.T, w2_scale, packed=True)  # (3)
        dy1 = pack_like(dh, h_packed, relu_squared_grad=True)
        dx = sparse_matmul(dy1, thresholded(w1, w1_scale))  # (5)
        if sparsity.cut_along_tokens:
            dy1_cut = pack_like(token_groups(dh), h_cut, relu_squared_grad=True)
            dy1_whole = 2 * h_whole.sqrt() * dh.T.index_select(0, whole)
            dw1 = reduce_tokens(dy1_cut, x, whole, dy1_whole)  # (6)
        else:
            dw1 = unpack(dy1).T @ x  # (6)
        return dx, dw1, dw2


PACKED_WEIGHTS = PackedWeights()
PACKED_ACTIVATIONS = PackedActivations()
