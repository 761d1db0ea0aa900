"""Clustering of neurons and routing of tokens, so that the tokens of a block need the same neurons.

Which neurons of a squared-ReLU FFN are active depends on the token, so a pattern shared by V tokens fits well only
if the V tokens are similar. Two permutations achieve this.

Neurons, once, when sparsity starts: they are clustered (balanced k-means under cosine distance, all clusters of one
size), and W1's rows and W2's columns are permuted into cluster order. The network computes the same function; only the
order of the neurons changes. Neurons are similar if they are active for the same tokens, since they are then kept
together; their rows of W1 need not be similar. The centroid of a cluster, for the router, is the direction of the sum
of its rows of W1.

Tokens, every step: a token is assigned to the cluster c with the largest x . centroid_c. The tokens of the batch are
sorted by cluster and, within a cluster, by the cluster with the second largest product. The FFN acts on each token
independently, so sorting before it and restoring the order after it only changes which tokens share a block.

Source: arXiv 2602.06183, which clusters rows of W1; the distance, the similarity by activations and the form of the
router are choices of this project.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# Of an assignment: 1 or 2% of the rows have not found their place by then in the first iterations, 0.2% in the last;
# to the end it takes as many rounds as there are clusters.
ROUNDS = 16


@contextmanager
def _tf32() -> Iterator[None]:
    """Allow TF32 products of float32 matrices on a GPU: clustering needs no higher precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _balanced_assignment(scores: Tensor, size: int, rounds: int = ROUNDS) -> Tensor:
    """Assign each row to one column, `size` rows a column, stably: no row and column both prefer each other.

    Deferred acceptance (Gale and Shapley), vectorised: every row stands at its favourite among the columns that have
    not turned it away, each column keeps its best `size` and turns the rest away, until nobody is turned away. It
    ends because each round strikes at least one entry and there is a place for every row. About as many rounds as there
    are columns, most of them for a few rows that push one another on: after `rounds` (a multiple of 8) those who are
    left take the free places in order.

    Args:
        scores: `[L, R, C]`, L problems at once: a round is a dozen small kernels, and the host takes longer to start
            them than a GPU to run them.
        size: rows a column, R / C.
        rounds: after so many the rest is assigned in order.

    Returns:
        `[L, R]` int64.
    """
    layers, rows_each, columns_each = scores.shape
    scores = scores.clone().flatten(0, 1)
    rows, columns = (torch.arange(layers * count, device=scores.device) for count in (rows_each, columns_each))
    first = rows // rows_each * columns_each  # the columns of a row's own problem begin there
    narrow = torch.int16 if len(columns) < 2**15 else torch.int64  # a radix sort's time goes with the bytes of its keys
    done = 0
    while True:
        # The host asks only now and then, and rounds past the end change nothing.
        for _ in range(8):
            best, choice = scores.max(dim=1)
            order = best.sort(descending=True, stable=True).indices
            column, at = (first + choice)[order].to(narrow).sort(stable=True)
            column, row = column.long(), order[at]
            place = rows - torch.searchsorted(column, columns)[column]
            rejected = place >= size
            scores[row, choice[row]] += torch.where(rejected, -torch.inf, 0)
        done += 8
        waiting = bool(rejected.any())
        if waiting and done == rounds:
            free = size - column[~rejected].bincount(minlength=len(columns))
            choice[row[rejected]] = (columns % columns_each).repeat_interleave(free)
        if not waiting or done == rounds:
            return choice.view(layers, rows_each)


def balanced_clusters(
    weight: Tensor, size: int, iterations: int = 10, seed: int | Sequence[int] = 0
) -> tuple[Tensor, Tensor]:
    """Balanced k-means of rows under cosine distance.

    Args:
        weight: `[f, d]`, floating point, a row a neuron: W1, or what else tells neurons apart; or `[L, f, d]`, those of
            L layers, each clustered by itself but faster than one after the other.
        size: neurons in a cluster, a divisor of f.
        iterations: rounds of assignment and centroid update at most; ends earlier when no row moves.
        seed: chooses the first centroids among the rows; of several layers one each.

    Returns:
        order `[f]` int64: the rows by cluster, so that `weight[order]` holds cluster c in its rows
        `c * size` to `(c + 1) * size`; inside a cluster rows keep their order, and clusters that are alike are
        neighbours.
        centroids `[f / size, d]` float32, of unit length. Both `[L, ...]` of several layers.

    Raises:
        ValueError: size does not divide f, or no iteration is asked for.
    """
    _check_clusters(weight.shape[-2], size, iterations)
    # Rows are gathered in every iteration; those of a transposed matrix are scattered over all of it.
    rows = F.normalize(weight.detach().float(), dim=-1).contiguous()
    order, centroids = _clusters(rows.view(-1, *rows.shape[-2:]), size, iterations, seed)
    return order.view(*weight.shape[:-1]), centroids.view(*weight.shape[:-2], *centroids.shape[1:])


def _check_clusters(neurons: int, size: int, iterations: int) -> None:
    if size < 1 or neurons % size:
        raise ValueError(f"size = {size} does not divide the FFN's hidden_dim = {neurons}")
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: clustering needs at least one")


