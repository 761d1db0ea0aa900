"""The squared-ReLU FFNs of a mixture of experts: dense, or sparse in blocks of tokens that never cross experts.

Every expert is an FFN of its own. The tokens that the model's router sent to experts come sorted by expert:

    x       [N, d]       rows of the first expert, then of the second, ...; rows after the last expert's give zeros
    counts  [E]          rows of each expert
    w1, w2  [E, f, d]    W1, and W2 transposed, so that a neuron is a row of both

Inside an expert sparsity is what it is in any FFN (`kernels.feed_forward`): the expert's tokens are sorted by its own
clusters and cut into blocks of v, the last one short, and every block keeps a share of the expert's neurons.

Two families compute this:

    ExpertByExpert    one expert after another by the family that `kernels.choose` gives for it. With the masked
                      reference it is the specification, for any pattern, device and dtype. The host waits for `counts`.
    GroupedColumns    large blocks of all experts in one launch a product, without waiting for `counts`. With the
                      experts' neurons as rows of one tall W1, the operators of `kernels.columns` do it: they get
                      which blocks each expert has, and a block keeps rows of its expert. In fp8 by those of
                      `columns_fp8`, every weight of an expert and every block with a scale of its own.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.columns import choose, fp8, reduce_neurons, reduce_tokens, sample
from kernels.columns.ffn import LARGE
from kernels.columns.ffn_fp8 import LARGE_BLOCKS_FP8
from kernels.family import Cost, Family, FeedForwardSparsity, Pattern, Shape, refuses_device
from kernels.feed_forward import choose as choose_family
from kernels.feed_forward import preferred, sparse_feed_forward
from kernels.float8 import LARGEST, scale_of
from kernels.groups.pattern import Groups

ALIGNED = 8  # rows of a group that torch._grouped_mm multiplies: 16 bytes of bf16


class Layout(NamedTuple):
    """The positions of the rows of x in blocks of v rows, each block of one expert.

    Attributes:
        rows: `[B v]` int64, the row of x at each position; -1: none, the position holds zeros.
        places: `[N]` int64, the position of each row of x; -1: it belongs to no expert and has none.
        expert: `[B]` int64, the expert of each block; -1: no expert needs the block.
        counts: `[E]` int64, positions in each expert's blocks. Blocks that no expert needs count as the last expert's,
            so the sum is B v.
    """

    rows: Tensor
    places: Tensor
    expert: Tensor
    counts: Tensor


def lay_out(counts: Tensor, order: Tensor | None, rows: int, v: int, fewest: int = 0) -> Layout:
    """Cut the rows of each expert into blocks of v rows, the last one filled up, without waiting for the device.

    Args:
        counts: `[E]` int64.
        order: `[N]` int64, a permutation that leaves every row with its expert: neighbours share a block. None: as
            they are.
        rows: N.
        v: rows in a block.
        fewest: the least number of blocks of an expert, 0 or 1. The block of an expert without rows holds zeros.

    Returns:
        A layout of B = floor(N / v) + E blocks, which are enough for any counts.
    """
    blocks = rows // v + len(counts)
    device = counts.device
    ends = counts.cumsum(0)
    starts = ends - counts
    needed = ((counts + v - 1) // v).clamp(min=fewest)
    block_ends = needed.cumsum(0)
    first_block = block_ends - needed

    block = torch.arange(blocks, device=device)
    holder = torch.searchsorted(block_ends, block, right=True)
    expert = holder.clamp(max=len(counts) - 1)
    inside = block - first_block[expert]
    at = (starts[expert] + inside * v)[:, None] + torch.arange(v, device=device)
    exists = (holder < len(counts))[:, None] & (at < ends[expert][:, None])
    at = at.clamp(max=rows - 1)
    standing = torch.where(exists, at if order is None else order[at], -1).flatten()

    position = torch.arange(rows, device=device)
    owner = torch.searchsorted(ends, position, right=True)
    known = owner.clamp(max=len(counts) - 1)
    place = torch.where(owner < len(counts), first_block[known] * v + position - starts[known], -1)
    if order is not None:
        place = torch.empty_like(place).index_copy_(0, order, place)
    filled = needed * v
    last = torch.arange(len(counts), device=device) == len(counts) - 1
    expert = torch.where(holder < len(counts), expert, -1)
    return Layout(standing, place, expert, filled + torch.where(last, blocks * v - filled.sum(), 0))


class _TakeRows(torch.autograd.Function):
    # Both directions are a gather: indexing's own backward adds rows up, which needs a sort on a GPU.
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return _rows_at(grad, inverse), None, None


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    return torch.where(index[:, None] >= 0, x[index.clamp(min=0)], 0)


def _to_blocks(x: Tensor, layout: Layout) -> Tensor:
    """`[N, d]` to `[B v, d]`."""
    return _TakeRows.apply(x, layout.rows, layout.places)


def _from_blocks(y: Tensor, layout: Layout) -> Tensor:
    """`[B v, d]` to `[N, d]`; zero for rows that stand in no block."""
    return _TakeRows.apply(y, layout.places, layout.rows)


def _uses_grouped_mm(x: Tensor, *matrices: Tensor) -> bool:
    aligned = all(size % ALIGNED == 0 for matrix in matrices for size in matrix.shape[1:])
    return x.device.type in ("cuda", "meta") and x.dtype == torch.bfloat16 and aligned


def grouped_linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Every row times its expert's matrix: `torch._grouped_mm` in bf16 on a GPU, else one expert after another.

    Args:
        x: `[N, d]`, sorted by expert.
        matrices: `[E, d, n]`, same dtype.
        counts: `[E]` int64; where a gradient is needed on a GPU, multiples of `ALIGNED`.

    Returns:
        `[N, n]`; rows that belong to no expert are undefined.
    """
    if _uses_grouped_mm(x, matrices):
        return torch._grouped_mm(x, matrices, offs=counts.cumsum(0, dtype=torch.int32))
    sizes = counts.tolist()
    *parts, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
    products = [part @ matrix for part, matrix in zip(parts, matrices.unbind(), strict=True)]
    return torch.cat([*products, rest.new_zeros(rest.shape[0], matrices.shape[2])])


