"""Rounding to fp8 (e4m3): the scales, and what the reference reads in place of fp8 numbers.

e4m3 has three bits of mantissa and numbers from 2^-9 to 448, so a tensor is divided by a *scale* first: a float32, the
largest magnitude over 448. A weight has one scale. x, h and their gradients have one a block of tokens, the block that
shares what it keeps; without blocks, one in all. The same rounded numbers serve every product that reads them, forward
and backward, so the gradients are those of the function that was computed; through the rounding itself they pass
unchanged (straight-through).

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
