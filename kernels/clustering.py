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

The clusters that tokens are sorted by can also be clusters of tokens (`token_clusters`): of the inputs of the FFN,
once, when sparsity starts. Tokens of one cluster are then alike in all that the FFN sees, and a block keeps more of its
activations (docs/studies/tokens_12m).

Source: arXiv 2602.06183, which clusters rows of W1; the distance, the similarity by activations and the form of the
router are choices of this project.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounds of an assignment. After 16 rounds, 1 or 2% of the rows are not assigned yet in the first iterations of k-means,
# 0.2% in the last; all rows would need about as many rounds as there are clusters.
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
    """Assign `size` rows to each column as a stable matching: no row and column both prefer each other to their match.

    Deferred acceptance (Gale and Shapley), vectorised. In each round every row proposes to its best column among those
    that have not rejected it; every column keeps its best `size` rows and rejects the others. It ends when no row is
    rejected, which takes about as many rounds as there are columns; in most of them only a few rows move. So after
    `rounds` rounds the rows that are left fill the free places in order.

    Args:
        scores: `[L, R, C]`, L independent problems. They are solved together because a round is a dozen small kernels,
            whose launches take the host longer than the GPU takes to run them.
        size: rows of each column, R / C.
        rounds: largest number of rounds, a multiple of 8.

    Returns:
        The column of each row, `[L, R]` int64.
    """
    layers, rows_each, columns_each = scores.shape
    scores = scores.clone().flatten(0, 1)
    rows, columns = (torch.arange(layers * count, device=scores.device) for count in (rows_each, columns_each))
    first = rows // rows_each * columns_each  # the first column of the row's own problem
    # The time of a radix sort is proportional to the bytes of its keys.
    narrow = torch.int16 if len(columns) < 2**15 else torch.int64
    done = 0
    while True:
        # The host waits for the device only every 8 rounds; rounds after the end change nothing.
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
        weight: `[f, d]`, floating point, one row for each neuron: W1, or other features of the neurons. Or
            `[L, f, d]`: the neurons of L layers, clustered independently, but faster than in L calls.
        size: neurons in a cluster, a divisor of f.
        iterations: largest number of iterations of k-means, at least 1; it stops when no row changes its cluster.
        seed: of the choice of the first centroids among the rows; a sequence has one for each layer.

    Returns:
        order `[f]` int64: the rows sorted by cluster. Rows `c * size` to `(c + 1) * size - 1` of `weight[order]` are
        cluster c; within a cluster the rows keep their order, and neighbouring clusters are similar.
        centroids `[f / size, d]` float32, of unit length. For L layers both are `[L, ...]`.

    Raises:
        ValueError: size does not divide f, or iterations is below 1.
    """
    _check_clusters(weight.shape[-2], size, iterations)
    # Contiguous, because every iteration gathers rows.
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
    """`balanced_clusters` for rows `[L, f, d]` of unit length: order `[L, f]` and centroids `[L, f / size, d]`."""
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
    """An order of the clusters, `[L, C]` int64, in which each is followed by the most similar one of those left.

    A large block of tokens holds tokens of several neighbouring clusters, so neighbours should be similar.
    """
    similarity = (centroids @ centroids.mT).cpu()  # the steps below are too small for a GPU
    layer, left = torch.arange(len(similarity)), torch.zeros(similarity.shape[:2])
    chain = [similarity.sum(2).argmin(1)]
    for _ in range(similarity.shape[1] - 1):
        left[layer, chain[-1]] = -torch.inf
        chain.append((similarity[layer, chain[-1]] + left).argmax(1))
    return torch.stack(chain, 1).to(centroids.device)


def _centroids(rows: Tensor, order: Tensor, size: int) -> Tensor:
    """Unit vectors `[L, f / size, d]` along the sums of each `size` rows of rows `[L, f, d]` in an order `[L, f]`."""
    # All clusters have one size, so this sums a fixed number of rows: deterministic on a GPU, unlike index_add.
    sums = [one[members].unflatten(0, (-1, size)).sum(1) for one, members in zip(rows, order, strict=True)]
    return F.normalize(torch.stack(sums), dim=2)


@_tf32()
def activation_clusters(
    x: Tensor, weight: Tensor, size: int, iterations: int = 10, seed: int | Sequence[int] = 0
) -> tuple[Tensor, Tensor]:
    """Balanced clusters of neurons that are active for the same tokens: of the columns of h = relu(x W1^T)^2.

    Args:
        x: `[T, d]`, floating point: a representative sample of some thousand tokens; or `[L, T, d]` for L layers.
        weight: `[f, d]` or `[L, f, d]`, floating point: W1.
        size, iterations, seed: see `balanced_clusters`.

    Returns:
        order `[f]` int64 and centroids `[f / size, d]` float32, see `balanced_clusters`. The centroid of a cluster is
        the direction of the sum of its rows of W1, since the router multiplies centroids with tokens.

    Raises:
        ValueError: see `balanced_clusters`.
    """
    _check_clusters(weight.shape[-2], size, iterations)
    whole = weight.detach().float().reshape(-1, *weight.shape[-2:])
    # In place, because h of several layers takes gigabytes.
    rows = (whole @ x.detach().float().reshape(-1, *x.shape[-2:]).mT).relu_().square_()
    rows.div_(rows.norm(dim=2, keepdim=True).clamp_min_(1e-12))
    order, _ = _clusters(rows, size, iterations, seed)
    centroids = _centroids(F.normalize(whole, dim=2), order, size)
    return order.view(*weight.shape[:-1]), centroids.view(*weight.shape[:-2], *centroids.shape[1:])


def token_clusters(x: Tensor, count: int, iterations: int = 10, seed: int | Sequence[int] = 0) -> Tensor:
    """Centroids of balanced clusters of tokens under cosine distance: tokens that are alike need the same neurons.

    Args:
        x: `[T, d]`, floating point: a representative sample of some thousand tokens, of which the last T % count are
            left out. Fewer than `count` are repeated, so that clusters are equal. Rows of zeros are not tokens: an
            expert that got few of them has a sample filled up with zeros. Or `[L, T, d]` for L layers.
        count: C, the number of clusters.
        iterations, seed: see `balanced_clusters`.

    Returns:
        `[C, d]` or `[L, C, d]` float32, of unit length; neighbours are similar. Zeros where x has no token.

    Raises:
        ValueError: iterations is below 1.
    """
    size = max(x.shape[-2], count) // count
    # Tokens are repeated in the place of zeros: clusters of zeros would leave all tokens to a few others.
    is_token = x.any(-1)
    tokens_first = is_token.byte().sort(dim=-1, descending=True, stable=True).indices
    turn = torch.arange(size * count, device=x.device) % is_token.sum(-1, keepdim=True).clamp(min=1)
    rows = torch.take_along_dim(x, tokens_first.gather(-1, turn)[..., None], -2)
    return balanced_clusters(rows, size, iterations, seed)[1]


def route_tokens(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each token to the cluster whose centroid has the largest dot product with it.

    Args:
        x: `[T, d]`, floating point.
        centroids: `[C, d]`, any floating dtype.

    Returns:
        clusters `[T]` int64, and order `[T]` int64: the tokens sorted by cluster, within a cluster by the cluster with
        the second largest product, and otherwise in their order.
    """
    scores, count = x.detach() @ centroids.to(x.dtype).T, centroids.shape[0]
    clusters = scores.argmax(dim=1)
    # Two passes over the scores that the compiler fuses; topk would be a kernel of its own.
    others = torch.where(torch.arange(count, device=x.device) == clusters[:, None], -torch.inf, scores)
    keys = clusters * count + others.argmax(dim=1)
    # The time of a radix sort is proportional to the bytes of its keys: two bytes are enough for 256 clusters.
    keys = (keys - 2**15).to(torch.int16) if count <= 256 else keys.to(torch.int32)
    return clusters, keys.sort(stable=True).indices


class _PermuteRows(torch.autograd.Function):
    # The backward pass of indexing adds rows, which needs a sort on a GPU; that of a permutation is a gather.
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
