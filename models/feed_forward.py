"""The squared-ReLU FFN as a module: dense or sparse, by one flag.

A run's phases flip `sparse`; nothing else about the module changes, so a model trained sparsely is a dense
model with the same parameters. What a sparse phase needs beyond the parameters is three buffers, filled when it starts
(`recipes/sparsity.py`): the two scales of the 2:4 weights and the router's centroids.

Under tensor parallelism a rank has the neurons of its shard: rows of W1, columns of W2. Every rank reads all tokens, in
one order, since the router's centroids are on all ranks; the pattern chooses among the neurons of the shard, so that
each rank does the same share of the work; and the outputs of the shards are summed where the dense FFN sums them.

In evaluation mode the module also counts how its activations fit the pattern. Validation runs on graphs of
its own, so the counting costs a training step nothing.
"""

from dataclasses import replace

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

from configs.titan import trunc_normal_
from kernels import FeedForwardSparsity, Pattern, Preceding, hidden_activations, route_tokens, sparse_feed_forward

# The numbers of a pattern are constants of the graph. Left to itself, the compiler makes a symbol of a share that it
# sees take a second value, as in a model whose layers keep different shares.
torch._dynamo.config.specialize_float = True


def inference_modes(
    sparsity: FeedForwardSparsity, seq_len: int, experts: bool = False
) -> dict[str, FeedForwardSparsity | None]:
    """The ways in which FFNs can run at inference, by name: what h and W1 are cut to; None: nothing.

        dense      as inference runs them
        sparse     as a sparse phase runs them, where the choice of a pattern sees later tokens
        dense W1   the same with W1 as it is, if the phase cuts it to 2:4

    and, with W1 as it is, by the causal choices of `kernels.causal`:

        token      every token chooses for itself
        cluster    every token keeps what its cluster's centroid would, if there is a router
        preceding  every block uses the choice of the preceding block

    Args:
        sparsity: what the run's sparse phases do.
        seq_len: tokens in a sequence.
        experts: whether the FFNs are experts, which have neither of the last two.
    """
    modes: dict[str, FeedForwardSparsity | None] = {"dense": None}
    sparsity = replace(sparsity, cut_along_tokens=False)  # of the backward pass, and not every text can be cut so
    pattern = sparsity.pattern
    if pattern is not None or sparsity.weight_products:
        modes["sparse"] = sparsity
    if not isinstance(pattern, Pattern):
        return modes
    if 1 in sparsity.weight_products:
        modes["dense W1"] = replace(sparsity, weight_products=())
    pattern = pattern.causal()
    alone = FeedForwardSparsity(pattern.of_one_token())
    if pattern.v > 1:  # else no tokens share a pattern, and "token" is what there is already
        modes["token"] = alone
    if experts:
        return modes
    if sparsity.clusters:
        modes["cluster"] = replace(alone, clusters=sparsity.clusters, by_cluster=True)
    if pattern.v > 1:
        modes["preceding"] = replace(alone, pattern=Preceding(pattern, seq_len))
    return modes