@_tf32()
def _clusters(rows: Tensor, size: int, iterations: int, seed: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """`balanced_clusters` of rows `[L, f, d]` that are of unit length already: `[L, f]` and `[L, f / size, d]`."""
    (layers, neurons), device = rows.shape[:2], rows.device
    firsts = []
    for start in [seed] * layers if isinstance(seed, int) else seed:
        generator = torch.Generator().manual_seed(start)
        firsts.append(torch.randperm(neurons, generator=generator, device="cpu")[: neurons // size])
    layer = torch.arange(layers, device=device)[:, None]
    centroids, previous = rows[layer, torch.stack(firsts).to(device)], None
    for _ in range(iterations):
        assignment = _balanced_assignment(rows @ centroids.mT, size)
        if previous is not None and torch.equal(previous, assignment):
            break
        order = assignment.sort(stable=True).indices
        centroids, previous = _centroids(rows, order, size), assignment
    chain = _chain(centroids)
    return order.view(layers, -1, size)[layer, chain].flatten(1), centroids[layer, chain]


def _chain(centroids: Tensor) -> Tensor:
    """Clusters in an order in which each is followed by the likest one of those left: `[L, C]` int64.

    Of a large block of tokens one cluster fills a part, and its neighbours the rest.
    """
    likeness = (centroids @ centroids.mT).cpu()  # steps too small for a device
    layer, left = torch.arange(len(likeness)), torch.zeros(likeness.shape[:2])
    chain = [likeness.sum(2).argmin(1)]
    for _ in range(likeness.shape[1] - 1):
        left[layer, chain[-1]] = -torch.inf
        chain.append((likeness[layer, chain[-1]] + left).argmax(1))
    return torch.stack(chain, 1).to(centroids.device)


def _centroids(rows: Tensor, order: Tensor, size: int) -> Tensor:
    """Directions of the sums of `size` rows at a time: rows `[L, f, d]` in an order `[L, f]` to `[L, f / size, d]`."""
    # Clusters are of one size, so a sum over a fixed number of rows: the same at every run, unlike an indexed addition.
    sums = [one[members].unflatten(0, (-1, size)).sum(1) for one, members in zip(rows, order, strict=True)]
    return F.normalize(torch.stack(sums), dim=2)


@_tf32()
def activation_clusters(
    x: Tensor, weight: Tensor, size: int, iterations: int = 10, seed: int | Sequence[int] = 0
) -> tuple[Tensor, Tensor]:
    """Balanced clusters of neurons that fire for the same tokens: of the columns of h = relu(x W1^T)^2.

    Args:
        x: `[T, d]`, floating point: tokens that stand for all, some thousands; or `[L, T, d]`, those of L layers.
        weight: `[f, d]` or `[L, f, d]`, floating point: W1.
        size, iterations, seed: as in `balanced_clusters`.

    Returns:
        order `[f]` int64 and centroids `[f / size, d]` float32, as `balanced_clusters` gives them; the centroids are
        the directions of the clusters' rows of W1, since it is with tokens that the router multiplies them.

    Raises:
        ValueError: as `balanced_clusters`.
    """
    _check_clusters(weight.shape[-2], size, iterations)
    whole = weight.detach().float().reshape(-1, *weight.shape[-2:])
    # In place: several layers' h is gigabytes.
    rows = (whole @ x.detach().float().reshape(-1, *x.shape[-2:]).mT).relu_().square_()
    rows.div_(rows.norm(dim=2, keepdim=True).clamp_min_(1e-12))
    order, _ = _clusters(rows, size, iterations, seed)
    centroids = _centroids(F.normalize(whole, dim=2), order, size)
    return order.view(*weight.shape[:-1]), centroids.view(*weight.shape[:-2], *centroids.shape[1:])


def route_tokens(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Send each token to the cluster whose centroid has the largest dot product with it.

    Args:
        x: `[T, d]`, floating point.
        centroids: `[C, d]`, any floating dtype.

    Returns:
        clusters `[T]` int64, and order `[T]` int64: the tokens sorted by cluster, those of a cluster by the cluster
        of second-largest product, and else in their order.
    """
    scores, count = x.detach() @ centroids.to(x.dtype).T, centroids.shape[0]
    clusters = scores.argmax(dim=1)
    # Two passes that the compiler fuses, where topk is a kernel of its own.
    others = torch.where(torch.arange(count, device=x.device) == clusters[:, None], -torch.inf, scores)
    keys = clusters * count + others.argmax(dim=1)
    # A radix sort's time goes with the bytes of its keys: two are enough for 256 clusters.
    keys = (keys - 2**15).to(torch.int16) if count <= 256 else keys.to(torch.int32)
    return clusters, keys.sort(stable=True).indices


class _PermuteRows(torch.autograd.Function):
    # Indexing's own backward adds rows up, which needs a sort on a GPU; a permutation's backward is a gather.
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`x[order]` for a permutation `order [T]` of the rows of `x [T, d]` and its inverse permutation."""
    return _PermuteRows.apply(x, order, inverse)
