"""2:4 weights by soft-thresholding: a sparse weight that is a continuous function of the dense one.

Of every four consecutive weights, let t be the second-smallest magnitude. Then

    S(w)_i = sign(w_i) * max(|w_i| - t, 0)

keeps at most two of the four. A hard cut jumps when two weights of a group swap ranks; here the one that
leaves and the one that enters are both zero at that moment, so the loss stays continuous in w and weights do
not oscillate in and out of the mask. The shrinkage is undone by one scalar a tensor, fixed when sparsity
starts,

    beta = <w, S(w)> / <S(w), S(w)>      the least-squares fit of beta * S(w) to w,

since re-fitting it at every step makes masks flip more often. Gradients pass to the dense weight unchanged
(straight-through).

Source: S-STE, Hu et al., NeurIPS 2024.
"""

import torch
from torch import Tensor


def _soft_threshold(weight: Tensor) -> Tensor:
    a, b, c, d = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    # Second-smallest of four: the smaller of "the larger of both minima" and "the smaller of both maxima".
    threshold = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    threshold = threshold.unsqueeze(-1).expand(*threshold.shape, 4).flatten(-2)
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return _soft_threshold(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def soft_threshold_2_4(weight: Tensor) -> Tensor:
    """Soft-threshold every four consecutive weights along the last dimension to at most two.

    Args:
        weight: `[..., K]`, floating point, K a multiple of 4.

    Returns:
        S(weight), same shape and dtype, without beta. Its backward is the identity (straight-through).

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"soft_threshold_2_4 needs a last dimension divisible by 4, got {tuple(weight.shape)}")
    return _SoftThreshold.apply(weight)


def soft_threshold_scale(weight: Tensor) -> Tensor:
    """beta, the scalar for which beta * S(weight) is the least-squares fit to weight.

    Args:
        weight: `[..., K]`, floating point, K a multiple of 4.

    Returns:
        A tensor of shape `[]` in at least float32; 1 where S(weight) is zero everywhere.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    sparse = soft_threshold_2_4(weight)
    energy = sparse.square().sum()
    return torch.where(energy == 0, torch.ones_like(energy), (weight * sparse).sum() / energy)