class FeedForward(nn.Module):
    """y = W2 relu(W1 x)^2, `[..., dim]` to `[..., dim]`.

    Attributes:
        always_dense: whether it stays dense in a sparse phase.
        parts: parts of W1 that are clustered by themselves: experts, of which this is one.
        sparse: whether the forward pass is the sparse one; False until a sparse phase sets it.
        w1_scale, w2_scale: `[]` float32, beta of W1 and of W2 along d.
        centroids: `[clusters, dim]` float32, unit length.
        activity: `[4]` float32, counted in evaluation mode: entries of h, non-zero ones, energy (sum of h^2), energy
            kept by the pattern.
        routed: `[clusters]` float32, counted in evaluation mode: tokens sent to each cluster.
    """

    parts = 1
    sparse: bool = False
    w1_scale: Tensor
    w2_scale: Tensor
    centroids: Tensor
    activity: Tensor
    routed: Tensor

    def __init__(self, dim: int, hidden_dim: int, sparsity: FeedForwardSparsity, always_dense: bool = False) -> None:
        super().__init__()
        self.always_dense = always_dense
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.sparsity = sparsity
        # Not persistent: `recipes.sparsity.Sparsity` checkpoints them, so that a model's own state dict does not
        # depend on the recipe.
        for name, shape in (
            ("w1_scale", ()),
            ("w2_scale", ()),
            ("centroids", (sparsity.clusters, dim)),
            ("activity", (4,)),
            ("routed", (sparsity.clusters,)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32), persistent=False)

    @property
    def matrices(self) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """W1 and W2, each with the dimension of its neurons."""
        return (self.w1.weight, 0), (self.w2.weight, 1)

    def init_weights(self, init_std: float) -> None:
        """Initialise as torchtitan does its FFN; buffers too, since the model is built on the meta device."""
        trunc_normal_(self.w1.weight, mean=0.0, std=0.02)
        trunc_normal_(self.w2.weight, mean=0.0, std=init_std)
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.sparse:
            return self._sharded_forward(x) if isinstance(x, DTensor) else self._sparse_forward(x)
        active = F.relu(self.w1(x))
        h = active * active  # not square(): CUDA autocast computes powers in float32
        if not self.training:
            self._count(h)
        return self.w2(h)

    def _sharded_forward(self, x: DTensor) -> Tensor:
        """The sparse FFN under tensor parallelism.

        Args:
            x: `[B, S, dim]`, replicated over the ranks.

        Returns:
            This rank's part of the sequences, `[B, S / ranks, dim]`, as the plan's row-wise W2 gives it.
        """
        # Each rank has its own neurons' part of y and, in the backward pass, of the gradient of x.
        y = self._sparse_forward(x.to_local(grad_placements=[Partial()]))
        return DTensor.from_local(y, x.device_mesh, [Partial()]).redistribute(placements=[Shard(1)]).to_local()

    def _sparse_forward(self, x: Tensor) -> Tensor:
        """The FFN of `x [..., dim]` with this rank's neurons."""
        w1, w2 = (_local(linear.weight) for linear in (self.w1, self.w2))
        return self._sparse_tokens(x.flatten(0, -2), w1, w2).view_as(x)

    def _sparse_tokens(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """The FFN of the tokens `x [T, dim]`, sorted by cluster for as long as a block of them shares a pattern."""
        w1_scale = self.w1_scale if 1 in self.sparsity.weight_products else None
        w2_scale = self.w2_scale if 3 in self.sparsity.weight_products else None
        order = None
        if self.sparsity.clusters:
            clusters, order = route_tokens(x, self.centroids)
            if not self.training:
                self.routed.add_(F.one_hot(clusters, self.sparsity.clusters).sum(0))
            if self.sparsity.by_cluster:
                return self._forward_by_cluster(x, w1, w2, clusters)
        if not self.training:
            self._count(hidden_activations(x if order is None else x[order], w1, w1_scale))
        return sparse_feed_forward(x, w1, w2, self.sparsity, w1_scale, w2_scale, order)

    def _forward_by_cluster(self, x: Tensor, w1: Tensor, w2: Tensor, clusters: Tensor) -> Tensor:
        """What h is cut to depends on a token's cluster and the weights alone: causal, and known before product (1)."""
        pattern = self.sparsity.pattern
        assert isinstance(pattern, Pattern)
        centroids = hidden_activations(self.centroids.to(x.dtype), w1).float()
        h = hidden_activations(x, w1)
        mask = pattern.mask(h, centroids[clusters])
        if not self.training:
            self._count(h, mask)
        return torch.where(mask, h, 0) @ w2.T

    def _count(self, h: Tensor, mask: Tensor | None = None) -> None:
        if mask is None and self.sparse and self.sparsity.pattern is not None:
            mask = self.sparsity.pattern.mask(h)
        # Not +=, which also assigns to the module: under activation checkpointing the compiler refuses that.
        self.activity.add_(count_activity(h, mask))


def count_activity(h: Tensor, mask: Tensor | None) -> Tensor:
    """What `FeedForward.activity` counts of h `[T, f]`, of which the mask is kept, or all of it for None."""
    energy = h.float() ** 2
    kept = energy.sum() if mask is None else (energy * mask).sum()
    return torch.stack([(h == h).sum().float(), (h != 0).sum().float(), energy.sum(), kept])


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
