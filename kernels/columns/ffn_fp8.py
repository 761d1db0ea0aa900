"""The family `columns_fp8`: the products of `columns` in fp8; see `kernels.columns.fp8` and `kernels.float8`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from kernels.columns import choose, fp8
from kernels.columns.ffn import LARGE, LargeBlocks
from kernels.family import Cost, Family, FeedForwardSparsity, Operands, Saved, Shape, Stages, refuses_device
from kernels.float8 import LARGEST, scale_of
from kernels.groups.pattern import Groups

CAPABILITY = 9, 0  # of GPUs with the tensor memory accelerator (TMA), which loads the operands
ALIGNED = 16  # bytes, and so fp8 numbers: the row of an operand of the TMA is a multiple of it


class LargeBlocksFp8(LargeBlocks):
    name = "columns_fp8"
    fp8 = True
    takes_order = True
    operators: ClassVar[Mapping[str, Stages]] = {
        "columns_fp8_cast": (("permutation",), ("permutation",)),
        "columns_fp8_quantise": (("packing",), ()),
        "columns_fp8_chosen_by": (("selection",), ()),
        "columns_fp8_sample": (("(1)",), ("(3)",)),
        "columns_fp8_cast_square": (("packing",), ()),
        "columns_fp8_cast_gradient": ((), ("packing",)),
        "columns_fp8_reduce_neurons": (("(2)",), ("(5)",)),
        "columns_fp8_reduce_tokens": ((), ("(4)", "(6)")),
    }

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        if refusal := refuses_device(device, dtype):
            return refusal
        if here and torch.cuda.get_device_capability(device) < CAPABILITY:
            return "fp8 products need a GPU of compute capability 9.0 or higher"
        pattern = sparsity.pattern
        if not isinstance(pattern, Groups):
            return "a choice made from the preceding block has no fp8 products"
        if sparsity.weight_products:
            return "fp8 products need dense weights"
        kept = pattern.kept_groups(shape.hidden_dim) * pattern.g
        if pattern.v < LARGE or pattern.v % ALIGNED or shape.width % ALIGNED or kept % ALIGNED:
            return (
                f"large blocks in fp8 need v of at least {LARGE}, and v, the width and the kept neurons ({kept}) "
                f"divisible by {ALIGNED}"
            )
        return ""

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        assert isinstance(sparsity.pattern, Groups)
        return f"blocks of {sparsity.pattern.v} tokens as dense FFNs of the neurons chosen, in fp8, Triton"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        # Memory is counted in bf16 elements, and an fp8 number is half of one: h, and copies of all of W1 and W2.
        cost = super().cost(sparsity, shape)
        return replace(cost, kept_h=cost.kept_h / 2, kept_weights=1.0)

    arrange, restore = Family.arrange, Family.restore  # the operators take `[T, d]`: `fp8.cast` divides it into blocks

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        w1, w2, _, _ = weights
        pattern = sparsity.pattern
        assert isinstance(pattern, Groups)
        order = torch.arange(x.shape[0], device=x.device) if order is None else order
        order, count = order.int(), pattern.kept_groups(w1.shape[0]) * pattern.g
        v = min(pattern.v, -(-x.shape[0] // ALIGNED) * ALIGNED)
        scale_x = _scales(x, order, v)
        scale_w1, scale_w2 = (
            scale_of(weight.abs().amax()).expand(scale_x.shape[0]).contiguous() for weight in (w1, w2)
        )
        w1_fp8, w2_fp8 = fp8.quantise(w1, 1 / scale_w1[0]), fp8.quantise(w2.T, 1 / scale_w2[0])
        x_fp8, x_t = fp8.cast(x, order, 1 / scale_x, v)
        y1 = fp8.chosen_by(x_fp8, w1_fp8, pattern.sample, scale_w1[:1], x.dtype)
        place = choose(y1 * scale_x[:, None, None].to(x.dtype), pattern)
        kept = fp8.kept_neurons(place, count)
        y1, peak = fp8.sample(x_fp8, w1_fp8, kept, scale_x, scale_w1, True, x.dtype)  # (1)
        scale_h = scale_of(peak * peak)
        h, h_t = fp8.cast_square(y1, 1 / scale_h)
        y = fp8.reduce_neurons(h, w2_fp8, kept, scale_h, scale_w2, order, x.dtype)  # (2)
        scales = scale_x, scale_h, scale_w1, scale_w2
        return y, (x_t, h_t, w1_fp8, w2_fp8, place, kept, order, *scales)

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, h, w1, w2, place, kept, order, scale_x, scale_h, scale_w1, scale_w2 = (
            each for each in saved if each is not None
        )
        dtype, v = dy.dtype, x.shape[2]
        scale_dy = _scales(dy, order, v)
        dy_fp8, dy_t = fp8.cast(dy, order, 1 / scale_dy, v)
        dh, peak = fp8.sample(dy_fp8, w2, kept, scale_dy, scale_w2, False, dtype)  # (3)
        scale_dy1 = scale_of(2 * (scale_h * LARGEST).sqrt() * peak)  # of a bound of |dy1|, which saves a pass over dy1
        dy1, dy1_t = fp8.cast_gradient(dh, 1 / scale_dy1, h, scale_h)
        dw2 = fp8.reduce_tokens(h, dy_t, place, scale_h, scale_dy, True, dtype)  # (4)
        dx = fp8.reduce_neurons(dy1, w1, kept, scale_dy1, scale_w1, order, dtype)  # (5)
        dw1 = fp8.reduce_tokens(dy1_t, x, place, scale_dy1, scale_x, False, dtype)  # (6)
        return dx, dw1, dw2


def _scales(x: Tensor, order: Tensor, v: int) -> Tensor:
    """The scale of each block of v rows of x[order], x `[T, d]`: `[B]` float32, B = ceil(T / v)."""
    peaks = x.abs().amax(1).float()[order]
    return scale_of(torch.nn.functional.pad(peaks, (0, -len(peaks) % v)).view(-1, v).amax(1))


LARGE_BLOCKS_FP8 = LargeBlocksFp8()
