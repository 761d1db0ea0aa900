"""Launches of products.cu: products (2) to (6) over kept tiles on Hopper, bf16 with float32 accumulation.

PyTorch's allocator returns the same addresses at every training step. So `_reduce_neurons`, `_sample` and
`_reduce_tokens` prepare a launch once for its addresses and sizes and cache it, which saves host time.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.groups.tiles import COUNTERS, TILE, TileLists, bounds
from kernels.hopper import Kernel, Launch, tensor_map

CLUSTER = 2  # CTAs in a cluster, which share an operand
BN = 256  # columns of an output tile
SHARED_BYTES = 4 * (128 + BN) * 64 * 2 + 4 * 64 * 64 * 2 + 256 + 1024  # stages, staged output, barriers, alignment
THREADS = 384
LISTS = "start", "tile_group", "tile_block", "group_count", "group_order", "group_tiles"  # in the buffer's order


class _Arguments(ctypes.Structure):
    """The struct `Arguments` of products.cu."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "out",
            "counter",
            "start",
            "tile_group",
            "tile_block",
            "group_tiles",
            "group_count",
            "group_order",
            "row_order",
        )
    ] + [(name, ctypes.c_int) for name in ("rows", "strips", "together", "tokens", "width", "leading", "blocks")]


# In the order of their counters.
KERNELS = {
    name: Kernel(Path(__file__).with_name("products.cu"), name, SHARED_BYTES)
    for name in (
        "reduce_neurons_rows",
        "reduce_neurons_columns",
        "sample",
        "reduce_tokens_rows",
        "reduce_tokens_columns",
    )
}
assert len(KERNELS) == COUNTERS


class _Lists(NamedTuple):
    """Device, address and sizes of a TileLists: a key for the cached launches."""

    device: int
    address: int
    blocks: int
    groups: int
    capacity: int


def _lists(lists: TileLists) -> _Lists:
    buffer = lists.buffer
    return _Lists(buffer.get_device(), buffer.data_ptr(), lists.blocks, lists.groups, lists.capacity)


def _prepare(name: str, lists: _Lists, a: Any, b: Any, h: Any, **fields: int | None) -> Launch:
    """The launch of a kernel, from its three tensor maps and the fields of `_Arguments` besides the lists."""
    device, address, *sizes = lists
    *starts, counters, _ = (address + 4 * bound for bound in bounds(*sizes))
    fields |= dict(zip(LISTS, starts, strict=True)) | {"blocks": lists.blocks}
    arguments = _Arguments(counter=counters + 4 * list(KERNELS).index(name), **fields)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Launch(KERNELS[name], device, processors // CLUSTER * CLUSTER, THREADS, a, b, h, arguments)


@functools.lru_cache(maxsize=4096)
def _reduce_neurons(
    lists: _Lists, tiles: int, weight: int, by_rows: bool, order: int | None, out: int, tokens: int, width: int
) -> Launch:
    hidden_dim = lists.groups * TILE
    a = tensor_map(tiles, lists.capacity * TILE, TILE, TILE // CLUSTER)
    b = tensor_map(weight, hidden_dim, width, 64, BN // 64) if by_rows else tensor_map(weight, width, hidden_dim, BN)
    return _prepare(
        "reduce_neurons_rows" if by_rows else "reduce_neurons_columns",
        lists,
        a,
        b,
        a,
        out=out,
        row_order=order,
        rows=lists.blocks,
        together=32,
        strips=-(-width // (CLUSTER * BN)),
        tokens=tokens,
        width=width,
        leading=width,
    )


def reduce_neurons(tiles: Tensor, lists: TileLists, weight: Tensor, order: Tensor | None, tokens: int) -> Tensor:
    """See `kernels.groups.reduce_neurons`."""
    width = weight.shape[1]
    out = tiles.new_empty((tokens, width))
    _reduce_neurons(
        _lists(lists),
        tiles.data_ptr(),
        weight.data_ptr(),
        weight.is_contiguous(),
        None if order is None else order.data_ptr(),
        out.data_ptr(),
        tokens,
        width,
    )()
    return out


@functools.lru_cache(maxsize=4096)
def _sample(lists: _Lists, dy: int, w2: int, tiles: int, out: int, tokens: int, width: int) -> Launch:
    return _prepare(
        "sample",
        lists,
        tensor_map(dy, tokens, width, TILE // CLUSTER),
        tensor_map(w2, width, lists.groups * TILE, 64, TILE // 64),
        tensor_map(tiles, lists.capacity * TILE, TILE, TILE, TILE // 64),
        out=out,
        rows=lists.blocks,
        together=32,
        strips=-(-lists.capacity // (lists.blocks * 2 * CLUSTER)),  # every block has equally many tiles
        tokens=tokens,
        width=width,
    )


def sample_dy1(dy: Tensor, weight: Tensor, tiles: Tensor, lists: TileLists) -> Tensor:
    """See `kernels.groups.sample_dy1`."""
    out = torch.empty_like(tiles)
    _sample(_lists(lists), dy.data_ptr(), weight.data_ptr(), tiles.data_ptr(), out.data_ptr(), *dy.shape)()
    return out


@functools.lru_cache(maxsize=4096)
def _reduce_tokens(lists: _Lists, tiles: int, x: int, out: int, tokens: int, width: int, transposed: bool) -> Launch:
    a = tensor_map(tiles, lists.capacity * TILE, TILE, 64, 1)
    return _prepare(
        "reduce_tokens_columns" if transposed else "reduce_tokens_rows",
        lists,
        a,
        tensor_map(x, tokens, width, 64, BN // 64),
        a,
        out=out,
        rows=lists.groups,
        together=64,
        strips=-(-width // (CLUSTER * BN)),
        tokens=tokens,
        width=width,
        leading=lists.groups * TILE if transposed else width,
    )


def reduce_tokens(tiles: Tensor, lists: TileLists, x: Tensor, transposed: bool) -> Tensor:
    """See `kernels.groups.reduce_tokens`."""
    width, hidden_dim = x.shape[1], lists.groups * TILE
    out = tiles.new_empty((width, hidden_dim) if transposed else (hidden_dim, width))
    _reduce_tokens(_lists(lists), tiles.data_ptr(), x.data_ptr(), out.data_ptr(), *x.shape, transposed)()
    return out
