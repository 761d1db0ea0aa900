"""The reference: dense products over masked operands, correct for any pattern, on any device, in any dtype.

It is the specification that every family is tested against, and it computes patterns that no other family supports.
"""

import torch
from torch import Tensor

from kernels.family import Cost, Family, FeedForwardSparsity, Operands, Pattern, Saved, Shape
from kernels.float8 import rounded, rounded_by_block, scale_of
from kernels.venom.pattern import Venom, token_mask
from kernels.weights import linear, thresholded


class Masked(Family):
    """All six products dense, over h and dy1 with zeros.

    Attributes:
        packed: whether products (1) and (3) read packed 2:4 weights, on the sparse tensor cores.
    """

    name = "reference"
    packed = False

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        return True

    def refuses(self, sparsity, shape, device, dtype, here=True) -> str:
        return ""

    def describe(self, sparsity, device, here=True) -> str:
        return "dense products over masked operands"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        return Cost()

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        x, weights = _read(x, sparsity), _weights_read(weights, sparsity)
        active = linear(x, weights.w1, weights.w1_scale, self.packed).relu()  # (1)
        h = active * active
        if sparsity.pattern is not None:
            h = torch.where(sparsity.pattern.mask(h), h, 0)
        kept = _kept(active * active, sparsity) if sparsity.fp8 else None
        h = _read(h, sparsity)
        return h @ weights.w2.T, (x, h, kept)  # (2)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, h, kept = saved
        assert x is not None and h is not None
        dy, weights = _read(dy, sparsity), _weights_read(weights, sparsity)
        dh = linear(dy, weights.w2.T, weights.w2_scale, self.packed)  # (3): groups of four along d
        dy1 = 2 * h.sqrt() * dh
        if kept is not None:
            dy1 = _rounded_dy1(dy1, h, torch.where(kept, dh, 0), _block(sparsity, len(h)))
        h_tokens, dy1_tokens = h, dy1
        if sparsity.cut_along_tokens:
            assert isinstance(sparsity.pattern, Venom)
            kept = token_mask(h, sparsity.pattern)
            h_tokens, dy1_tokens = torch.where(kept, h, 0), torch.where(kept, dy1, 0)
        dw2 = dy.T @ h_tokens  # (4)
        dx = dy1 @ thresholded(weights.w1, weights.w1_scale)  # (5)
        dw1 = dy1_tokens.T @ x  # (6)
        return dx, dw1, dw2


def _block(sparsity: FeedForwardSparsity, tokens: int) -> int:
    """Tokens that share a scale in fp8: those of a block, or all."""
    return sparsity.pattern.v if isinstance(sparsity.pattern, Pattern) else max(1, tokens)


def _read(x: Tensor, sparsity: FeedForwardSparsity) -> Tensor:
    """x, dy or h `[T, N]` as the products read it: in fp8, rounded with a scale for each block."""
    return rounded_by_block(x, _block(sparsity, len(x))) if sparsity.fp8 else x


def _kept(h: Tensor, sparsity: FeedForwardSparsity) -> Tensor:
    """The entries in kept groups of h, also those that are zero; bool `[T, f]`."""
    ones = torch.ones_like(h)
    if not isinstance(sparsity.pattern, Pattern):
        return ones.bool()
    wide = torch.promote_types(h.dtype, torch.float32)
    sums = [part[:: sparsity.pattern.sample].to(wide).sum(0) for part in h.split(sparsity.pattern.v)]
    return sparsity.pattern.mask(ones, torch.stack(sums))


def _rounded_dy1(dy1: Tensor, h: Tensor, dh: Tensor, v: int) -> Tensor:
    """dy1 `[T, f]` rounded to fp8. The scale of a block is that of a bound: largest 2 sqrt(h) times largest |dh|."""
    parts = []
    for part, squares, gradient in zip(dy1.split(v), h.split(v), dh.split(v), strict=True):
        parts.append(rounded(part, scale_of(2 * squares.amax().sqrt() * gradient.abs().amax())))
    return torch.cat(parts)


def _weights_read(weights: Operands, sparsity: FeedForwardSparsity) -> Operands:
    if not sparsity.fp8:
        return weights
    w1, w2 = (rounded(weight, scale_of(weight.abs().amax())) for weight in (weights.w1, weights.w2))
    return weights._replace(w1=w1, w2=w2)


MASKED = Masked()
