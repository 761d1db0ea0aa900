"""Neurons into clusters, tokens to clusters: what makes a block of tokens want the same neurons.

Which neurons of a squared-ReLU FFN fire depends on the token, so a pattern shared by V tokens fits well only
if the V tokens are alike. Two permutations bring that about.

Neurons, once, when sparsity starts: they are clustered (balanced k-means under cosine distance, all clusters of one
size), and W1's rows and W2's columns are put into cluster order. The network computes the same function; only the order
of the neurons changed. Alike are neurons that fire for the same tokens, which is what a group of them is kept for;
their rows of W1 need not point the same way. A cluster's centroid, for the router, is the direction of its rows of W1.

Tokens, every step: a token goes to the cluster c of largest x . centroid_c, and the tokens of the batch are sorted by
cluster, those of a cluster by the second largest. The FFN acts on each token alone, so sorting before it and undoing
that after it changes nothing but which tokens share a block.

Source: arXiv 2602.06183, which clusters rows of W1; the distance, the likeness by activations and the router's form are
this project's choice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 16  # of an assignment that another follows: 1 or 2% of the rows have not found their place by then


def _balanced_assignment(scores: Tensor, size: int, rounds: int | None = None) -> Tensor:
    """Assign each row to one column, `size` rows a column, stably: no row and column both prefer each other.

    Deferred acceptance (Gale and Shapley), vectorised: every row stands at its favourite among the columns that have
    not turned it away, each column keeps its best `size` and turns the rest away, until nobody is turned away. It
    ends because each round strikes at least one entry and there is a place for every row. About as many rounds as there
    are columns, most of them for a few rows that push one another on: after `rounds` (a multiple of 8) those who are
    left take the free places in order.
    """
    scores = scores.clone()
    rows, columns = (torch.arange(length, device=scores.device) for length in scores.shape)
    narrow = torch.int16 if len(columns) < 2**15 else torch.int64  # a radix sort's time goes with the bytes of its keys
    done = 0
    while True:
        # Rounds of small kernels: the host asks only now and then, and rounds past the end change nothing.
        for _ in range(8):
            best, choice = scores.max(dim=1)
            order = best.sort(descending=True, stable=True).indices
            column, at = choice[order].to(narrow).sort(stable=True)
            column, row = column.long(), order[at]
            place = rows - torch.searchsorted(column, columns)[column]
            rejected = place >= size
            scores[row, column] += torch.where(rejected, -torch.inf, 0)
        done += 8
        if not rejected.any():
            return choice
        if done == rounds:
            free = size - column[~rejected].bincount(minlength=len(columns))
            choice[row[rejected]] = columns.repeat_interleave(free)
            return choice


def balanced_clusters(weight: Tensor, size: int, iterations: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Balanced k-means of rows under cosine distance.

    Args:
        weight: `[f, d]`, floating point, a row a neuron: W1, or what else tells neurons apart.
        size: neurons in a cluster, a divisor of f.
        iterations: rounds of assignment and centroid update at most; ends earlier when no row moves.
        seed: chooses the first centroids among the rows.

    Returns:
        order `[f]` int64: the rows by cluster, so that `weight[order]` holds cluster c in its rows
        `c * size` to `(c + 1) * size`; inside a cluster rows keep their order, and clusters that are alike are
        neighbours.
        centroids `[f / size, d]` float32, of unit length.

    Raises:
        ValueError: size does not divide f, or no iteration is asked for.
    """
    neurons = weight.shape[0]
    if size < 1 or neurons % size:
        raise ValueError(f"size = {size} does not divide the FFN's hidden_dim = {neurons}")
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: clustering needs at least one")
    # Rows are gathered in every iteration; those of a transposed matrix are scattered over all of it.
    rows = F.normalize(weight.detach().float(), dim=1).contiguous()
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(neurons, generator=generator, device="cpu")[: neurons // size].to(weight.device)
    centroids, previous = rows[first], None
    for _ in range(iterations - 1):
        assignment = _balanced_assignment(rows @ centroids.T, size, ROUNDS)
        if previous is not None and torch.equal(previous, assignment):
            break
        _, centroids = _members(rows, assignment, size)
        previous = assignment
    order, centroids = _members(rows, _balanced_assignment(rows @ centroids.T, size), size)
    chain = _chain(centroids)
    return order.view(-1, size)[chain].flatten(), centroids[chain]


def _chain(centroids: Tensor) -> Tensor:
    """Clusters in an order in which each is followed by the likest one of those left: `[C]` int64.

    Of a large block of tokens one cluster fills a part, and its neighbours the rest.
    """
    likeness = (centroids @ centroids.T).cpu()  # steps too small for a device
    left, chain = torch.zeros(len(likeness)), [int(likeness.sum(1).argmin())]
    for _ in range(len(likeness) - 1):
        left[chain[-1]] = -torch.inf
        chain.append(int((likeness[chain[-1]] + left).argmax()))
    return torch.tensor(chain, device=centroids.device)


def _members(rows: Tensor, assignment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows by cluster, and the clusters' centroids."""
    order = assignment.sort(stable=True).indices
    # Clusters are of one size, so a sum over a fixed number of rows: the same at every run, unlike an indexed addition.
    return order, F.normalize(rows[order].unflatten(0, (-1, size)).sum(1), dim=1)


def activation_clusters(
    x: Tensor, weight: Tensor, size: int, iterations: int = 10, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Balanced clusters of neurons that fire for the same tokens: of the columns of h = relu(x W1^T)^2.

    Args:
        x: `[T, d]`, floating point: tokens that stand for all, some thousands.
        weight: `[f, d]`, floating point: W1.
        size, iterations, seed: as in `balanced_clusters`.

    Returns:
        order `[f]` int64 and centroids `[f / size, d]` float32, as `balanced_clusters` gives them; the centroids are
        the directions of the clusters' rows of W1, since it is with tokens that the router multiplies them.

    Raises:
        ValueError: as `balanced_clusters`.
    """
    weight = weight.detach().float()
    active = (x.detach().float() @ weight.T).relu()
    order, _ = balanced_clusters((active * active).T, size, iterations, seed)
    rows = F.normalize(weight, dim=1)[order]
    return order, F.normalize(rows.unflatten(0, (-1, size)).sum(1), dim=1)


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
