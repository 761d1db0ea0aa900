"""Selection of columns in Triton: one pass over y1 writes the kept part of h in compact form.

A program loads V tokens by a few windows of M neurons. It computes h = relu(y1)^2, sums each column over the tokens,
ranks the sums within each window, and writes the four columns with the largest sums. So y1, the largest tensor of a
training step, is read once, and the dense h, of the same size, is not written.

    y1 [T, f]  ->  tiles [B * C/W, V, W],  columns [B * C/W, W]        C = 4f/M kept columns, W of them in a tile

Source: the pattern is from VENOM, Castro et al., SC 2023; the selection in one pass is from this project.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.venom.pattern import COLUMNS
from kernels.venom.reference import tile_width

SELECT_ELEMENTS = 8192  # entries of y1 that a program holds
SELECT_WARPS = 4


@triton.jit
def _four_largest(sums):
    """Rank 0 to 3, by index, of the four largest of every row of `sums [R, M]`; 4 for the others."""
    # The bits of non-negative floats have the order of the floats. All NaN become one key, the largest, as in a sort.
    key = tl.where(sums != sums, 0x7FFFFFFF, sums.to(tl.int32, bitcast=True))
    index = tl.arange(0, sums.shape[1])
    mine, other = key[:, :, None], key[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index[None, :] < index[:, None])[None, :, :])
    kept = (tl.sum(ahead.to(tl.int32), 2) < 4).to(tl.int32)
    return tl.where(kept != 0, tl.cumsum(kept, 1) - 1, 4)


@triton.jit
def _two_largest(a, b, c, d):
    """a, b, c and d, with zero for the two smallest; among equal values the left one counts as larger."""
    zero = tl.zeros_like(a)
    behind_a = (b > a).to(tl.int32) + (c > a).to(tl.int32) + (d > a).to(tl.int32)
    behind_b = (a >= b).to(tl.int32) + (c > b).to(tl.int32) + (d > b).to(tl.int32)
    behind_c = (a >= c).to(tl.int32) + (b >= c).to(tl.int32) + (d > c).to(tl.int32)
    behind_d = (a >= d).to(tl.int32) + (b >= d).to(tl.int32) + (c >= d).to(tl.int32)
    return (
        tl.where(behind_a < 2, a, zero),
        tl.where(behind_b < 2, b, zero),
        tl.where(behind_c < 2, c, zero),
        tl.where(behind_d < 2, d, zero),
    )


@triton.jit
def _interleave(a, b, c, d):
    """`[..., 2, 2]` whose flattened order is a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _pick(bits, rank, place: tl.constexpr):
    """The entry with rank `place` in every row of `bits [..., M]` int32.

    All other entries are masked to zero and a bitwise or reduces the row: one instruction an entry, exact for NaN and
    infinity.
    """
    return tl.reduce(bits & (((rank ^ place) - 1) >> 31), len(bits.shape) - 1, _or)


@triton.jit
def _select_columns(
    y1,
    tiles,
    columns,
    tokens,
    hidden_dim,
    V: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    PADDED_M: tl.constexpr,
    WINDOWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    block = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, V)
    token = block * V + row
    m = tl.arange(0, PADDED_M)
    neuron = window[:, None] * M + m[None, :]
    # Windows are the first dimension: in Triton's layout a warp then reads neighbouring windows of a token.
    y = tl.load(
        y1 + token[None, :, None] * hidden_dim + neuron[:, None, :],
        mask=(token < tokens)[None, :, None] & (m < M)[None, None, :],
        other=0,
    )
    active = tl.where(y.to(tl.float32) < 0, tl.zeros_like(y), y).to(tl.float32)  # NaN propagates
    h = (active * active).to(tl.bfloat16).to(tl.float32)
    rank = _four_largest(tl.where((m < M)[None, :], tl.sum(h, 1), -1.0))

    bits, ranks = h.to(tl.int32, bitcast=True), rank[:, None, :]
    a = _pick(bits, ranks, 0).to(tl.float32, bitcast=True)
    b = _pick(bits, ranks, 1).to(tl.float32, bitcast=True)
    c = _pick(bits, ranks, 2).to(tl.float32, bitcast=True)
    d = _pick(bits, ranks, 3).to(tl.float32, bitcast=True)
    if N == 2:
        a, b, c, d = _two_largest(a, b, c, d)
    four = tl.permute(_interleave(a, b, c, d).to(tl.bfloat16), (1, 0, 2, 3))
    CHUNKS: tl.constexpr = WIDTH // (4 * WINDOWS)  # programs that write one tile
    tile = block * (hidden_dim // M * 4 // WIDTH) + tl.program_id(0) // CHUNKS
    column = tl.program_id(0) % CHUNKS * (4 * WINDOWS) + tl.arange(0, 4 * WINDOWS)
    place = (tile * V + row)[:, None] * WIDTH + column[None, :]
    tl.store(tiles + place, tl.reshape(four, (V, 4 * WINDOWS)))
    ids = _interleave(_pick(neuron, rank, 0), _pick(neuron, rank, 1), _pick(neuron, rank, 2), _pick(neuron, rank, 3))
    tl.store(columns + tile * WIDTH + column, tl.reshape(ids, (4 * WINDOWS,)))


def select_columns(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """See `kernels.venom.select_columns`."""
    y1 = y1.contiguous()
    tokens, hidden_dim = y1.shape
    blocks, windows = triton.cdiv(tokens, v), hidden_dim // m
    kept = COLUMNS * windows
    width = tile_width(kept)
    tiles = torch.empty(blocks * kept // width, v, width, dtype=torch.bfloat16, device=y1.device)
    columns = torch.empty(blocks * kept // width, width, dtype=torch.int32, device=y1.device)
    padded_m = triton.next_power_of_2(m)
    chunk = min(width // COLUMNS, max(1, SELECT_ELEMENTS // (v * padded_m)))
    _select_columns[windows // chunk, blocks](
        y1, tiles, columns, tokens, hidden_dim, v, n, m, padded_m, chunk, width, num_warps=SELECT_WARPS
    )
    return tiles, columns
