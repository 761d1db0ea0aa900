"""The squared-ReLU FFN with sparse operands: six products, spelt out.

`T` tokens, `d` model width, `f` FFN width; no gate, no bias.

    y1  = x W1'^T             [T, f]   (1)   W1' = beta1 S(W1) where the weights are 2:4, else W1
    h   = relu(y1)^2, cut to the pattern
    y   = h W2^T              [T, d]   (2)
    dh  = dy W2'              [T, f]   (3)   W2' = beta2 S(W2), groups of four along d, or W2
    dW2 = dy^T h              [d, f]   (4)
    dy1 = 2 relu(y1) * dh     [T, f]         zero wherever h is
    dx  = dy1 W1'             [T, d]   (5)
    dW1 = dy1^T x             [f, d]   (6)   straight-through to the dense W1

Since relu(y1) = sqrt(h), only x and h are kept for the backward pass.

What is exact and what is not. The mask is held fixed by the backward pass, as in any top-k selection; given
the mask and dense W2', all gradients are those of the function that the forward pass computed. Two options
approximate them, for speed:

    w2_scale         (3) reads the 2:4 W2' while (2) reads the dense W2: the mask of (2) leaves the tensor core no room
                     for a second sparse operand (arXiv 2602.06183).
    cut_along_tokens (4) and (6) reduce over tokens, so a pattern that is sparse along f does not speed them
                     up. With this option h and dy1 are cut a second time, along the tokens, for these two (arXiv
                     2503.16672, 2602.06183).

The same six products are written five times below: `_Masked` is the reference, dense products over masked operands,
right on any device; `_Groups`, `_Columns`, `_Venom` and `_TwoFour` compute only what their pattern keeps. `backend`
says which one runs, and why.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import columns, groups, hopper, two_four, venom
from kernels.causal import Preceding
from kernels.clustering import permute_rows
from kernels.groups import TILE, Groups
from kernels.two_four import soft_threshold_2_4, soft_threshold_pack, sparse_linear
from kernels.two_four.reference import ROWS
from kernels.venom import Venom, densest_neurons, token_mask
from kernels.venom.reference import COLUMNS

Pattern = Venom | Groups

LARGE = 512  # tokens in a block from which gathering what it keeps is cheap beside its products

CUSPARSELT = torch.backends.cusparselt.is_available()


def _thresholded(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else scale.to(weight.dtype) * soft_threshold_2_4(weight)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, packed: bool) -> Tensor:
    """x W'^T, W' the thresholded weight `[R, K]`; `packed`: on the sparse tensor cores."""
    if scale is None or not packed:
        return x @ _thresholded(weight, scale).T
    tokens, missing = x.shape[0], -x.shape[0] % 8  # to a number of tokens that cuSPARSELt takes
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return sparse_linear(soft_threshold_pack(weight, scale), x)[:tokens]


class _Masked(torch.autograd.Function):
    """The reference. With `packed`, products (1) and (3) read packed 2:4 weights."""

    @staticmethod
    def forward(ctx, x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens, packed):
        active = _linear(x, w1, w1_scale, packed).relu()  # (1)
        h = active * active
        if pattern is not None:
            h = torch.where(pattern.mask(h), h, 0)
        ctx.save_for_backward(x, w1, w2, h, w1_scale, w2_scale)
        ctx.pattern, ctx.cut_along_tokens, ctx.packed = pattern, cut_along_tokens, packed
        return h @ w2.T  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, h, w1_scale, w2_scale = ctx.saved_tensors
        dh = _linear(dy, w2.T, w2_scale, ctx.packed)  # (3): groups of four along d
        dy1 = 2 * h.sqrt() * dh
        h_tokens, dy1_tokens = h, dy1
        if ctx.cut_along_tokens:
            kept = token_mask(h, ctx.pattern)
            h_tokens, dy1_tokens = torch.where(kept, h, 0), torch.where(kept, dy1, 0)
        dw2 = dy.T @ h_tokens  # (4)
        dx = dy1 @ _thresholded(w1, w1_scale)  # (5)
        dw1 = dy1_tokens.T @ x  # (6)
        return dx, dw1, dw2, None, None, None, None, None


class _Groups(torch.autograd.Function):
    """Column groups as tiles, `kernels.groups`; `order` as in `sparse_feed_forward`."""

    @staticmethod
    def forward(ctx, x, w1, w2, pattern, w1_scale, w2_scale, order):
        order = None if order is None else order.int()
        x_ordered = x.contiguous() if order is None else x.index_select(0, order)
        y1 = _linear(x_ordered, w1, w1_scale, packed=x.is_cuda)  # (1)
        kept, pooled = pattern.kept_groups(w1.shape[0]), pattern.budget == "batch"
        tiles, lists = groups.select_tiles(y1, kept, pooled=pooled, balance=pattern.balance)
        ctx.most = w1.shape[0] // TILE if pooled else kept
        ctx.save_for_backward(x_ordered, w1, w2, tiles, lists, order, w1_scale, w2_scale)
        return groups.reduce_neurons(tiles, lists, w2.T, order, x.shape[0])  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, tiles, lists, order, w1_scale, w2_scale = ctx.saved_tensors
        dy = dy.contiguous() if order is None else dy.index_select(0, order)
        dy1 = groups.sample(dy, _thresholded(w2.T, w2_scale).T.contiguous(), tiles, lists, ctx.most)  # (3)
        dw2 = groups.reduce_tokens(tiles, lists, dy, w1.shape[0], True)  # (4)
        dx = groups.reduce_neurons(dy1, lists, _thresholded(w1, w1_scale), order, x.shape[0])  # (5)
        dw1 = groups.reduce_tokens(dy1, lists, x, w1.shape[0], False)  # (6)
        return dx, dw1, dw2, None, None, None, None


class _Columns(torch.autograd.Function):
    """Groups that large blocks keep, `kernels.columns`; x, y and their gradients `[B, V, d]`, in blocks."""

    @staticmethod
    def forward(ctx, x, w1, w2, pattern, w1_scale, w2_scale):
        kept = pattern.kept_groups(w1.shape[0]) * pattern.g
        if pattern.sample == 1:
            y1 = _linear(x.flatten(0, 1), w1, w1_scale, packed=x.is_cuda).unflatten(0, x.shape[:2])  # (1)
            place = columns.choose(y1, pattern)
            h = columns.square_kept(y1, place, kept)
        else:
            thresholded = _thresholded(w1, w1_scale)
            sampled = x[:, :: pattern.sample].flatten(0, 1) @ thresholded.T
            place = columns.choose(sampled.unflatten(0, (x.shape[0], -1)), pattern)
            active = columns.sample(x, thresholded, place, kept).relu()  # (1)
            h = active * active
        ctx.save_for_backward(x, w1, w2, h, place, w1_scale, w2_scale)
        return columns.reduce_neurons(h, w2.T, place)  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, h, place, w1_scale, w2_scale = ctx.saved_tensors
        dy1 = 2 * h.sqrt() * columns.sample(dy, _thresholded(w2.T, w2_scale), place, h.shape[2])  # (3)
        dw2 = columns.reduce_tokens(h, dy, place, True)  # (4)
        dx = columns.reduce_neurons(dy1, _thresholded(w1, w1_scale), place)  # (5)
        dw1 = columns.reduce_tokens(dy1, x, place, False)  # (6)
        return dx, dw1, dw2, None, None, None


def _preceding_groups(x: Tensor, w1: Tensor, w2: Tensor, pattern: Preceding) -> Tensor:
    """(1) and (2) for column groups chosen by the block before, `kernels.causal`: inference, without gradients."""
    assert isinstance(pattern.pattern, Groups)
    kept, parts = pattern.pattern.kept_groups(w1.shape[0]), []
    for y1 in (x @ w1.T).split(pattern.seq_len):
        active = y1[:TILE].relu()
        parts.append((active * active) @ w2.T)
        if y1.shape[0] > TILE:
            tiles, lists = groups.select_tiles(y1[TILE:], kept, y1)
            parts.append(groups.reduce_neurons(tiles, lists, w2.T, None, y1.shape[0] - TILE))
    return torch.cat(parts)


def _preceding_columns(x: Tensor, w1: Tensor, w2: Tensor, pattern: Preceding) -> Tensor:
    """(1) and (2) for groups that large blocks keep, chosen by the block before: inference, without gradients."""
    choice, width = pattern.pattern, x.shape[1]
    assert isinstance(choice, Groups)
    kept, parts = choice.kept_groups(w1.shape[0]) * choice.g, []
    whole = x.shape[0] // pattern.seq_len * pattern.seq_len
    for tokens in (x[:whole].view(-1, pattern.seq_len, width), x[None, whole:]):
        sequences, length, _ = tokens.shape
        if not tokens.numel():
            continue
        v = min(choice.v, length)
        blocks = F.pad(tokens, (0, 0, 0, -length % v)).unflatten(1, (-1, v))  # [S, B, V, d]
        active = (blocks[:, :1] @ w1.T).relu()
        y = (active * active) @ w2.T
        if length > v:
            place = columns.choose(blocks[:, :-1].flatten(0, 1)[:, :: choice.sample] @ w1.T, choice)
            active = columns.sample(blocks[:, 1:].flatten(0, 1), w1, place, kept).relu()  # (1)
            rest = columns.reduce_neurons(active * active, w2.T, place)  # (2)
            y = torch.cat([y, rest.unflatten(0, (sequences, -1))], 1)
        parts.append(y.flatten(1, 2)[:, :length].flatten(0, 1))
    return torch.cat(parts)


class _Venom(torch.autograd.Function):
    """V:N:M in compact form, `kernels.venom`; `order` as in `sparse_feed_forward`."""

    @staticmethod
    def forward(ctx, x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens, order):
        x_ordered = x if order is None else x.index_select(0, order)
        y1 = _linear(x_ordered, w1, w1_scale, packed=x.is_cuda)  # (1)
        tiles, columns = venom.select_columns(y1, pattern.v, pattern.n, pattern.m)
        ctx.save_for_backward(x_ordered, w1, w2, tiles, columns, order, w1_scale, w2_scale)
        ctx.pattern, ctx.cut_along_tokens = pattern, cut_along_tokens
        return venom.reduce_columns(tiles, columns, w2.T.contiguous(), x.shape[0], order)  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, tiles, columns, order, w1_scale, w2_scale = ctx.saved_tensors
        tokens, hidden_dim = x.shape[0], w1.shape[0]
        dy = dy if order is None else dy.index_select(0, order)
        dy1 = venom.sample_columns(dy, _thresholded(w2.T.contiguous(), w2_scale), columns, tiles)  # (3)
        dx = venom.reduce_columns(dy1, columns, _thresholded(w1, w1_scale), tokens, order)  # (5)
        if ctx.cut_along_tokens:
            n, m = ctx.pattern.n, ctx.pattern.m
            h_cut, dy1_cut, ids = venom.cut_tokens(tiles, dy1, columns, tokens, hidden_dim, n, m)
            dw2 = venom.reduce_tokens(h_cut, ids, dy, hidden_dim).T.contiguous()  # (4)
            dw1 = venom.reduce_tokens(dy1_cut, ids, x, hidden_dim)  # (6)
        else:
            dw2 = dy.T @ venom.expand(tiles, columns, tokens, hidden_dim)  # (4)
            dw1 = venom.expand(dy1, columns, tokens, hidden_dim).T @ x  # (6)
        return dx, dw1, dw2, None, None, None, None, None


class _TwoFour(torch.autograd.Function):
    """2:4 activations, packed, `kernels.two_four`; T a multiple of 64."""

    @staticmethod
    def forward(ctx, x, w1, w2, w1_scale, w2_scale, cut_along_tokens):
        y1 = _linear(x, w1, w1_scale, packed=True)  # (1)
        h = two_four.keep_largest_pack(y1, relu_squared=True)
        ctx.save_for_backward(x, w1, w2, h, w1_scale, w2_scale)
        ctx.cut_along_tokens = cut_along_tokens
        return two_four.sparse_matmul(h, w2.T)  # (2)

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, h_packed, w1_scale, w2_scale = ctx.saved_tensors
        h = two_four.unpack(h_packed)
        if ctx.cut_along_tokens:
            h_cut, whole = two_four.keep_largest_pack(two_four.token_groups(h)), densest_neurons(h)
            h_whole = h.T.index_select(0, whole)
            dw2 = two_four.reduce_tokens(h_cut, dy, whole, h_whole, transpose_result=True)  # (4)
        else:
            dw2 = dy.T @ h  # (4)
        dh = _linear(dy, w2.T, w2_scale, packed=True)  # (3)
        dy1 = two_four.pack_like(dh, h_packed, relu_squared_grad=True)
        dx = two_four.sparse_matmul(dy1, _thresholded(w1, w1_scale))  # (5)
        if ctx.cut_along_tokens:
            dy1_cut = two_four.pack_like(two_four.token_groups(dh), h_cut, relu_squared_grad=True)
            dy1_whole = 2 * h_whole.sqrt() * dh.T.index_select(0, whole)
            dw1 = two_four.reduce_tokens(dy1_cut, x, whole, dy1_whole)  # (6)
        else:
            dw1 = two_four.unpack(dy1).T @ x  # (6)
        return dx, dw1, dw2, None, None, None


def _two_four(
    x: Tensor, w1: Tensor, w2: Tensor, w1_scale: Tensor | None, w2_scale: Tensor | None, cut_along_tokens: bool
) -> Tensor:
    """`_TwoFour` for any T, filled up with zeros. The second cut groups tokens of four quarters: each is filled up."""
    x = x.unflatten(0, (COLUMNS if cut_along_tokens else 1, -1))
    parts, tokens, _ = x.shape
    missing = -tokens % (ROWS // parts)
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    y = _TwoFour.apply(x.flatten(0, 1), w1, w2, w1_scale, w2_scale, cut_along_tokens)
    return y.unflatten(0, (parts, -1))[:, :tokens].flatten(0, 1)


def _columns(
    x: Tensor, w1: Tensor, w2: Tensor, pattern: Groups, w1_scale: Tensor | None, w2_scale: Tensor | None
) -> Tensor:
    """`_Columns` for any T."""
    # Not inside: a contiguous view as its result gets gradients of zero where torch 2.11 compiles it.
    return _Columns.apply(columns.in_blocks(x, pattern.v), w1, w2, pattern, w1_scale, w2_scale).flatten(0, 1)[
        : x.shape[0]
    ]


def hidden_activations(x: Tensor, w1: Tensor, w1_scale: Tensor | None = None) -> Tensor:
    """h `[T, f]` before the pattern cuts it, for measuring what the cut loses; arguments as `sparse_feed_forward`."""
    active = (x @ _thresholded(w1, w1_scale).T).relu()
    return active * active  # not square(): CUDA autocast computes powers in float32


def backend(
    pattern: Pattern | Preceding | None,
    weight_products: tuple[int, ...],
    cut_along_tokens: bool,
    width: int,
    hidden_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    here: bool = True,
) -> tuple[str, str]:
    """Which implementation computes the sparse FFN, and why; the only place that decides it.

    Args:
        pattern: of the activations.
        weight_products: products that read a 2:4 weight.
        cut_along_tokens: as in `sparse_feed_forward`.
        width, hidden_dim: d and f.
        device, dtype: that the products run in.
        here: whether the device is of this machine; else it is taken for a Hopper GPU with cuSPARSELt.

    Returns:
        "groups", "columns", "venom", "two_four" (2:4 activations, or 2:4 weights alone) or "reference", and the reason
        in words.
    """
    if device.type != "cuda":
        return "reference", f"no kernels for the device {device.type}"
    if dtype != torch.bfloat16:
        return "reference", f"kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    two_of_four = isinstance(pattern, Venom) and (pattern.n, pattern.m) == (2, 4)
    if (weight_products or two_of_four) and (width % 64 or hidden_dim % 64 or (here and not CUSPARSELT)):
        return "reference", "packed 2:4 matrices need cuSPARSELt and a width and a hidden_dim divisible by 64"
    match pattern:
        case None if not weight_products:
            return "reference", "nothing is sparse"
        case None:
            return "two_four", "2:4 weights by cuSPARSELt"
        case Preceding(Groups(v, g, sample=1, window=0)) if v == g == TILE and not width % 64 and not weight_products:
            return "groups", "column groups chosen by the block before"
        case Preceding(Groups(v, _, _, "block")) if v >= LARGE and not weight_products:
            return "columns", f"blocks of {v} tokens as dense FFNs of what the block before keeps, cuBLAS"
        case Preceding():
            return "reference", (
                f"kernels for a choice made from the block before need groups without 2:4 weights, of v = g = {TILE}, "
                f"sample = 1, no window and a width divisible by 64, or of v from {LARGE}"
            )
        case Groups(v, _, _, "block") if v >= LARGE:
            return "columns", f"blocks of {v} tokens as dense FFNs of the neurons that they keep, cuBLAS"
        case Groups(v, g, sample=sample, window=window) if v != TILE or g != TILE or sample > 1 or window or width % 64:
            return "reference", (
                f"kernels for groups need v = g = {TILE}, sample = 1, no window and a width divisible by 64, or v of "
                f'{LARGE} and more with a budget of "block"'
            )
        case Groups():
            if not here or not hopper.missing(device):
                return "groups", "column groups, CUDA C++ for Hopper"
            return "groups", f"column groups, Triton: {hopper.missing(device)}"
        case Venom(_, 2, 4):
            return "two_four", "2:4 activations by cuSPARSELt"
        case Venom(v, _, m) if m > 256 or not 16 <= v <= 256 or v & (v - 1):
            return "reference", f"kernels for venom need v a power of two from 16 to 256 and m up to 256, not {v}, {m}"
        case Venom(v, _, m) if cut_along_tokens and (m == COLUMNS or v % m or hidden_dim % v):
            return "reference", f"the second cut needs m = {m} above {COLUMNS} to divide v = {v}, and v the hidden_dim"
    return "venom", "Venom, Triton"


def sparse_feed_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pattern: Pattern | Preceding | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    cut_along_tokens: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """relu(x W1^T)^2 W2^T with sparse operands, as the module docstring spells it out.

    Under autocast the inputs are cast to its dtype, as a linear layer's would be.

    Args:
        x: `[T, d]`, floating point.
        w1: `[f, d]`, same dtype.
        w2: `[d, f]`, same dtype.
        pattern: what h is cut to; None leaves it as it is.
        w1_scale: `[]`, beta of W1: product (1), and with it (5), reads beta * S(W1). None: W1 as it is.
        w2_scale: `[]`, beta of W2 along d: product (3) reads beta * S(W2). None: W2 as it is.
        cut_along_tokens: products (4) and (6) read h and dy1 cut along the tokens as well (Venom and 2:4 only).
        order: `[T]` int64, a permutation: the tokens in the order in which neighbours share a block. None: as they are.

    Returns:
        y `[T, d]`, in the order of x.

    Raises:
        ValueError: a pattern that f or T does not allow, 2:4 weights that d does not allow.
    """
    tokens, width, hidden_dim = *x.shape, w1.shape[0]
    if pattern is not None:
        pattern.check(hidden_dim)
    if w2_scale is not None and width % 4:
        raise ValueError(f"w2_scale needs a model width d divisible by 4, got {width}")
    if cut_along_tokens:
        if not isinstance(pattern, Venom):
            raise ValueError("cut_along_tokens needs a Venom pattern")
        if tokens % pattern.m:
            raise ValueError(f"cut_along_tokens needs tokens divisible by m = {pattern.m}, got {tokens}")
    device = x.device.type
    # Asking about the meta device raises; torch.amp.is_autocast_available does not, but breaks torch 2.11's graphs.
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    weight_products = tuple(n for n, scale in ((1, w1_scale), (3, w2_scale)) if scale is not None)
    chosen, _ = backend(pattern, weight_products, cut_along_tokens, width, hidden_dim, x.device, x.dtype)
    if chosen == "groups":
        if isinstance(pattern, Preceding):
            return _preceding_groups(x, w1, w2, pattern)
        return _Groups.apply(x, w1, w2, pattern, w1_scale, w2_scale, order)
    if chosen == "venom":
        return _Venom.apply(x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens, order)
    if order is not None:
        inverse = order.argsort()
        x = permute_rows(x, order, inverse)
    packed = chosen == "two_four"
    if chosen == "columns":
        if isinstance(pattern, Preceding):
            y = _preceding_columns(x, w1, w2, pattern)
        else:
            assert isinstance(pattern, Groups)
            y = _columns(x, w1, w2, pattern, w1_scale, w2_scale)
    elif packed and pattern is not None:
        y = _two_four(x, w1, w2, w1_scale, w2_scale, cut_along_tokens)
    else:
        y = _Masked.apply(x, w1, w2, pattern, w1_scale, w2_scale, cut_along_tokens, packed)
    return y if order is None else permute_rows(y, inverse, order)
