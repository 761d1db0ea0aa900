"""Launching products.cu: the five products over kept tiles on Hopper, bf16 with float32 accumulation."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.groups.tiles import TILE, TileLists
from kernels.hopper import Kernel, tensor_map

CLUSTER = 2  # CTAs that share an operand
BN = 256  # columns of an output tile
SHARED_BYTES = 4 * (128 + BN) * 64 * 2 + 4 * 64 * 64 * 2 + 256 + 1024  # stages, staged output, barriers, alignment
THREADS = 384


class _Arguments(ctypes.Structure):
    """`Arguments` of products.cu."""

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


def _kernel(name: str) -> Kernel:
    return Kernel(Path(__file__).with_name("products.cu"), name, SHARED_BYTES)


_REDUCE_NEURONS_ROWS, _REDUCE_NEURONS_COLUMNS = _kernel("reduce_neurons_rows"), _kernel("reduce_neurons_columns")
_SAMPLE = _kernel("sample")
_REDUCE_TOKENS_ROWS, _REDUCE_TOKENS_COLUMNS = _kernel("reduce_tokens_rows"), _kernel("reduce_tokens_columns")


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    kernel: Kernel, a: Any, b: Any, h: Any, lists: TileLists, out: Tensor, order: Tensor | None = None, **numbers: int
) -> Tensor:
    counter = torch.zeros(1, dtype=torch.int32, device=out.device)
    arguments = _Arguments(
        counter=counter.data_ptr(),
        row_order=None if order is None else order.data_ptr(),
        out=out.data_ptr(),
        blocks=lists.blocks,
        **lists.addresses(),
        **numbers,
    )
    kernel.launch(_processors(out.device.index) // CLUSTER * CLUSTER, THREADS, a, b, h, arguments)
    return out


def reduce_neurons(tiles: Tensor, lists: TileLists, weight: Tensor, order: Tensor | None, tokens: int) -> Tensor:
    """See `kernels.groups.reduce_neurons`."""
    width = weight.shape[1]
    out = tiles.new_empty((tokens, width))
    by_rows = weight.is_contiguous()
    b = tensor_map(weight, 64, BN // 64) if by_rows else tensor_map(weight.T, BN)
    a = tensor_map(tiles.view(-1, TILE), TILE // CLUSTER)
    return _launch(
        _REDUCE_NEURONS_ROWS if by_rows else _REDUCE_NEURONS_COLUMNS,
        a,
        b,
        a,
        lists,
        out,
        order,
        rows=lists.blocks,
        together=32,
        strips=-(-width // (CLUSTER * BN)),
        tokens=tokens,
        width=width,
        leading=width,
    )


def sample(dy: Tensor, w2: Tensor, tiles: Tensor, lists: TileLists) -> Tensor:
    """See `kernels.groups.sample`."""
    tokens, width = dy.shape
    out = torch.empty_like(tiles)
    return _launch(
        _SAMPLE,
        tensor_map(dy, TILE // CLUSTER),
        tensor_map(w2, 64, TILE // 64),
        tensor_map(tiles.view(-1, TILE), TILE, TILE // 64),
        lists,
        out,
        rows=lists.blocks,
        together=32,
        strips=-(-lists.capacity // lists.blocks // (2 * CLUSTER)),
        tokens=tokens,
        width=width,
    )


def reduce_tokens(tiles: Tensor, lists: TileLists, x: Tensor, transposed: bool) -> Tensor:
    """See `kernels.groups.reduce_tokens`."""
    width, hidden_dim = x.shape[1], lists.groups * TILE
    out = tiles.new_empty((width, hidden_dim) if transposed else (hidden_dim, width))
    a = tensor_map(tiles.view(-1, TILE), 64, 1)
    return _launch(
        _REDUCE_TOKENS_COLUMNS if transposed else _REDUCE_TOKENS_ROWS,
        a,
        tensor_map(x, 64, BN // 64),
        a,
        lists,
        out,
        rows=lists.groups,
        together=64,
        strips=-(-width // (CLUSTER * BN)),
        tokens=x.shape[0],
        width=width,
        leading=out.stride(0),
    )
