"""Column groups: the FFN whose h keeps whole tiles, 128 tokens by 128 neurons, and computes nothing else.

    y1  = x W1^T                                     (1), dense
    h   = the tiles of relu(y1)^2 that are kept      `select_tiles`
    y   = h W2^T                                     (2), `reduce_neurons`
    dy1 = 2 sqrt(h) * (dy W2) at those tiles         (3), `sample`
    dW2 = dy^T h                                     (4), `reduce_tokens`
    dx  = dy1 W1                                     (5), `reduce_neurons`
    dW1 = dy1^T x                                    (6), `reduce_tokens`

The gradients are exact for the given choice of tiles. Tokens may be taken in another order, so that the 128 of a block
want the same neurons: x and dy are gathered once, y and dx are scattered by the products that compute them.

`reference` is the specification and runs on the CPU; `select` (Triton) and `products` (CUDA C++, Hopper) are fast.
"""

import types

import torch
from torch import Tensor

from kernels.groups import products, reference, select
from kernels.groups.reference import Groups, group_mask
from kernels.groups.tiles import TILE, TileLists

__all__ = ["TILE", "Groups", "TileLists", "group_mask", "groups_feed_forward"]


def _backend(x: Tensor) -> tuple[types.ModuleType, types.ModuleType]:
    return (select, products) if x.is_cuda else (reference, reference)


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(0, order)


@torch.library.custom_op("sparsetitan::groups_feed_forward", mutates_args=())
def groups_feed_forward(
    x: Tensor, w1: Tensor, w2: Tensor, order: Tensor | None, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The squared-ReLU FFN of which every block of TILE tokens keeps `kept` groups of TILE neurons.

    Args:
        x: `[T, d]`; on a GPU bf16, d a multiple of 64.
        w1: `[f, d]`, same dtype, f a multiple of TILE.
        w2: `[d, f]`, same dtype.
        order: `[T]` int32, the tokens in the order in which they share blocks; None: as they are.
        kept: groups that a block keeps.

    Returns:
        y `[T, d]`, in the tokens' own order, and what the backward pass needs: x in order (empty without one), the
        tiles of h, their lists.
    """
    selection, product = _backend(x)
    x_ordered = _in_order(x, order)
    tiles, lists = selection.select_tiles(x_ordered @ w1.T, kept)
    y = product.reduce_neurons(tiles, lists, w2.T, order, x.shape[0])
    return y, x.new_empty(0) if order is None else x_ordered, tiles, lists.buffer


@groups_feed_forward.register_fake
def _(x, w1, w2, order, kept):
    tokens, hidden_dim = x.shape[0], w1.shape[0]
    blocks, groups = -(-tokens // TILE), hidden_dim // TILE
    capacity = blocks * kept
    buffer = x.new_empty(TileLists.size(blocks, groups, capacity), dtype=torch.int32)
    ordered = x.new_empty(0) if order is None else torch.empty_like(x)
    return torch.empty_like(x), ordered, x.new_empty(capacity, TILE, TILE), buffer


@torch.library.custom_op("sparsetitan::groups_feed_forward_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, order: Tensor | None, tiles: Tensor, buffer: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW1, dW2; `x` in order."""
    _, product = _backend(x)
    lists = TileLists(buffer, -(-x.shape[0] // TILE), w1.shape[0] // TILE, tiles.shape[0])
    dy = _in_order(dy, order).contiguous()
    dy1 = product.sample(dy, w2, tiles, lists, kept)
    dw2 = product.reduce_tokens(tiles, lists, dy, transposed=True)
    dx = product.reduce_neurons(dy1, lists, w1, order, x.shape[0])
    dw1 = product.reduce_tokens(dy1, lists, x, transposed=False)
    return dx, dw1, dw2


@_backward.register_fake
def _(dy, x, w1, w2, order, tiles, buffer, kept):
    return torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2)


def _save(ctx, inputs, output) -> None:
    x, w1, w2, order, kept = inputs
    _, x_ordered, tiles, buffer = output
    ctx.save_for_backward(x if order is None else x_ordered, w1, w2, order, tiles, buffer)
    ctx.kept = kept
    ctx.mark_non_differentiable(x_ordered, tiles, buffer)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    return *_backward(dy, *ctx.saved_tensors, ctx.kept), None, None


groups_feed_forward.register_autograd(_differentiate, setup_context=_save)
