"""Weights as the products read them: whole, or 2:4 by soft-thresholding (`kernels.two_four.reference`).

A 2:4 weight `W' = beta S(W)` is either a dense matrix with zeros, which any product reads, or a packed one, which the
sparse tensor cores read. Gradients go to the whole weight, straight-through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.family import Shape
from kernels.two_four import soft_threshold_2_4, soft_threshold_pack, sparse_linear

CUSPARSELT = torch.backends.cusparselt.is_available()


def thresholded(weight: Tensor, scale: Tensor | None) -> Tensor:
    """W' `[R, K]`, dense with zeros, 2:4 along K; the weight as it is where there is no scale."""
    return weight if scale is None else scale.to(weight.dtype) * soft_threshold_2_4(weight)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, packed: bool) -> Tensor:
    """x W'^T.

    Args:
        x: `[T, K]`.
        weight: `[R, K]`, same dtype.
        scale: `[]`, beta; None: W' is the weight as it is.
        packed: multiply on the sparse tensor cores, where there is a scale.

    Returns:
        `[T, R]`.
    """
    if scale is None or not packed:
        return x @ thresholded(weight, scale).T
    tokens, missing = x.shape[0], -x.shape[0] % 8  # to a number of tokens that cuSPARSELt takes
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return sparse_linear(soft_threshold_pack(weight, scale), x)[:tokens]


def refuses_packed(shape: Shape, here: bool) -> str:
    """Why no packed 2:4 matrix can be multiplied; empty where it can. Arguments as of `Family.refuses`."""
    if shape.width % 64 or shape.hidden_dim % 64 or (here and not CUSPARSELT):
        return "packed 2:4 matrices need cuSPARSELt and a width and a hidden_dim divisible by 64"
    return ""
