"""The squared-ReLU FFN with sparse operands: six products, spelt out.

`T` tokens, `d` model width, `f` FFN width; no gate, no bias.

    y1  = x W1'^T             [T, f]   (1)   W1' = beta1 S(W1) where the weights are 2:4, else W1
    h   = relu(y1)^2, cut to the pattern
    y   = h W2^T              [T, d]   (2)
    dh  = dy W2'              [T, f]   (3)   W2' = beta2 S(W2), groups of four along d, or W2
    dW2 = dy^T h              [d, f]   (4)
    dy1 = 2 relu(y1) * dh     [T, f]         zero wherever h is
    dx  = dy1 W1'             [T, d]   (5)
    dW1 = dy1^T x             [f, d]   (6)   straight-through to the dense W1

Since relu(y1) = sqrt(h), only x and h are kept for the backward pass.

What is exact and what is not. The mask is held fixed by the backward pass, as in any top-k selection; given
the mask and dense W2', all gradients are those of the function that the forward pass computed. Two options
approximate them, for speed:

    w2_scale         (3) reads the 2:4 W2' while (2) reads the dense W2: the mask of (2) leaves the tensor core no room
                     for a second sparse operand (arXiv 2602.06183).
    cut_along_tokens (4) and (6) reduce over tokens, so a pattern that is sparse along f does not speed them
                     up. With this option h and dy1 are cut a second time, along the tokens, for these two (arXiv
                     2503.16672, 2602.06183).

`_SparseFeedForward` is the reference: dense products over masked operands, so it is right on any device and fast on
none. What is faster, and where, `backend` knows; `sparse_feed_forward` runs what it names.
"""

import torch
from torch import Tensor

from kernels.clustering import permute_rows
from kernels.groups import TILE, Groups, groups_feed_forward
from kernels.two_four.reference import soft_threshold_2_4
from kernels.venom import Venom, token_mask

Pattern = Venom | Groups


def _thresholded(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else scale.to(weight.dtype) * soft_threshold_2_4(weight)


class _SparseFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens):
        w1 = _thresholded(w1, w1_scale)
        h = hidden_activations(x, w1)  # (1)
        if pattern is not None:
            h = torch.where(pattern.mask(h), h, 0)
        ctx.save_for_backward(x, w1, w2, h, w2_scale)
        ctx.pattern, ctx.cut_along_tokens = pattern, cut_along_tokens
        return h @ w2.T  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, h, w2_scale = ctx.saved_tensors
        dh = dy @ _thresholded(w2.T, w2_scale).T  # (3): groups of four along d
        dy1 = 2 * h.sqrt() * dh
        h_tokens, dy1_tokens = h, dy1
        if ctx.cut_along_tokens:
            kept = token_mask(h, ctx.pattern)
            h_tokens, dy1_tokens = torch.where(kept, h, 0), torch.where(kept, dy1, 0)
        dw2 = dy.T @ h_tokens  # (4)
        dx = dy1 @ w1  # (5)
        dw1 = dy1_tokens.T @ x  # (6)
        return dx, dw1, dw2, None, None, None, None


def hidden_activations(x: Tensor, w1: Tensor, w1_scale: Tensor | None = None) -> Tensor:
    """h `[T, f]` before the pattern cuts it, for measuring what the cut loses; arguments as `sparse_feed_forward`."""
    active = (x @ _thresholded(w1, w1_scale).T).relu()
    return active * active  # not square(): CUDA autocast computes powers in float32


def backend(
    pattern: Pattern | None, weight_products: tuple[int, ...], width: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Which implementation computes the sparse FFN, and why; the only place that decides it.

    Args:
        pattern: of the activations.
        weight_products: products that read a 2:4 weight.
        width: d.
        device, dtype: that the products run in.

    Returns:
        "groups" or "reference", and the reason in words.
    """
    if device.type != "cuda":
        return "reference", f"no kernels for {device.type}"
    if not isinstance(pattern, Groups):
        return "reference", "no kernels for this pattern yet"
    if weight_products:
        return "reference", "no kernels for 2:4 weights yet"
    if pattern.v != TILE or pattern.g != TILE:
        return "reference", f"kernels are for groups of v = g = {TILE}, not v = {pattern.v}, g = {pattern.g}"
    if width % 64:
        return "reference", f"kernels need a model width divisible by 64, not {width}"
    if dtype != torch.bfloat16:
        return "reference", f"kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return "reference", f"kernels are for compute capability 9.0, not {major}.{minor}"
    return "groups", "column groups, Hopper kernels"


def sparse_feed_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pattern: Pattern | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    cut_along_tokens: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """relu(x W1^T)^2 W2^T with sparse operands, as the module docstring spells it out.

    Under autocast the inputs are cast to its dtype, as a linear layer's would be.

    Args:
        x: `[T, d]`, floating point.
        w1: `[f, d]`, same dtype.
        w2: `[d, f]`, same dtype.
        pattern: what h is cut to; None leaves it as it is.
        w1_scale: `[]`, beta of W1: product (1), and with it (5), reads beta * S(W1). None: W1 as it is.
        w2_scale: `[]`, beta of W2 along d: product (3) reads beta * S(W2). None: W2 as it is.
        cut_along_tokens: products (4) and (6) read h and dy1 cut along the tokens as well (Venom only).
        order: `[T]` int64, a permutation: the tokens in the order in which neighbours share a block. None: as they are.

    Returns:
        y `[T, d]`, in the order of x.

    Raises:
        ValueError: a pattern that f or T does not allow, 2:4 weights that d does not allow.
    """
    if w2_scale is not None and w2.shape[0] % 4:
        raise ValueError(f"w2_scale needs a model width d divisible by 4, got {w2.shape[0]}")
    if cut_along_tokens:
        if not isinstance(pattern, Venom):
            raise ValueError("cut_along_tokens needs a Venom pattern")
        if x.shape[0] % pattern.m:
            raise ValueError(f"cut_along_tokens needs tokens divisible by m = {pattern.m}, got {x.shape[0]}")
    device = x.device.type
    # Asking about the meta device raises; torch.amp.is_autocast_available does not, but breaks torch 2.11's graphs.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    weight_products = tuple(n for n, scale in ((1, w1_scale), (3, w2_scale)) if scale is not None)
    chosen, _ = backend(pattern, weight_products, x.shape[1], x.device, x.dtype)
    if isinstance(pattern, Groups) and chosen == "groups":
        pattern.check(w1.shape[0])
        order = None if order is None else order.int()
        return groups_feed_forward(x, w1, w2, order, pattern.kept_groups(w1.shape[0]))[0]
    if order is not None:
        inverse = order.argsort()
        x = permute_rows(x, order, inverse)
    y = _SparseFeedForward.apply(x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens)
    return y if order is None else permute_rows(y, inverse, order)
