"""Column groups in tiles: h keeps whole tiles of 128 tokens by 128 neurons, and only kept tiles are computed.

    y1  = x W1^T                                     (1), dense or with a 2:4 W1
    h   = the kept tiles of relu(y1)^2               `select_tiles`
    y   = h W2^T                                     (2), `reduce_neurons`
    dy1 = 2 sqrt(h) * (dy W2) at the kept tiles      (3), `sample_dy1`
    dW2 = dy^T h                                     (4), `reduce_tokens`
    dx  = dy1 W1                                     (5), `reduce_neurons`
    dW1 = dy1^T x                                    (6), `reduce_tokens`

The gradients are exact for the given choice of tiles. The tokens can be permuted, so that the 128 tokens of a block
need the same neurons: x and dy are gathered once; the products that compute y and dx scatter their rows.

`reference` is the specification in PyTorch, and the CPU path. `select` is in Triton, `products` in CUDA C++ for Hopper,
`portable` has the same products in Triton for other GPUs. All functions of this module are custom operators of PyTorch,
so torch.compile passes through them; `ffn` combines them.

Source: this project.
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
    """Raise ValueError if the GPU kernels cannot read these operands of a product of this width."""
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
    """Select the tiles of h = relu(y1)^2 with the largest sums in each block of tokens.

    Args:
        y1: `[T, f]`, contiguous, f a multiple of TILE, any T. bf16 on a GPU, any floating dtype elsewhere.
        kept: groups of TILE neurons that each block of TILE tokens keeps.
        by: `[T', f]`, T' at least T, dtype of y1, contiguous: block b chooses by the sums of block b of `by`. None: by
            its own sums.
        balance: the sums are divided by their mean over all blocks to this power, see `group_mask`.

    Returns:
        tiles `[P, TILE, TILE]` in y1's dtype, P = ceil(T / TILE) * kept, and the int32 buffer of their `TileLists`.

    Raises:
        ValueError: on a GPU, if an operand is not bf16 or not contiguous. The products below raise it for these
            reasons too, and on Hopper if d is not a multiple of 64.
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
    """Products (2) and (5): h or dy1 `[T, f]`, stored as tiles, times W2^T or W1.

    Args:
        tiles: `[P, TILE, TILE]`: of h for (2), of dy1 for (5).
        lists: the buffer of their `TileLists`.
        weight: `[f, d]`, dtype of the tiles: W2^T as the transpose of a contiguous W2 `[d, f]` for (2), W1 for (5). On
            Hopper d must be a multiple of 64.
        order: `[T]` int32, a permutation: row t of the product is written to row order[t]. None: to row t.
        tokens: T.

    Returns:
        `[T, d]` in the tiles' dtype; sums are float32 or wider.
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
    """Product (3) and the gradient of the square: dy1 = 2 sqrt(h) * (dy W2) at the tiles of h.

    Args:
        dy: `[T, d]`, contiguous.
        weight: `[f, d]`, dtype of dy: W2^T as the transpose of a contiguous W2 `[d, f]`.
        tiles: `[P, TILE, TILE]`, dtype of dy: h.
        lists: the buffer of their `TileLists`.

    Returns:
        tiles of dy1 `[P, TILE, TILE]`, with the same lists.
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
    """Products (4) and (6): dW2 = dy^T h and dW1 = dy1^T x, with h or dy1 `[T, f]` stored as tiles.

    Args:
        tiles: `[P, TILE, TILE]`: of h for (4), of dy1 for (6).
        lists: the buffer of their `TileLists`.
        x: `[T, d]`, contiguous, dtype of the tiles: dy for (4), x for (6).
        hidden_dim: f.
        transposed: return x^T h `[d, f]`, as (4) needs; otherwise h^T x `[f, d]`.

    Returns:
        `[d, f]` or `[f, d]`; zero for neurons that no block keeps.
    """
    _check(x.shape[1], tiles=tiles, x=x)
    of = TileLists.of(lists, x.shape[0], hidden_dim, tiles.shape[0])
    with torch.cuda.device_of(tiles):
        return _products(tiles.device).reduce_tokens(tiles, of, x, transposed)


@register_fake(reduce_tokens)
def _(tiles, lists, x, hidden_dim, transposed):
    return x.new_empty((x.shape[1], hidden_dim) if transposed else (hidden_dim, x.shape[1]))
