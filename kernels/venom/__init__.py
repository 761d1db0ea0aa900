"""V:N:M activations in compact form: a block of V tokens is stored as the columns that it keeps.

    tiles   [P, V, W]   P = B * C/W   tile b * C/W + i holds kept columns i * W to (i+1) * W of block b
    columns [P, W]      int32         which neurons they are

B = ceil(T/V) blocks keep C = 4f/M columns each, ascending; W is the largest power of two up to 128 that divides C;
the last block is filled up with zeros.

In this form, products (2), (3) and (5) of `kernels.feed_forward` are dense products with a share 4/M of the
multiplications:

    tiles, columns         = select_columns(y1)                         h = relu(y1)^2, cut
    y                      = reduce_neurons(tiles, columns, W2^T)       (2)
    dy1_tiles              = sample_dy1(dy, W2^T, tiles, columns)   (3)
    dx                     = reduce_neurons(dy1_tiles, columns, W1)     (5)

(4) and (6) reduce over the tokens: they are dense products of h and dy1, expanded.

`reference` is the specification in PyTorch, and the CPU path; `select` and `products` are the kernels.
All functions here are custom operators of PyTorch, so torch.compile passes through them; gradients are the caller's.
"""

import torch
from torch import Tensor

from kernels.operators import operator, register_fake
from kernels.venom import products, reference, select
from kernels.venom.pattern import COLUMNS, Venom, densest_neurons, token_mask, venom_mask
from kernels.venom.reference import compact, expand, tile_width

__all__ = [
    "Venom",
    "compact",
    "densest_neurons",
    "expand",
    "reduce_neurons",
    "sample_dy1",
    "select_columns",
    "tile_width",
    "token_mask",
    "venom_mask",
]


def _check_selection(y1: Tensor, v: int, n: int, m: int) -> None:
    Venom(v, n, m).check(y1.shape[1])
    if v < 16 or v & (v - 1):
        raise ValueError(f"v = {v}: tiles need a power of two, at least 16")


def _check_bf16(**operands: Tensor) -> None:
    for name, operand in operands.items():
        if operand.is_cuda and operand.dtype != torch.bfloat16:
            raise ValueError(f"{name}: the kernels read bfloat16, got {operand.dtype}")


@operator("venom_select_columns")
def select_columns(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The entries of relu(y1)^2 that `venom_mask` keeps, in compact form.

    Column sums are float32, and the order of the additions depends on the device. So a CPU and a GPU may keep different
    columns if two sums are equal up to rounding. The same device always keeps the same columns.

    Args:
        y1: `[T, f]`, bfloat16 on a GPU, any floating dtype elsewhere. T need not be a multiple of v.
        v: tokens in a block, a power of two, at least 16.
        n: entries that a row keeps of its block's four columns, 2 or 4.
        m: columns in a window, a multiple of 4 that divides f.

    Returns:
        tiles `[P, v, W]` in y1's dtype, and columns `[P, W]` int32.

    Raises:
        ValueError: a pattern outside these bounds, or another dtype on a GPU.
    """
    _check_selection(y1, v, n, m)
    _check_bf16(y1=y1)
    with torch.cuda.device_of(y1):
        return (select if y1.is_cuda else reference).select_columns(y1, v, n, m)


@register_fake(select_columns)
def _(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    _check_selection(y1, v, n, m)
    kept = COLUMNS * y1.shape[1] // m
    width = tile_width(kept)
    count = (y1.shape[0] + v - 1) // v * (kept // width)
    return y1.new_empty(count, v, width), y1.new_empty(count, width, dtype=torch.int32)


@operator("venom_reduce_neurons")
def reduce_neurons(
    tiles: Tensor, columns: Tensor, weight_rows: Tensor, tokens: int, order: Tensor | None = None
) -> Tensor:
    """Products (2) and (5): h or dy1 `[T, f]` in compact form, times W2^T or W1.

    Args:
        tiles: `[P, V, W]`: of h for (2), of dy1 for (5).
        columns: `[P, W]` int32, from `select_columns`.
        weight_rows: `[f, d]`, one row for each neuron, dtype of the tiles: W2^T for (2), W1 for (5).
        tokens: T.
        order: `[T]` int64, a permutation: row t of the product is written to row order[t], which restores the order of
            tokens that were permuted as x[order]. None: to row t.

    Returns:
        `[T, d]`, in the dtype of the weight; sums are float32 or wider.

    Raises:
        ValueError: operands that are not bfloat16 on a GPU.
    """
    _check_bf16(tiles=tiles, weight_rows=weight_rows)
    with torch.cuda.device_of(tiles):
        return (products if tiles.is_cuda else reference).reduce_neurons(tiles, columns, weight_rows, tokens, order)


@register_fake(reduce_neurons)
def _(tiles, columns, weight_rows, tokens, order=None):
    return weight_rows.new_empty(tokens, weight_rows.shape[1])


@operator("venom_sample_dy1")
def sample_dy1(dy: Tensor, weight_rows: Tensor, h_tiles: Tensor, columns: Tensor) -> Tensor:
    """Product (3) and the gradient of the square: dy1 = 2 sqrt(h) * (dy W2) at the kept columns, in compact form.

    Args:
        dy: `[T, d]`.
        weight_rows: `[f, d]`, one row for each neuron, dtype of dy: W2^T.
        h_tiles: `[P, V, W]`, dtype of dy: h.
        columns: `[P, W]` int32, from `select_columns`.

    Returns:
        tiles of dy1 `[P, V, W]` in the dtype of h_tiles; zero where h is zero.

    Raises:
        ValueError: operands that are not bfloat16 on a GPU.
    """
    _check_bf16(dy=dy, weight_rows=weight_rows, h_tiles=h_tiles)
    with torch.cuda.device_of(dy):
        return (products if dy.is_cuda else reference).sample_dy1(dy, weight_rows, h_tiles, columns)


@register_fake(sample_dy1)
def _(dy, weight_rows, h_tiles, columns):
    return torch.empty_like(h_tiles)
