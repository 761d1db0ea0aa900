"""Packing in one pass over the dense matrix, in Triton, into cuSPARSELt's 2:4 format; and unpacking.

The format (see `reference`) suits a kernel that processes groups of four entries:

    in    a group of four entries is one 64-bit word if they are contiguous, otherwise four loads
    out   its kept pair is one 32-bit word at the same place in `[R, K/4]`
    out   the nibbles of rows r and r + 8, groups g and g + 4 are one 16-bit word; in a tile of 64 rows by 8 groups the
          words are `[32, 4]`, indexed by r without its bit 3 and g without its bit 2

So a program processes 64 rows by TILES tiles, in four passes over an array `[32, 4 * TILES]`, one pass for each nibble
of the metadata words. Threads exchange no data, unless the entries are contiguous along the rows.

The two kept entries are chosen by integer comparisons. The bits of a bf16 number without the sign have the order of the
magnitudes, with NaN as the largest. With 3 minus the index appended, they are four distinct keys, of which the lower
index wins a tie. A network of minima and maxima finds the second-smallest key. The two larger ones are kept, and for
the soft threshold the second-smallest magnitude is the threshold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.operators import operator, register_fake
from kernels.two_four import reference
from kernels.two_four.reference import (
    check_packable,
    join_packed,
    pack_reference,
    packed_shape,
    soft_threshold_2_4,
    split_packed,
)

TILES = 8  # metadata tiles of a program, and its number of warps


@triton.jit
def _load_groups(dense, offset, stride_entry, mask):
    """Load groups of four entries: as one 64-bit word, or as four entries that are `stride_entry` apart."""
    if dense.dtype.element_ty == tl.int64:
        return (tl.load(dense + offset, mask, other=0),)
    else:
        w0, w1 = tl.load(dense + offset, mask, other=0), tl.load(dense + stride_entry + offset, mask, other=0)
        dense += stride_entry * 2
        w2, w3 = tl.load(dense + offset, mask, other=0), tl.load(dense + stride_entry + offset, mask, other=0)
        return w0, w1, w2, w3


@triton.jit
def _entries(group):
    """The bits of the four entries of each group from `_load_groups`, int32."""
    if len(group) == 1:
        low, high = group[0].to(tl.int32), (group[0] >> 32).to(tl.int32)
        w0, w1, w2, w3 = low, low >> 16, high, high >> 16
    else:
        w0, w1, w2, w3 = group[0].to(tl.int32), group[1].to(tl.int32), group[2].to(tl.int32), group[3].to(tl.int32)
    return w0 & 0xFFFF, w1 & 0xFFFF, w2 & 0xFFFF, w3 & 0xFFFF


@triton.jit
def _to_float(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bits(value):
    """The bits of a float32 rounded to bf16."""
    return value.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _relu_squared(bits):
    active = tl.maximum(_to_float(bits), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return _to_bits(active * active)


@triton.jit
def _relu_squared_grad(h, dh):
    """2 sqrt(h) dh, rounded like the reference."""
    active = _to_float(_to_bits(tl.sqrt_rn(_to_float(h))))
    return _to_bits(2 * active * _to_float(dh))


@triton.jit
def _above_threshold(bits, threshold, scale):
    """scale * sign(w) * (|w| - t) for |w| >= t, rounded like the reference."""
    excess = _to_bits(_to_float(bits & 0x7FFF) - _to_float(threshold))
    return _to_bits(scale * _to_float(excess)) ^ (bits & 0x8000)


@triton.jit
def _choose_two(w0, w1, w2, w3):
    """The indices of the two largest magnitudes of four bit patterns, ascending, and the third largest magnitude."""
    k0, k1, k2, k3 = (w0 & 0x7FFF) * 4 + 3, (w1 & 0x7FFF) * 4 + 2, (w2 & 0x7FFF) * 4 + 1, (w3 & 0x7FFF) * 4
    # Second-smallest of four: the smaller of "the larger of both minima" and "the smaller of both maxima".
    low, high = tl.minimum(k0, k1), tl.maximum(k0, k1)
    low2, high2 = tl.minimum(k2, k3), tl.maximum(k2, k3)
    threshold = tl.minimum(tl.maximum(low, low2), tl.minimum(high, high2))
    first = tl.where(k0 > threshold, 0, tl.where(k1 > threshold, 1, 2))
    second = tl.where(k3 > threshold, 3, tl.where(k2 > threshold, 2, 1))
    return first, second, threshold >> 2


@triton.jit
def _pack_kernel(
    dense,
    values,
    metadata,
    scale,
    like_values,
    like_metadata,
    steps,
    stride_row,
    stride_group,
    stride_entry,
    mode: tl.constexpr,
    tiles: tl.constexpr,
):
    """Pack 64 rows by `tiles` tiles. A row has `steps` tiles; strides are in elements of `dense`.

    The mode says which two of four entries are kept, and the values that are stored:

        soft_threshold               the two largest magnitudes of w; scale * S(w)
        keep_largest                 the two largest magnitudes; unchanged
        keep_largest_relu_squared    the two largest of relu(y1)^2; relu(y1)^2
        like                         those of the metadata `like_metadata`; unchanged
        relu_squared_grad            those of the metadata `like_metadata`; 2 sqrt(h) * dh, h from `like_values`
    """
    slab, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * tiles
    # Offsets within the part of a program fit into 32 bits; the offset of the part may not.
    dense += slab * 64 * stride_row + start.to(tl.int64) * 8 * stride_group
    first_pair = slab * 64 * steps * 8 + start * 8
    first_word = slab * 128 * steps + start * 128
    entry = tl.cast(stride_entry, tl.int64)

    row, column = tl.arange(0, 32)[:, None], tl.arange(0, 4 * tiles)[None, :]
    step, lane = column // 4, column % 4
    row, group = row // 8 * 16 + row % 8, step * 8 + lane  # of the lowest nibble
    mask = start + step < steps
    word_offset = first_word + (step * 128 + tl.arange(0, 32)[:, None] * 4 + lane)

    # All loads come before the first store: the compiler cannot prove that they do not alias it.
    below, beside, offset = 8 * stride_row, 4 * stride_group, row * stride_row + group * stride_group
    loaded = (
        _load_groups(dense, offset, entry, mask),
        _load_groups(dense + below, offset, entry, mask),
        _load_groups(dense + beside, offset, entry, mask),
        _load_groups(dense + below + beside, offset, entry, mask),
    )
    if mode == "like" or mode == "relu_squared_grad":
        pattern = tl.load(like_metadata + word_offset, mask, other=0).to(tl.int32)
    if mode == "soft_threshold":
        beta = tl.load(scale).to(tl.bfloat16).to(tl.float32)

    word = tl.zeros((32, 4 * tiles), tl.int32)
    for nibble in tl.static_range(4):
        pair_offset = first_pair + ((row + nibble % 2 * 8) * steps * 8 + group + nibble // 2 * 4)
        w0, w1, w2, w3 = _entries(loaded[nibble])
        if mode == "like" or mode == "relu_squared_grad":
            first, second = pattern >> 4 * nibble & 3, pattern >> 4 * nibble + 2 & 3
        else:
            if mode == "keep_largest_relu_squared":
                w0, w1, w2, w3 = _relu_squared(w0), _relu_squared(w1), _relu_squared(w2), _relu_squared(w3)
            first, second, threshold = _choose_two(w0, w1, w2, w3)
        a = tl.where(first == 0, w0, tl.where(first == 1, w1, w2))
        b = tl.where(second == 3, w3, tl.where(second == 2, w2, w1))
        if mode == "soft_threshold":
            a, b = _above_threshold(a, threshold, beta), _above_threshold(b, threshold, beta)
        if mode == "relu_squared_grad":
            h = tl.load(like_values + pair_offset, mask, other=0)
            a, b = _relu_squared_grad(h & 0xFFFF, a), _relu_squared_grad(h >> 16 & 0xFFFF, b)
        tl.store(values + pair_offset, a | b << 16, mask)
        word |= (first | second << 2) << 4 * nibble
    tl.store(metadata + word_offset, word.to(tl.int16), mask)


@triton.jit
def _unpack_kernel(values, metadata, dense, steps, tiles: tl.constexpr):
    """The reverse of `_pack_kernel`; a group of four entries is one 64-bit word. A row has `steps` tiles."""
    slab, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * tiles
    first_group = slab * 64 * steps * 8 + start * 8
    row, group = tl.arange(0, 64)[:, None], tl.arange(0, 8 * tiles)[None, :]
    mask = start + group // 8 < steps
    offset = row * steps * 8 + group
    pair = tl.load(values + first_group + offset, mask, other=0)
    place = group // 8 * 128 + (row // 16 * 8 + row % 8) * 4 + group % 4
    word = tl.load(metadata + slab * 128 * steps + start * 128 + place, mask, other=0).to(tl.int32)
    nibble = (word >> 4 * (row // 8 % 2 + group // 4 % 2 * 2)).to(tl.int64)
    first, second = (pair & 0xFFFF).to(tl.int64), (pair >> 16 & 0xFFFF).to(tl.int64)
    tl.store(dense + first_group + offset, first << 16 * (nibble & 3) | second << 16 * (nibble >> 2 & 3), mask)


def _parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a packed buffer: its values as pairs, int32, and its metadata as words of four nibbles, int16."""
    rows, columns = packed_shape(packed)
    values, metadata = packed.view(-1).split((rows * columns // 2, rows * columns // 16))
    return values.view(torch.int32), metadata.view(torch.int16)


def _launch(groups: Tensor, mode: str, scale: Tensor | None, like: Tensor | None) -> Tensor:
    rows, quads = groups.shape[:2]
    packed = groups.new_empty(rows, quads * 9 // 4)
    whole = groups.stride(2) == 1 and all(s % 4 == 0 for s in (*groups.stride()[:2], groups.storage_offset()))
    dense = groups.view(torch.int64 if whole else torch.int16)
    steps = quads // 8
    _pack_kernel[triton.cdiv(steps, TILES), rows // 64](
        dense,
        *_parts(packed),
        scale,
        *(_parts(like) if like is not None else (None, None)),
        steps,
        *dense.stride(),
        mode=mode,
        tiles=TILES,
        num_warps=TILES,
    )
    return packed


def _reference(groups: Tensor, mode: str, scale: Tensor | None, like: Tensor | None) -> Tensor:
    dense = groups.flatten(1)
    if scale is not None:
        return pack_reference(scale.to(dense.dtype) * soft_threshold_2_4(dense), order=dense)
    if like is None:
        return pack_reference(dense if mode == "keep_largest" else dense.relu() * dense.relu())
    values, index = split_packed(like)
    dense = groups.gather(-1, index)
    return join_packed(dense if mode == "like" else 2 * values.sqrt() * dense, index)


@operator("two_four_pack")
def _pack(groups: Tensor, mode: str, scale: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    with torch.cuda.device_of(groups):
        return (_launch if groups.is_cuda else _reference)(groups, mode, scale, like)


@register_fake(_pack)
def _(groups: Tensor, mode: str, scale: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    return groups.new_empty(groups.shape[0], groups.shape[1] * 9 // 4)


def _launch_unpack(packed: Tensor) -> Tensor:
    rows, columns = packed_shape(packed)
    dense, steps = packed.new_empty(rows, columns), columns // 32
    _unpack_kernel[triton.cdiv(steps, TILES), rows // 64](
        *_parts(packed), dense.view(torch.int64), steps, tiles=TILES, num_warps=TILES
    )
    return dense


@operator("two_four_unpack")
def _unpack(packed: Tensor) -> Tensor:
    with torch.cuda.device_of(packed):
        return (_launch_unpack if packed.is_cuda else reference.unpack)(packed)


@register_fake(_unpack)
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(packed_shape(packed))


def _as_groups(dense: Tensor) -> Tensor:
    groups = dense if dense.dim() == 3 else dense.unflatten(-1, (-1, 4))
    if groups.dim() != 3 or groups.shape[2] != 4 or groups.dtype != torch.bfloat16:
        raise ValueError(f"2:4 packing needs bf16 [R, K] or [R, K/4, 4], got {dense.dtype} {list(dense.shape)}")
    check_packable(groups.shape[0], groups.shape[1] * 4)
    return groups


def token_groups(h: Tensor) -> Tensor:
    """h^T in groups of four tokens that are T/4 apart, the groups of `kernels.venom.token_mask`.

    A product that reduces over the packed h^T needs the rows of its other operand in the same order, see `token_rows`.

    Args:
        h: `[T, f]`, T a multiple of 4.

    Returns:
        A view `[f, T/4, 4]`, for `keep_largest_pack` and `pack_like`.
    """
    return h.unflatten(0, (4, -1)).permute(2, 1, 0)


def token_rows(x: Tensor) -> Tensor:
    """The rows of x `[T, d]` in the order of `token_groups`; T a multiple of 4."""
    return x.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def soft_threshold_pack(weight: Tensor, scale: Tensor) -> Tensor:
    """Pack scale * S(weight), S being the soft threshold of `reference`. Not differentiable.

    Reads are coalesced if the rows or the columns of the weight are contiguous, so W2^T needs no copy.

    Args:
        weight: `[R, K]` or `[R, K/4, 4]`, bf16, any strides.
        scale: `[]`, float32, on the same device; it is rounded to bf16 first, like `scale.to(weight.dtype)`.

    Returns:
        `[R, 9K/16]` bf16. NaN propagates.

    Raises:
        ValueError: another dtype, R or K not a multiple of 64.
    """
    return _pack(_as_groups(weight), "soft_threshold", scale)


def keep_largest_pack(h: Tensor, relu_squared: bool = False) -> Tensor:
    """Pack the two largest of every four entries along the last dimension; the lower index wins a tie.

    Without NaN these are the entries of `venom_mask` with V:N:M = 1:2:4. This function counts NaN as the largest;
    `venom_mask` keeps it in addition to the two largest.

    Args:
        h: `[R, K]` or `[R, K/4, 4]`, bf16, any strides, non-negative.
        relu_squared: pack relu(h)^2, rounded to bf16, instead of h; the argument is then y1, of any sign.

    Returns:
        `[R, 9K/16]` bf16.

    Raises:
        ValueError: another dtype, R or K not a multiple of 64.
    """
    return _pack(_as_groups(h), "keep_largest_relu_squared" if relu_squared else "keep_largest")


def pack_like(dense: Tensor, packed: Tensor, relu_squared_grad: bool = False) -> Tensor:
    """Pack the entries of a dense matrix at the places that a packed matrix keeps.

    Args:
        dense: `[R, K]` or `[R, K/4, 4]`, bf16, any strides.
        packed: `[R, 9K/16]`, bf16.
        relu_squared_grad: pack 2 sqrt(h) * dense instead, with h from `packed`: the gradient of y1 if dense is that of
            h.

    Returns:
        `[R, 9K/16]` bf16, with the metadata of `packed`.

    Raises:
        ValueError: another dtype, R or K not a multiple of 64, or shapes that differ.
    """
    groups = _as_groups(dense)
    if packed_shape(packed) != (groups.shape[0], groups.shape[1] * 4) or packed.dtype != torch.bfloat16:
        raise ValueError(f"{list(dense.shape)} cannot take the pattern of {packed.dtype} {list(packed.shape)}")
    return _pack(groups, "relu_squared_grad" if relu_squared_grad else "like", None, packed.contiguous())


def unpack(packed: Tensor) -> Tensor:
    """The dense matrix of a packed matrix. Not differentiable.

    Args:
        packed: `[R, 9K/16]`, bf16, contiguous.

    Returns:
        `[R, K]` bf16, contiguous.

    Raises:
        ValueError: another dtype, or a shape that is not that of a packed matrix.
    """
    packed_shape(packed)
    if packed.dtype != torch.bfloat16:
        raise ValueError(f"2:4 matrices are bf16, got {packed.dtype}")
    return _unpack(packed)
