"""The squared-ReLU FFN with sparse operands: six products, and which family computes them.

`T` tokens, `d` model width, `f` FFN width; no gate, no bias.

    y1  = x W1'^T             [T, f]   (1)   W1' = beta1 S(W1) where the weights are 2:4, else W1
    h   = relu(y1)^2, cut to the pattern
    y   = h W2^T              [T, d]   (2)
    dh  = dy W2'              [T, f]   (3)   W2' = beta2 S(W2), groups of four along d, or W2
    dW2 = dy^T h              [d, f]   (4)
    dy1 = 2 relu(y1) * dh     [T, f]         zero wherever h is
    dx  = dy1 W1'             [T, d]   (5)
    dW1 = dy1^T x             [f, d]   (6)   straight-through to the dense W1

Since relu(y1) = sqrt(h), only x and h are kept for the backward pass. In fp8, x, dy, W1', W2', h and dy1 are rounded
before a product reads them (`kernels.float8`), and every product that reads one of them reads the same numbers.

What is exact and what is not. The mask is held fixed by the backward pass, as in any top-k selection; given
the mask and dense W2', all gradients are those of the function that the forward pass computed. Two options
approximate them, for speed:

    w2_scale         (3) reads the 2:4 W2' while (2) reads the dense W2: the mask of (2) leaves the tensor core no room
                     for a second sparse operand (arXiv 2602.06183).
    cut_along_tokens (4) and (6) reduce over tokens, so 2:4 activations, sparse along f, do not speed them up. With
                     this option h and dy1 are cut a second time, along the tokens, for these two (arXiv 2503.16672).

The six products are written once a family (`kernels.family`), in its `ffn.py`:

    kernels/masked.py      the reference, dense products over masked operands: any pattern, any device
    kernels/groups/        tiles of column groups
    kernels/columns/       the neurons that large blocks keep
    kernels/venom/         V:N:M
    kernels/two_four/      2:4 activations, and 2:4 weights alone

`choose` takes the first family that does not refuse, else the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.causal import Preceding
from kernels.clustering import permute_rows
from kernels.columns.ffn import LARGE_BLOCKS
from kernels.columns.ffn_fp8 import LARGE_BLOCKS_FP8
from kernels.family import Family, FeedForwardSparsity, FromRecipe, Operands, Shape
from kernels.groups.ffn import TILE_GROUPS
from kernels.masked import MASKED
from kernels.two_four.ffn import PACKED_ACTIVATIONS, PACKED_WEIGHTS
from kernels.venom.ffn import COMPACT_VENOM
from kernels.venom.pattern import COLUMNS, Venom
from kernels.weights import thresholded

FAMILIES: list[Family] = [
    TILE_GROUPS,
    LARGE_BLOCKS,
    LARGE_BLOCKS_FP8,
    COMPACT_VENOM,
    PACKED_ACTIVATIONS,
    PACKED_WEIGHTS,
]
DENSE = FeedForwardSparsity()

_preferred: Family | None = None

Scale: TypeAlias = Tensor | None


@contextmanager
def prefer(family: Family) -> Iterator[None]:
    """Let one family compute every sparse FFN, whatever it would refuse: for tests, and to compare two of them."""
    global _preferred
    before, _preferred = _preferred, family
    try:
        yield
    finally:
        _preferred = before


def choose(
    sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
) -> tuple[Family, str]:
    """The family that computes a sparse FFN: the first that does not refuse, else the masked reference.

    Args:
        sparsity: of the FFN.
        shape: d and f.
        device, dtype: that the products run in.
        here: whether the device is of this machine; else it is taken for a Hopper GPU with cuSPARSELt.

    Returns:
        The family and, where it is the reference, why no other one runs; else "".
    """
    if _preferred is not None:
        return _preferred, "preferred"
    refusals: list[str] = []
    for family in FAMILIES:
        if family.fp8 == sparsity.fp8 and family.handles(sparsity):
            refusal = family.refuses(sparsity, shape, device, dtype, here)
            if not refusal:
                return family, ""
            if refusal not in refusals:
                refusals.append(refusal)
    if refusals:
        return MASKED, "; ".join(refusals)
    if sparsity.pattern is None:
        return MASKED, "nothing is sparse"
    return MASKED, f"no family has kernels for this pattern{' in fp8' if sparsity.fp8 else ''}"


def explain(
    sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
) -> tuple[Family, str]:
    """`choose`, with what computes the products in words, for logs, where a family with kernels does."""
    family, refusal = choose(sparsity, shape, device, dtype, here)
    return family, refusal or family.describe(sparsity, device, here)


def recipe_patterns() -> dict[str, FromRecipe]:
    """What `activations.pattern` can name beside "none", and how each is made of a recipe."""
    return {name: made for family in FAMILIES for name, made in family.patterns.items()}


class _SixProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, w1_scale, w2_scale, order, family, sparsity):
        y, saved = family.forward(x, Operands(w1, w2, w1_scale, w2_scale), sparsity, order)
        ctx.save_for_backward(w1, w2, w1_scale, w2_scale, *saved)
        ctx.family, ctx.sparsity = family, sparsity
        return y

    @staticmethod
    def backward(ctx, dy):
        w1, w2, w1_scale, w2_scale, *saved = ctx.saved_tensors
        dx, dw1, dw2 = ctx.family.backward(dy, saved, Operands(w1, w2, w1_scale, w2_scale), ctx.sparsity)
        return dx, dw1, dw2, None, None, None, None, None


def hidden_activations(x: Tensor, w1: Tensor, w1_scale: Scale = None) -> Tensor:
    """h `[T, f]` before the pattern cuts it, for measuring what the cut loses; arguments as `sparse_feed_forward`."""
    active = (x @ thresholded(w1, w1_scale).T).relu()
    return active * active  # not square(): CUDA autocast computes powers in float32


def sparse_feed_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    sparsity: FeedForwardSparsity = DENSE,
    w1_scale: Scale = None,
    w2_scale: Scale = None,
    order: Tensor | None = None,
    family: Family | None = None,
) -> Tensor:
    """relu(x W1^T)^2 W2^T with sparse operands, as the module docstring spells it out.

    Under autocast the inputs are cast to its dtype, as a linear layer's would be.

    Args:
        x: `[T, d]`, floating point.
        w1: `[f, d]`, same dtype.
        w2: `[d, f]`, same dtype.
        sparsity: what h is cut to, which products read a 2:4 weight, whether h is cut along the tokens as well (2:4
            only).
        w1_scale: `[]`, beta of W1, where product (1) reads beta * S(W1), and with it (5).
        w2_scale: `[]`, beta of W2 along d, where product (3) reads beta * S(W2).
        order: `[T]` int64, a permutation: the tokens in the order in which neighbours share a block. None: as they are.
        family: that computes it; None: `choose`.

    Returns:
        y `[T, d]`, in the order of x.

    Raises:
        ValueError: a pattern that f or T does not allow, 2:4 weights that d does not allow, scales that do not go with
            the sparsity's products.
    """
    tokens, width, hidden_dim = *x.shape, w1.shape[0]
    _check(sparsity, tokens, width, hidden_dim, w1_scale, w2_scale)
    device = x.device.type
    # Asking about the meta device raises; torch.amp.is_autocast_available does not, but breaks torch 2.11's graphs.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    if family is None:
        family, _ = choose(sparsity, Shape(width, hidden_dim), x.device, x.dtype)
    around = None if family.takes_order else order
    inverse = None if around is None else around.argsort()
    if around is not None and inverse is not None:
        x = permute_rows(x, around, inverse)
    if isinstance(sparsity.pattern, Preceding) and family is not MASKED:
        y = family.infer(x, Operands(w1, w2, w1_scale, w2_scale), sparsity.pattern)
    else:
        within = order if family.takes_order else None
        arranged = family.arrange(x, sparsity)
        y = _SixProducts.apply(arranged, w1, w2, w1_scale, w2_scale, within, family, sparsity)
        y = family.restore(y, sparsity, tokens)
    return y if around is None or inverse is None else permute_rows(y, inverse, around)


def _check(
    sparsity: FeedForwardSparsity, tokens: int, width: int, hidden_dim: int, w1_scale: Scale, w2_scale: Scale
) -> None:
    for product, scale in ((1, w1_scale), (3, w2_scale)):
        if (scale is not None) != (product in sparsity.weight_products):
            wanted = "a" if product in sparsity.weight_products else "no"
            raise ValueError(f"product ({product}) of {sparsity} takes {wanted} scale of its weight")
    if sparsity.pattern is not None:
        sparsity.pattern.check(hidden_dim)
    if w2_scale is not None and width % 4:
        raise ValueError(f"w2_scale needs a model width d divisible by 4, got {width}")
    if sparsity.cut_along_tokens:
        if not isinstance(sparsity.pattern, Venom) or (sparsity.pattern.n, sparsity.pattern.m) != (2, COLUMNS):
            raise ValueError(f"cut_along_tokens needs 2:4 activations, not {sparsity.pattern}")
        if tokens % COLUMNS:
            raise ValueError(f"cut_along_tokens needs tokens divisible by {COLUMNS}, got {tokens}")
