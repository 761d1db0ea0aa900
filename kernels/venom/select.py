"""Selection in Triton: what a block of V tokens keeps of h, written in the compact form in one pass over y1.

A program holds V tokens by a few windows of M neurons on chip: it squares, sums every column over the tokens, ranks
the sums of a window among each other, and writes the four columns that win. So y1, the largest tensor of
a training step, is read once, and h, of the same size, is never written.

    y1 [T, f]  ->  tiles [B * C/W, V, W],  columns [B * C/W, W]        C = 4f/M kept columns, W of them a tile

The second cut, along the tokens, is the same on h^T: blocks of V neurons, windows of M tokens. A window of neurons has
exactly four columns in the compact form, hence a block of V neurons is 4V/M neighbouring columns there, and the
sums over it are plain row sums. Neurons go back to their places among the V, so products over tokens need no second
index:

    tiles [B * C/W, V, W]  ->  token tiles [f/V * K/W', W', V],  tokens [f/V * K/W', W']   K = 4T/M kept tokens

Source: the pattern is VENOM's, Castro et al., SC 2023; the one-pass selection is this project's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.venom.pattern import COLUMNS
from kernels.venom.reference import tile_width

SELECT_ELEMENTS = 8192  # entries of y1 that a program holds
SELECT_WARPS = 4
CUT_WARPS = 4


@triton.jit
def _four_largest(sums):
    """Rank 0 to 3, by index, of the four largest of every row of `sums [R, M]`; 4 for the others."""
    # Non-negative floats order as their bits do. NaN, the largest for a sort, is made one number, equal to itself.
    key = tl.where(sums != sums, 0x7FFFFFFF, sums.to(tl.int32, bitcast=True))
    index = tl.arange(0, sums.shape[1])
    mine, other = key[:, :, None], key[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index[None, :] < index[:, None])[None, :, :])
    kept = (tl.sum(ahead.to(tl.int32), 2) < 4).to(tl.int32)
    return tl.where(kept != 0, tl.cumsum(kept, 1) - 1, 4)


@triton.jit
def _two_largest(a, b, c, d):
    """a, b, c and d, zero where two of the others are larger; an equal one to the left counts as larger."""
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
    """`[..., 2, 2]` that reads a, b, c, d when flattened."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _pick(bits, rank, place: tl.constexpr):
    """The entry of that rank of every row of `bits [..., M]` int32.

    With all others masked a bitwise or yields it: one instruction an entry, and exact for NaN and infinity.
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
    # Windows first: the layout that Triton gives this order lets a warp read neighbouring windows of a token.
    y = tl.load(
        y1 + token[None, :, None] * hidden_dim + neuron[:, None, :],
        mask=(token < tokens)[None, :, None] & (m < M)[None, None, :],
        other=0,
    )
    active = tl.where(y.to(tl.float32) < 0, tl.zeros_like(y), y).to(tl.float32)  # so NaN stays
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
    CHUNKS: tl.constexpr = WIDTH // (4 * WINDOWS)  # programs that fill a tile
    tile = block * (hidden_dim // M * 4 // WIDTH) + tl.program_id(0) // CHUNKS
    column = tl.program_id(0) % CHUNKS * (4 * WINDOWS) + tl.arange(0, 4 * WINDOWS)
    place = (tile * V + row)[:, None] * WIDTH + column[None, :]
    tl.store(tiles + place, tl.reshape(four, (V, 4 * WINDOWS)))
    ids = _interleave(_pick(neuron, rank, 0), _pick(neuron, rank, 1), _pick(neuron, rank, 2), _pick(neuron, rank, 3))
    tl.store(columns + tile * WIDTH + column, tl.reshape(ids, (4 * WINDOWS,)))


def select_columns(y1: Tensor, v: int, n: int, m: int) -> tuple[Tensor, Tensor]:
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


@triton.jit
def _cut_tokens(
    h_tiles,
    dy1_tiles,
    columns,
    h_token_tiles,
    dy1_token_tiles,
    token_ids,
    tokens,
    hidden_dim,
    V: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program: a block of V tokens and one of V neurons, so WINDOWS windows of tokens by as many of neurons.
    WINDOWS: tl.constexpr = V // M
    neuron_block = tl.program_id(0).to(tl.int64)
    token_block = tl.program_id(1).to(tl.int64)
    kept = hidden_dim // M * 4
    first = neuron_block * WINDOWS * 4
    row = tl.arange(0, V)
    column = first + tl.arange(0, WINDOWS * 4)
    tile = token_block * kept * V  # a block's tiles follow one another
    place = column // WIDTH * (V * WIDTH) + column % WIDTH
    h = tl.load(h_tiles + tile + row[:, None] * WIDTH + place[None, :]).to(tl.float32)
    rank = _four_largest(tl.reshape(tl.sum(h, 1), (WINDOWS, M)))

    window = tl.arange(0, WINDOWS)
    m = tl.arange(0, M)
    token = window[:, None] * M + m[None, :]
    t0, t1, t2, t3 = _pick(token, rank, 0), _pick(token, rank, 1), _pick(token, rank, 2), _pick(token, rank, 3)
    kept_token = tl.reshape(_interleave(t0, t1, t2, t3), (WINDOWS, 4))
    # Windows of neurons first, so that a warp writes neighbouring ones of a token.
    h_cut = tl.zeros((WINDOWS, WINDOWS, 4, M), tl.bfloat16)
    dy1_cut = tl.zeros((WINDOWS, WINDOWS, 4, M), tl.bfloat16)
    for i in tl.static_range(4):  # column i of every window of neurons
        column = first + window * 4 + i
        place = tile + column // WIDTH * (V * WIDTH) + column % WIDTH
        a = tl.load(h_tiles + place[:, None] + t0[None, :] * WIDTH).to(tl.float32)
        b = tl.load(h_tiles + place[:, None] + t1[None, :] * WIDTH).to(tl.float32)
        c = tl.load(h_tiles + place[:, None] + t2[None, :] * WIDTH).to(tl.float32)
        d = tl.load(h_tiles + place[:, None] + t3[None, :] * WIDTH).to(tl.float32)
        if N == 2:
            a, b, c, d = _two_largest(a, b, c, d)
        h = tl.reshape(_interleave(a, b, c, d), (WINDOWS, WINDOWS, 4))
        dy1 = tl.load(dy1_tiles + place[:, None, None] + kept_token[None, :, :] * WIDTH)
        neuron = tl.load(columns + token_block * kept + column) - neuron_block * V - window * M
        here = (neuron[:, None] == m[None, :])[:, None, None, :]
        h_cut = tl.where(here, h.to(tl.bfloat16)[:, :, :, None], h_cut)
        dy1_cut = tl.where(here, dy1[:, :, :, None], dy1_cut)
    dy1_cut = tl.where(h_cut != 0, dy1_cut, tl.zeros_like(dy1_cut))

    kept_tokens = tokens // M * 4
    slot = (token_block * WINDOWS + window[:, None]) * 4 + tl.arange(0, 4)[None, :]
    inside = slot < kept_tokens  # the last block of tokens may have fewer windows
    slot += neuron_block * kept_tokens
    tl.store(token_ids + slot, (token_block * V + kept_token).to(tl.int32), mask=inside)
    # A block's token tiles follow one another, so kept token `slot` is a row of V neurons at slot * V.
    out = slot[None, :, :, None] * V + token[:, None, None, :]
    tl.store(h_token_tiles + out, h_cut, mask=inside[None, :, :, None])
    tl.store(dy1_token_tiles + out, dy1_cut, mask=inside[None, :, :, None])


def cut_tokens(
    h_tiles: Tensor, dy1_tiles: Tensor, columns: Tensor, tokens: int, hidden_dim: int, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    v, width = h_tiles.shape[1:]
    kept = COLUMNS * tokens // m
    token_width = tile_width(kept)
    count = hidden_dim // v * kept // token_width
    h_token_tiles, dy1_token_tiles = (
        torch.empty(count, token_width, v, dtype=torch.bfloat16, device=h_tiles.device) for _ in range(2)
    )
    token_ids = torch.empty(count, token_width, dtype=torch.int32, device=h_tiles.device)
    _cut_tokens[hidden_dim // v, triton.cdiv(tokens, v)](
        h_tiles,
        dy1_tiles,
        columns,
        h_token_tiles,
        dy1_token_tiles,
        token_ids,
        tokens,
        hidden_dim,
        v,
        n,
        m,
        width,
        num_warps=CUT_WARPS,
    )
    return h_token_tiles, dy1_token_tiles, token_ids
