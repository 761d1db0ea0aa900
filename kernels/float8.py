"""Rounding to fp8 (e4m3): the scales, and the rounded values that the reference reads instead of fp8 tensors.

e4m3 has three mantissa bits and magnitudes from 2^-9 to 448, so a tensor is first divided by a float32 *scale*: its
largest magnitude divided by 448. A weight has one scale. x, h and their gradients have one scale for each block of
tokens that shares a pattern, or one in total without blocks. All products, forward and backward, read the same rounded
values, so the gradients are those of the function that was computed, with a straight-through estimator for the
rounding.

Source: e4m3 as in arXiv 2209.05433; one scale a tensor, from its present values, is torchao's tensor-wise scaling.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # e4m3's largest number


def scale_of(largest: Tensor) -> Tensor:
    """float32 scales of largest magnitudes, of any shape; NaN stays."""
    return largest.float().clamp(min=1e-30) / LARGEST


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x as fp8 holds it: of its shape and dtype, with the values that e4m3 numbers times the scale have.

    Args:
        x: floating point.
        scale: float32, broadcast to x.
    """
    return (x.float() * (1 / scale)).to(E4M3).to(x.dtype) * scale.to(x.dtype)


def rounded_by_block(x: Tensor, v: int) -> Tensor:
    """`rounded` with a scale for every v rows of x `[T, N]`; the last block may have fewer."""
    parts = [rounded(part, scale_of(part.abs().amax())) for part in x.split(v)]
    return torch.cat(parts)