def _squared_relu(y1: Tensor) -> Tensor:
    active = y1.relu()
    return active * active  # not square(): CUDA autocast computes powers in float32


def _ffn(x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
    return grouped_linear(_squared_relu(grouped_linear(x, w1.mT, counts)), w2, counts)


def dense_experts(x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
    """y `[N, d]` of dense experts; arguments as in the module docstring. Under autocast in its dtype."""
    x, w1, w2 = autocast(x, w1, w2)
    if not _uses_grouped_mm(x, w1):
        return _ffn(x, w1, w2, counts)
    # A grouped product over the rows of an expert, as the gradient of its weight is, need not write the result of an
    # expert without rows: every expert has a block.
    layout = lay_out(counts, None, x.shape[0], ALIGNED, fewest=1)
    return _from_blocks(_ffn(_to_blocks(x, layout), w1, w2, layout.counts), layout)


def waits_for_counts(x: Tensor, w1: Tensor, sparsity: FeedForwardSparsity | None) -> bool:
    """Whether the host has to know `counts` to compute experts, so that torch.compile cannot make one graph of it.

    Args:
        x, w1: as in the module docstring, before autocast.
        sparsity: of sparse experts; None: dense ones.
    """
    x, w1 = autocast(x[:0], w1[:0])
    if not _uses_grouped_mm(x, w1):
        return True
    if sparsity is None:
        return False
    shape = Shape(w1.shape[2], w1.shape[1])
    return not isinstance(choose_experts(sparsity, shape, x.device, x.dtype)[0], GroupedColumns)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, where that is on."""
    device = tensors[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors


def route_within_experts(x: Tensor, centroids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the tokens of every expert by its own clusters, as `kernels.route_tokens` sorts those of an FFN.

    Args:
        x: `[N, d]`, sorted by expert.
        centroids: `[E, C, d]`, any floating dtype.
        counts: `[E]` int64.

    Returns:
        clusters `[N]` int64, of each token's expert (0 to C - 1); order `[N]` int64, in which every token stays with
        its expert.
    """
    clusters, device = centroids.shape[1], x.device
    (x,) = autocast(x)
    filled = F.pad(centroids.to(x.dtype), (0, 0, 0, -clusters % ALIGNED))
    scores = grouped_linear(x.detach(), filled.mT, counts)[:, :clusters]
    nearest = scores.argmax(1)
    others = torch.where(torch.arange(clusters, device=device) == nearest[:, None], -torch.inf, scores)
    owner = torch.searchsorted(counts.cumsum(0), torch.arange(x.shape[0], device=device), right=True)
    keys = (owner * clusters + nearest) * clusters + others.argmax(1)
    return nearest, keys.sort(stable=True).indices


class _SixProducts(torch.autograd.Function):
    """Products (1) to (6) of `kernels.feed_forward` for blocks x `[B, v, d]`, each of one expert; y `[B, v, d]`.

    `expert` and `counts` are those of a `Layout`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, expert: Tensor, counts: Tensor, pattern: Groups) -> Tensor:
        experts, hidden_dim, _ = w1.shape
        kept = pattern.kept_groups(hidden_dim) * pattern.g
        chosen_by = x[:, :: pattern.sample]
        blocks = counts // x.shape[1]
        y1 = grouped_linear(chosen_by.flatten(0, 1), w1.mT, blocks * chosen_by.shape[1])
        place = choose(y1.unflatten(0, (x.shape[0], -1)), pattern, expert, experts)
        bounds = F.pad(blocks.cumsum(0, dtype=torch.int32), (1, 0))
        active = sample(x, w1.flatten(0, 1), place, kept, bounds).relu()  # (1)
        h = active * active
        ctx.save_for_backward(x, w1, w2, h, place, bounds)
        return reduce_neurons(h, w2.flatten(0, 1), place, bounds)  # (2)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w1, w2, h, place, bounds = ctx.saved_tensors
        dy1 = 2 * h.sqrt() * sample(dy, w2.flatten(0, 1), place, h.shape[2], bounds)  # (3)
        dw2 = reduce_tokens(h, dy, place, False, bounds)  # (4)
        dx = reduce_neurons(dy1, w1.flatten(0, 1), place, bounds)  # (5)
        dw1 = reduce_tokens(dy1, x, place, False, bounds)  # (6)
        return dx, dw1.view_as(w1), dw2.view_as(w2), None, None, None


class _SixProductsFp8(torch.autograd.Function):
    """`_SixProducts` in fp8, as `kernels.columns.ffn_fp8` computes the blocks of one FFN; y `[B v, d]`.

    Each block of tokens and each weight of an expert has a scale of its own.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor, expert: Tensor, counts: Tensor, pattern: Groups) -> Tensor:
        (experts, hidden_dim, _), (blocks, v, _) = w1.shape, x.shape
        owner = expert % experts
        # Blocks are laid out already: their rows stay where they are.
        order = torch.arange(blocks * v, dtype=torch.int32, device=x.device)
        scale_x = scale_of(x.abs().amax((1, 2)))
        scales = [scale_of(weight.abs().amax((1, 2))) for weight in (w1, w2)]
        w1_fp8, w2_fp8 = (
            fp8.quantise(weight.flatten(0, 1), 1 / scale) for weight, scale in zip((w1, w2), scales, strict=True)
        )
        scale_w1, scale_w2 = (scale[owner] for scale in scales)  # of each block's weights
        x_fp8, x_t = fp8.cast(x.flatten(0, 1), order, 1 / scale_x, v)
        y1 = fp8.chosen_by(x_fp8, w1_fp8.view_as(w1), pattern.sample, scale_w1, x.dtype, owner.int())
        place = choose(y1 * scale_x[:, None, None].to(x.dtype), pattern, expert, experts)
        neurons = fp8.kept_neurons(place, pattern.kept_groups(hidden_dim) * pattern.g)
        rows = neurons + (owner * hidden_dim).int()[:, None]
        y1, peak = fp8.sample(x_fp8, w1_fp8, rows, scale_x, scale_w1, True, x.dtype)  # (1)
        scale_h = scale_of(peak * peak)
        h, h_t = fp8.cast_square(y1, 1 / scale_h)
        y = fp8.reduce_neurons(h, w2_fp8, rows, scale_h, scale_w2, order, x.dtype)  # (2)
        bounds = F.pad((counts // v).cumsum(0, dtype=torch.int32), (1, 0))
        ctx.save_for_backward(
            x_t, h_t, w1_fp8, w2_fp8, place, rows, order, bounds, scale_x, scale_h, scale_w1, scale_w2
        )
        ctx.shape = w1.shape
        return y  # flat: compiled code of torch 2.11 would compute zero gradients of a view

    @staticmethod
    def backward(ctx, dy: Tensor):
        x_t, h_t, w1, w2, place, rows, order, bounds, scale_x, scale_h, scale_w1, scale_w2 = ctx.saved_tensors
        dtype, v = dy.dtype, x_t.shape[2]
        scale_dy = scale_of(dy.unflatten(0, (-1, v)).abs().amax((1, 2)))
        dy_fp8, dy_t = fp8.cast(dy, order, 1 / scale_dy, v)
        dh, peak = fp8.sample(dy_fp8, w2, rows, scale_dy, scale_w2, False, dtype)  # (3)
        scale_dy1 = scale_of(2 * (scale_h * LARGEST).sqrt() * peak)  # of a bound of |dy1|, which saves a pass over dy1
        dy1, dy1_t = fp8.cast_gradient(dh, 1 / scale_dy1, h_t, scale_h)
        dw2 = fp8.reduce_tokens(h_t, dy_t, place, scale_h, scale_dy, False, dtype, bounds)  # (4)
        dx = fp8.reduce_neurons(dy1, w1, rows, scale_dy1, scale_w1, order, dtype)  # (5)
        dw1 = fp8.reduce_tokens(dy1_t, x_t, place, scale_dy1, scale_x, False, dtype, bounds)  # (6)
        return dx.unflatten(0, (-1, v)), dw1.view(ctx.shape), dw2.view(ctx.shape), None, None, None


class ExpertFamily(Family):
    """A family whose FFNs are the experts of a layer; `run` takes the place of `forward` and `backward`."""

    def run(
        self, x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> Tensor:
        """y `[N, d]` of `sparse_experts`, differentiable."""
        raise NotImplementedError


class ExpertByExpert(ExpertFamily):
    """One expert after another.

    Args:
        inner: the family that computes each.
    """

    def __init__(self, inner: Family) -> None:
        self.inner = inner
        self.name = f"experts_{inner.name}"

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        return f"one expert after another: {self.inner.describe(sparsity, device, here)}"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        return self.inner.cost(sparsity, shape._replace(tokens=shape.tokens // shape.experts))

    def run(
        self, x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> Tensor:
        start, parts = 0, []
        for expert, tokens in enumerate(counts.tolist()):
            own = x[start : start + tokens]
            if not tokens:  # nothing to cut, and its weights get a gradient of zeros
                parts.append(_squared_relu(own @ w1[expert].T) @ w2[expert])
            else:
                inside = None if order is None else order[start : start + tokens] - start
                y = sparse_feed_forward(own, w1[expert], w2[expert].T, sparsity, order=inside, family=self.inner)
                parts.append(y)
            start += tokens
        return torch.cat([*parts, torch.zeros_like(x[start:])])


class GroupedColumns(ExpertFamily):
    """Large blocks of all experts at once.

    Attributes:
        products: computes y of blocks `[B, v, d]`, each of one expert.
    """

    name = "experts_columns"
    products: type[torch.autograd.Function] = _SixProducts

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        return isinstance(sparsity.pattern, Groups)

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        if refusal := refuses_device(device, dtype):
            return refusal
        if sparsity.weight_products:
            return "blocks of several experts need dense weights"
        if shape.width % ALIGNED or shape.hidden_dim % ALIGNED:
            return f"torch._grouped_mm needs a width and a hidden_dim divisible by {ALIGNED}"
        assert isinstance(sparsity.pattern, Groups)
        return "" if sparsity.pattern.v >= LARGE else f"large blocks need v of {LARGE} and more"

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        assert isinstance(sparsity.pattern, Groups)
        return f"blocks of {sparsity.pattern.v} tokens of all experts in one launch, cuBLAS"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        """Of `shape.tokens` rows of all experts; 0: without the rows that fill up last blocks."""
        pattern = sparsity.pattern
        assert isinstance(pattern, Groups)
        blocks = shape.tokens // pattern.v + shape.experts
        filled = blocks * pattern.v / shape.tokens if shape.tokens else 1.0
        kept = pattern.density(shape.hidden_dim)
        return Cost(
            (kept * filled,) * 6,
            beside=filled / pattern.sample,
            kept_h=kept * filled,
            gradients=kept * filled,
            copied_rows=kept * blocks,
            chosen_by=filled / pattern.sample,
        )

    def run(
        self, x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> Tensor:
        pattern = sparsity.pattern
        assert isinstance(pattern, Groups)
        layout = lay_out(counts, order, x.shape[0], pattern.v)
        blocks = _to_blocks(x, layout).unflatten(0, (-1, pattern.v))
        y = self.products.apply(blocks, w1, w2, layout.expert, layout.counts, pattern)
        return _from_blocks(y.view(-1, x.shape[1]), layout)


class GroupedColumnsFp8(GroupedColumns):
    """Large blocks of all experts at once, in fp8."""

    name = "experts_columns_fp8"
    fp8 = True
    products = _SixProductsFp8

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        refusal = super().refuses(sparsity, shape, device, dtype, here)
        return refusal or LARGE_BLOCKS_FP8.refuses(sparsity, shape, device, dtype, here)

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        assert isinstance(sparsity.pattern, Groups)
        return f"blocks of {sparsity.pattern.v} tokens of all experts in one launch, in fp8, Triton"

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        # Memory is counted in bf16 elements, and an fp8 number is half of one: h, and copies of all of W1 and W2.
        cost = super().cost(sparsity, shape)
        return replace(cost, kept_h=cost.kept_h / 2, kept_weights=1.0)


GROUPED_COLUMNS = GroupedColumns()
GROUPED_COLUMNS_FP8 = GroupedColumnsFp8()


def choose_experts(
    sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
) -> tuple[ExpertFamily, str]:
    """The family that computes sparse experts; arguments and result as of `kernels.choose`."""
    if isinstance(wanted := preferred(), ExpertFamily):
        return wanted, "preferred"
    refusal = "no family runs this pattern for all experts at once"
    grouped = GROUPED_COLUMNS_FP8 if sparsity.fp8 else GROUPED_COLUMNS
    if grouped.handles(sparsity):
        refusal = grouped.refuses(sparsity, shape, device, dtype, here)
        if not refusal:
            return grouped, ""
    inner, other = choose_family(sparsity, shape, device, dtype, here)
    return ExpertByExpert(inner), refusal if other in ("", refusal) else f"{refusal}; {other}"


def explain_experts(
    sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
) -> tuple[ExpertFamily, str]:
    """The family that `choose_experts` returns, and a description of it with the reason for it, for logs."""
    family, refusal = choose_experts(sparsity, shape, device, dtype, here)
    said = family.describe(sparsity, device, here)
    return family, f"{said}; {refusal}" if refusal else said


def sparse_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    counts: Tensor,
    sparsity: FeedForwardSparsity,
    order: Tensor | None = None,
    family: ExpertFamily | None = None,
) -> Tensor:
    """relu(x W1^T)^2 W2^T of every token's expert with h cut to a pattern, block by block.

    Under autocast the inputs are cast to its dtype, as a linear layer's would be.

    Args:
        x, w1, w2, counts: see the module docstring; `[N, d]`, `[E, f, d]` twice, one floating dtype, and `[E]` int64.
        sparsity: what h is cut to.
        order: `[N]` int64, a permutation of the rows that leaves each with its expert: neighbours share a block. None:
            as they are.
        family: that computes it; None: `choose_experts`.

    Returns:
        y `[N, d]`, in the order of x.

    Raises:
        ValueError: a pattern that f does not allow.
    """
    assert isinstance(sparsity.pattern, Pattern)
    sparsity.pattern.check(w1.shape[1])
    x, w1, w2 = autocast(x, w1, w2)
    if family is None:
        shape = Shape(x.shape[1], w1.shape[1], x.shape[0], w1.shape[0])
        family, _ = choose_experts(sparsity, shape, x.device, x.dtype)
    return family.run(x, w1, w2, counts, sparsity, order)
