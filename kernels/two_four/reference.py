"""2:4 sparsity in plain PyTorch: the soft threshold that makes a weight 2:4, and the packed format.

Soft-thresholding makes the sparse weight a continuous function of the dense one.

Of every four consecutive weights, let t be the second-smallest magnitude. Then

    S(w)_i = sign(w_i) * max(|w_i| - t, 0)

has at most two non-zero entries of four. Without the shrinkage, S jumps when two weights of a group swap ranks. With
it, both are zero at that moment, so the loss is continuous in w and weights do not oscillate in and out of the mask.
One scalar for each tensor compensates the shrinkage. It is fixed when sparsity starts:

    beta = <w, S(w)> / <S(w), S(w)>      the least-squares fit of beta * S(w) to w

Fitting it again at every step makes masks flip more often. Gradients pass unchanged to the dense weight
(straight-through estimator).

Source: S-STE, Hu et al., NeurIPS 2024.

The packed format is the one that cuSPARSELt's compression writes for 16-bit matrices `[R, K]` and its product reads.
It has 9/16 of the dense bytes, in one buffer. First the values, `[R, K/2]`: the two kept entries of every four, in
their order. Then the metadata, a nibble for every four entries: the index of the first kept entry, plus four times the
index of the second. The nibbles are in tiles of 64 rows by 8 groups (32 columns), for the tensor cores. With r and g
the row and the group within the tile, in binary r5..r0 and g2..g0, the place of a nibble in its tile is, from the
highest bit,

    r5 r4 | r2 r1 r0 | g1 g0 | g2 | r3

and the tiles are stored row by row. The first nibble of a byte is its low half. If fewer than two of four entries are
non-zero, two are stored nevertheless.

Source: measured with cuSPARSELt 0.8.0; NVIDIA documents the size of the buffer but not its contents.
"""

import torch
from torch import Tensor

# Whole tiles of the metadata, and an even number of them in a row: cuSPARSELt pads an odd number, `pack` does not.
ROWS, COLUMNS = 64, 64


def _soft_threshold(weight: Tensor) -> Tensor:
    a, b, c, d = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    low2, high2 = torch.minimum(c, d), torch.maximum(c, d)
    # Second-smallest of four: the smaller of "the larger of both minima" and "the smaller of both maxima".
    threshold = torch.minimum(torch.maximum(low, low2), torch.minimum(high, high2))
    threshold = threshold.unsqueeze(-1).expand(*threshold.shape, 4).flatten(-2)
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return _soft_threshold(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def soft_threshold_2_4(weight: Tensor) -> Tensor:
    """Soft-threshold every four consecutive weights along the last dimension to at most two.

    Args:
        weight: `[..., K]`, floating point, K a multiple of 4.

    Returns:
        S(weight), same shape and dtype, without beta. Its backward is the identity (straight-through).

    Raises:
        ValueError: K is not a multiple of 4.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"soft_threshold_2_4 needs a last dimension divisible by 4, got {tuple(weight.shape)}")
    return _SoftThreshold.apply(weight)


def soft_threshold_scale(weight: Tensor) -> Tensor:
    """beta, the scalar for which beta * S(weight) is the least-squares fit to weight.

    Args:
        weight: `[..., K]`, floating point, K a multiple of 4.

    Returns:
        A tensor of shape `[]` in at least float32; 1 if S(weight) is zero everywhere.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    sparse = soft_threshold_2_4(weight)
    energy = sparse.square().sum()
    return torch.where(energy == 0, torch.ones_like(energy), (weight * sparse).sum() / energy)


def check_packable(rows: int, columns: int) -> None:
    """Raise ValueError if the packed format does not support a `[rows, columns]` matrix."""
    if rows < 1 or rows % ROWS or columns < 1 or columns % COLUMNS:
        raise ValueError(
            f"2:4 packing needs rows divisible by {ROWS} and columns divisible by {COLUMNS}, got [{rows}, {columns}]"
        )


def packed_shape(packed: Tensor) -> tuple[int, int]:
    """The shape `(R, K)` of the dense matrix of `packed [R, 9K/16]`."""
    rows, columns = packed.shape[0], packed.shape[1] * 16 // 9
    check_packable(rows, columns)
    if columns * 9 != packed.shape[1] * 16:
        raise ValueError(f"a packed 2:4 matrix is [R, 9K/16] with R and K divisible by 64, got {list(packed.shape)}")
    return rows, columns


def largest_two(values: Tensor) -> Tensor:
    """Indices of the two largest magnitudes of every four, ascending; the lower index wins a tie, NaN is the largest.

    Args:
        values: `[R, K/4, 4]`, floating point.

    Returns:
        `[R, K/4, 2]` int64.
    """
    order = values.detach().abs().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :2].sort(dim=-1).values


def join_packed(values: Tensor, index: Tensor) -> Tensor:
    """Pack kept entries and their indices into one buffer.

    Args:
        values: `[R, K/4, 2]`, a 16-bit dtype: the kept entries of every four.
        index: `[R, K/4, 2]`, integer: their indices within the four, ascending.

    Returns:
        `[R, 9K/16]` in the dtype of `values`.

    Raises:
        ValueError: R or K is not a multiple of 64.
    """
    rows, groups = values.shape[:2]
    check_packable(rows, groups * 4)
    nibbles = (index[..., 0] + 4 * index[..., 1]).to(torch.uint8)
    #                       slab, r5 r4, r3, r2..r0,  step, g2, g1 g0
    tiles = nibbles.reshape(-1, 4, 2, 8, groups // 8, 2, 4).permute(0, 4, 1, 3, 6, 5, 2)
    metadata = tiles[..., 0] | tiles[..., 1] << 4
    return torch.cat((values.flatten(), metadata.flatten().view(values.dtype))).view(rows, groups * 9 // 4)


def split_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `join_packed`: values `[R, K/4, 2]`, and index `[R, K/4, 2]` int64."""
    rows, columns = packed_shape(packed)
    values, metadata = packed.flatten().split((rows * columns // 2, rows * columns // 16))
    metadata = metadata.view(torch.uint8).view(-1, columns // 32, 4, 8, 4, 2)
    tiles = torch.stack((metadata & 15, metadata >> 4), -1)
    nibbles = tiles.permute(0, 2, 6, 3, 1, 5, 4).reshape(rows, columns // 4).long()
    return values.view(rows, columns // 4, 2), torch.stack((nibbles & 3, nibbles >> 2), -1)


def pack_reference(sparse: Tensor, order: Tensor | None = None) -> Tensor:
    """Pack the two entries with the largest magnitudes of every four along a row.

    Args:
        sparse: `[R, K]`, a 16-bit dtype.
        order: `[R, K]`: choose by the magnitudes of these entries; None: by those of `sparse`.

    Returns:
        `[R, 9K/16]` in the dtype of `sparse`; for the layout see the module docstring.

    Raises:
        ValueError: R or K is not a multiple of 64.
    """
    check_packable(*sparse.shape)
    groups = sparse.detach().unflatten(-1, (-1, 4))
    index = largest_two(groups if order is None else order.unflatten(-1, (-1, 4)))
    return join_packed(groups.gather(-1, index), index)


def unpack(packed: Tensor) -> Tensor:
    """The dense matrix `[R, K]` of `packed [R, 9K/16]`.

    Raises:
        ValueError: a shape that is not that of a packed matrix.
    """
    values, index = split_packed(packed)
    dense = values.new_zeros(*values.shape[:2], 4)
    return dense.scatter(-1, index, values).flatten(-2)
