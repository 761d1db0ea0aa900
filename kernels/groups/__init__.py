"""Column groups: the FFN whose h keeps whole tiles, 128 tokens by 128 neurons, and computes nothing else.

    y1  = x W1^T                                     (1), dense or with a 2:4 W1
    h   = the tiles of relu(y1)^2 that are kept      `select_tiles`
    y   = h W2^T                                     (2), `reduce_neurons`
    dy1 = 2 sqrt(h) * (dy W2) at those tiles         (3), `sample_dy1`
    dW2 = dy^T h                                     (4), `reduce_tokens`
    dx  = dy1 W1                                     (5), `reduce_neurons`
    dW1 = dy1^T x                                    (6), `reduce_tokens`

The gradients are exact for the given choice of tiles. Tokens may be taken in another order, so that the 128 of a block
want the same neurons: x and dy are gathered once, y and dx are scattered by the products that compute them.

`reference` is the specification and runs on the CPU; `select` is Triton, `products` CUDA C++ for Hopper, `portable` the
same products in Triton for other GPUs. All functions here are custom operators of PyTorch, so torch.compile passes
through them; `ffn` puts them together.
"""

import functools
import types

import torch
from torch import Tensor

from kernels import hopper
from kernels.groups import portable, products, reference, select
from kernels.groups.pattern import Groups, group_mask
from kernels.groups.tiles import TILE, TileLists
from kernels.operators import operator, register_fake

__all__ = [
    "TILE",
    "Groups",
    "TileLists",
    "group_mask",
    "reduce_neurons",
    "reduce_tokens",
    "sample_dy1",
    "select_tiles",
]


@functools.cache
def _products(device: torch.device) -> types.ModuleType:
    if device.type != "cuda":
        return reference
    return portable if hopper.missing(device) else products


def _check(width: int, **operands: Tensor) -> None:
    """Raise ValueError where a GPU's kernels would misread the operands of a product."""
    first = next(iter(operands.values()))
    if not first.is_cuda:
        return
    if _products(first.device) is products and width % 64:
        raise ValueError(f"the Hopper kernels need a width divisible by 64, got {width}")
    for name, operand in operands.items():
        if operand.dtype != torch.bfloat16:
            raise ValueError(f"{name}: the kernels read bfloat16, got {operand.dtype}")
        if not (operand.is_contiguous() or (name == "weight" and operand.T.is_contiguous())):
            raise ValueError(f"{name}: the kernels read contiguous operands, got strides {operand.stride()}")


@operator("groups_select_tiles")
def select_tiles(y1: Tensor, kept: int, by: Tensor | None = None, balance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The tiles of h = relu(y1)^2 whose sums are the largest of their block of tokens.

    Args:
        y1: `[T, f]`, contiguous, f a multiple of TILE; T need not be one. On a GPU bf16.
        kept: groups of TILE neurons that a block of TILE tokens keeps.
        by: `[T', f]`, T' at least T, same dtype and contiguous: a block chooses by the sums of the same block of `by`
            instead of its own.
        balance: sums are divided by their mean over all blocks to this power, see `group_mask`.

    Returns:
        tiles `[P, TILE, TILE]`, same dtype, P = ceil(T / TILE) * kept, and the buffer of their `TileLists`, int32.

    Raises:
        ValueError: on a GPU, y1 of another dtype or not contiguous. So do the products below, and where d does not fit.
    """
    _check(0, y1=y1, by=y1 if by is None else by)
    with torch.cuda.device_of(y1):
        tiles, lists = (select if y1.is_cuda else reference).select_tiles(y1, kept, by, balance)
    return tiles, lists.buffer


@register_fake(select_tiles)
def _(y1, kept, by=None, balance=0.0):
    blocks, groups = -(-y1.shape[0] // TILE), y1.shape[1] // TILE
    buffer = y1.new_empty(TileLists.size(blocks, groups, blocks * kept), dtype=torch.int32)
    return y1.new_empty(blocks * kept, TILE, TILE), buffer


@operator("groups_reduce_neurons")
def reduce_neurons(tiles: Tensor, lists: Tensor, weight: Tensor, order: Tensor | None, tokens: int) -> Tensor:
    """The tiles' matrix `[T, f]` times W1, or times W2^T: products (5) and (2).

    Args:
        tiles: `[P, TILE, TILE]`.
        lists: the buffer of their lists.
        weight: W1 `[f, d]`, or W2^T as the transpose of a contiguous W2 `[d, f]`; the tiles' dtype. On Hopper d is a
            multiple of 64.
        order: `[T]` int32, the row of the output that each token's result goes to; None: its own.
        tokens: T.

    Returns:
        `[T, d]`.
    """
    _check(weight.shape[1], tiles=tiles, weight=weight)
    of = TileLists.of(lists, tokens, weight.shape[0], tiles.shape[0])
    with torch.cuda.device_of(tiles):
        return _products(tiles.device).reduce_neurons(tiles, of, weight, order, tokens)


@register_fake(reduce_neurons)
def _(tiles, lists, weight, order, tokens):
    return tiles.new_empty(tokens, weight.shape[1])


@operator("groups_sample_dy1")
def sample_dy1(dy: Tensor, weight: Tensor, tiles: Tensor, lists: Tensor) -> Tensor:
    """dy1 = 2 sqrt(h) * (dy W2) where a tile of h exists: product (3) and the gradient through the square.

    Args:
        dy: `[T, d]`, contiguous.
        weight: W2^T `[f, d]`, as the transpose of a contiguous W2 `[d, f]`; same dtype.
        tiles: h, `[P, TILE, TILE]`, same dtype.
        lists: the buffer of their lists.

    Returns:
        `[P, TILE, TILE]`.
    """
    _check(dy.shape[1], dy=dy, w2=weight.T, tiles=tiles)
    of = TileLists.of(lists, dy.shape[0], weight.shape[0], tiles.shape[0])
    with torch.cuda.device_of(tiles):
        return _products(tiles.device).sample_dy1(dy, weight, tiles, of)


@register_fake(sample_dy1)
def _(dy, weight, tiles, lists):
    return torch.empty_like(tiles)


@operator("groups_reduce_tokens")
def reduce_tokens(tiles: Tensor, lists: Tensor, x: Tensor, hidden_dim: int, transposed: bool) -> Tensor:
    """The transposed tiles' matrix times x: products (6) and, transposed, (4).

    Args:
        tiles: `[P, TILE, TILE]`.
        lists: the buffer of their lists.
        x: `[T, d]`, contiguous, same dtype.
        hidden_dim: f.
        transposed: give `[d, f]` instead of `[f, d]`.

    Returns:
        `[f, d]` or `[d, f]`.
    """
    _check(x.shape[1], tiles=tiles, x=x)
    of = TileLists.of(lists, x.shape[0], hidden_dim, tiles.shape[0])
    with torch.cuda.device_of(tiles):
        return _products(tiles.device).reduce_tokens(tiles, of, x, transposed)


@register_fake(reduce_tokens)
def _(tiles, lists, x, hidden_dim, transposed):
    return x.new_empty((x.shape[1], hidden_dim) if transposed else (hidden_dim, x.shape[1]))
