"""Weights as the products read them: dense, or 2:4 by soft-thresholding (`kernels.two_four.reference`).

A 2:4 weight `W' = beta S(W)` is stored either as a dense matrix with zeros, which any product can read, or packed, for
the sparse tensor cores. Gradients pass to the dense weight W with a straight-through estimator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.family import Shape
from kernels.two_four import soft_threshold_2_4, soft_threshold_pack, sparse_linear

CUSPARSELT = torch.backends.cusparselt.is_available()


def thresholded(weight: Tensor, scale: Tensor | None) -> Tensor:
    """W' = beta S(W) `[R, K]` as a dense matrix with zeros, 2:4 along K; W itself without a scale.

    Args:
        weight: `[R, K]`, floating point; with a scale, K a multiple of 4.
        scale: `[]`, beta; None: W' = W.

    Raises:
        ValueError: a scale is given and K is not a multiple of 4.
    """
    return weight if scale is None else scale.to(weight.dtype) * soft_threshold_2_4(weight)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, packed: bool) -> Tensor:
    """x W'^T.

    Args:
        x: `[T, K]`.
        weight: `[R, K]`, dtype of x.
        scale: `[]`, beta; None: W' = W, dense.
        packed: if there is a scale, pack W' and multiply with cuSPARSELt: bf16, R and K multiples of 64.

    Returns:
        `[T, R]` in the dtype of x.
    """
    if scale is None or not packed:
        return x @ thresholded(weight, scale).T
    tokens, missing = x.shape[0], -x.shape[0] % 8  # cuSPARSELt needs a multiple of 8 tokens
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return sparse_linear(soft_threshold_pack(weight, scale), x)[:tokens]


def refuses_packed(shape: Shape, here: bool) -> str:
    """Why products with packed 2:4 matrices do not run; empty if they do. Arguments: see `Family.refuses`."""
    if shape.width % 64 or shape.hidden_dim % 64 or (here and not CUSPARSELT):
        return "packed 2:4 matrices need cuSPARSELt and a width and a hidden_dim divisible by 64"
    return ""
