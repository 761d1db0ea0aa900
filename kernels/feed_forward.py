"""The squared-ReLU FFN with sparse operands: its six products, and the choice of the family that computes them.

`T` tokens, `d` model width, `f` FFN width; no gate, no bias.

    y1  = x W1'^T             [T, f]   (1)   W1' = beta1 S(W1) if the weights are 2:4, else W1
    h   = relu(y1)^2, zero outside the pattern
    y   = h W2^T              [T, d]   (2)
    dh  = dy W2'              [T, f]   (3)   W2' = beta2 S(W2), 2:4 along d, or W2
    dW2 = dy^T h              [d, f]   (4)
    dy1 = 2 relu(y1) * dh     [T, f]         zero where h is zero
    dx  = dy1 W1'             [T, d]   (5)
    dW1 = dy1^T x             [f, d]   (6)   straight-through to the dense W1

Since relu(y1) = sqrt(h), only x and h are stored for the backward pass. In fp8, x, dy, W1', W2', h and dy1 are rounded
before the products (`kernels.float8`), and all products that read one of them read the same rounded values.

Exact and approximate gradients. The backward pass treats the mask as a constant, as in any top-k selection. Given the
mask and a dense W2', all gradients are those of the function that the forward pass computed. Two options approximate
them for speed:

    w2_scale         (3) reads the 2:4 W2', while (2) reads the dense W2: in (2) h is the sparse operand, and the sparse
                     tensor cores support only one (arXiv 2602.06183).
    cut_along_tokens (4) and (6) reduce over the tokens, so 2:4 activations, sparse along f, do not speed them up. With
                     this option a second 2:4 pattern, along the tokens, is applied to h and dy1 for these two products
                     (arXiv 2503.16672).

Each family (`kernels.family`) writes the six products in its `ffn.py`:

    kernels/masked.py      the reference, dense products over masked operands: any pattern, any device
    kernels/groups/        column groups, as tiles of 128 by 128
    kernels/columns/       column groups of large blocks, as batched dense products; bf16 and fp8
    kernels/venom/         V:N:M
    kernels/two_four/      2:4 activations, and 2:4 weights alone

`choose` returns the first family that does not refuse, else the reference.
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
    """Use this family for every sparse FFN, without asking what it refuses: for tests, and to compare families."""
    global _preferred
    before, _preferred = _preferred, family
    try:
        yield
    finally:
        _preferred = before


def preferred() -> Family | None:
    """The family that `prefer` names; None outside of it."""
    return _preferred


def choose(
    sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
) -> tuple[Family, str]:
    """The family that computes a sparse FFN: the first that does not refuse, else the masked reference.

    Args:
        sparsity: of the FFN.
        shape: d and f.
        device, dtype: of the products.
        here: whether the device is in this machine; if not, a Hopper GPU with cuSPARSELt is assumed.

    Returns:
        The family and a reason: for the reference, why no other family runs; else "".
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
    """`choose`, with a reason for logs: for a family with kernels, the name of the kernels (`Family.describe`)."""
    family, refusal = choose(sparsity, shape, device, dtype, here)
    return family, refusal or family.describe(sparsity, device, here)


def recipe_patterns() -> dict[str, FromRecipe]:
    """The values of `activations.pattern` besides "none", and how a recipe's keys become each pattern."""
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
    """h `[T, f]` before the pattern is applied, to measure what the pattern drops; see `sparse_feed_forward`."""
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
    """relu(x W1^T)^2 W2^T with sparse operands, see the module docstring. Differentiable in x, w1 and w2.

    Under autocast x, w1 and w2 are cast to its dtype, as in a linear layer.

    Args:
        x: `[T, d]`, floating point.
        w1: `[f, d]`, dtype of x.
        w2: `[d, f]`, dtype of x.
        sparsity: the pattern of h, the products that read a 2:4 weight, and whether (4) and (6) use a second pattern
            along the tokens (2:4 activations only).
        w1_scale: `[]`, beta of W1, if and only if products (1) and (5) read beta * S(W1).
        w2_scale: `[]`, beta of W2 along d, if and only if product (3) reads beta * S(W2).
        order: `[T]` int64, a permutation: x[order] is divided into blocks. None: x itself is.
        family: the family that computes it, without asking what it refuses; None: as `choose` returns.

    Returns:
        y `[T, d]`, in the order of x.

    Raises:
        ValueError: f does not fit the pattern; T is not a multiple of 4 with `cut_along_tokens`; d is not one with
            `w2_scale`; or the scales do not match `sparsity.weight_products`.
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
            raise ValueError(
                f"w{1 if product == 1 else 2}_scale is {'missing' if scale is None else 'given'}, but product "
                f"({product}) reads a {'2:4' if scale is None else 'dense'} weight: weight_products = "
                f"{sparsity.weight_products}"
            )
    if sparsity.pattern is not None:
        sparsity.pattern.check(hidden_dim)
    if w2_scale is not None and width % 4:
        raise ValueError(f"w2_scale needs a model width d divisible by 4, got {width}")
    if sparsity.cut_along_tokens:
        if not isinstance(sparsity.pattern, Venom) or (sparsity.pattern.n, sparsity.pattern.m) != (2, COLUMNS):
            raise ValueError(f"cut_along_tokens needs 2:4 activations, not {sparsity.pattern}")
        if tokens % COLUMNS:
            raise ValueError(f"cut_along_tokens needs tokens divisible by {COLUMNS}, got {tokens}")
