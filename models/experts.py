"""A mixture of experts in the place of a block's FFN: torchtitan's router and balancing, squared-ReLU experts.

    scores = sigmoid(x W_router^T)                    [T, E]
    chosen = the top_k experts of largest scores + bias
    y      = sum over the chosen experts of score / (sum of chosen scores) * W2_e relu(W1_e x)^2

The bias keeps the experts equally busy without an auxiliary loss (arXiv 2408.15664): before every optimizer step
torchtitan's hook raises the bias of an expert that got fewer tokens than the mean and lowers that of one that got more.
The bias decides which experts are chosen and is not part of y.

An expert has no gate, so products (2) to (6) of an expert can be sparse as those of any FFN of this project
(`kernels.experts`). The routed experts of a layer are one module with the members that `recipes.sparsity` uses of an
FFN: it clusters the neurons of each expert by themselves, and switches all of them by one flag. A shared expert, which
every token goes to besides, is a dense FFN in every phase.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.titan import MoE, MoEArgs, TransformerBlock, TransformerModelArgs, trunc_normal_
from kernels import FeedForwardSparsity, Pattern, hidden_activations
from kernels.experts import autocast, dense_experts, route_within_experts, sparse_experts, waits_for_counts
from models.attention import Attention
from models.feed_forward import FeedForward, count_activity


class Experts(nn.Module):
    """The routed experts of a layer: rows sorted by expert `[N, dim]` to the same.

    Attributes:
        w1, w2: `[E, hidden_dim, dim]`, W1 and the transposed W2 of each expert.
        always_dense, sparse, sparsity, activity: as of `FeedForward`.
        parts: E, the parts of W1 that are clustered by themselves.
        centroids: `[E * clusters, dim]` float32, of unit length, those of the first expert first.
        routed: `[E * clusters]` float32, counted in evaluation mode: tokens in each cluster of each expert.
        w1_scale, w2_scale: `[0]`: experts have no 2:4 weights.
    """

    sparse: bool = False
    centroids: Tensor
    activity: Tensor
    routed: Tensor

    def __init__(
        self, experts: int, dim: int, hidden_dim: int, sparsity: FeedForwardSparsity, always_dense: bool = False
    ) -> None:
        super().__init__()
        self.parts = self.num_experts = experts
        self._compiled: Callable[..., Tensor] | None = None
        self.always_dense = always_dense
        self.sparsity = sparsity
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        for name, shape in (
            ("w1_scale", (0,)),
            ("w2_scale", (0,)),
            ("centroids", (experts * sparsity.clusters, dim)),
            ("activity", (4,)),
            ("routed", (experts * sparsity.clusters,)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32), persistent=False)

    @property
    def matrices(self) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """W1 and W2, each with the dimension of its neurons, as `FeedForward.matrices`."""
        return (self.w1, 1), (self.w2, 1)

    def keep_buffers_whole(self) -> None:
        """Make plain tensors of the buffers, which expert parallelism replicates as DTensors like those of any module.

        What a rank counts is of its own experts, so they are no replicas.
        """
        for name, buffer in self.named_buffers():
            if isinstance(buffer, DTensor):
                self.register_buffer(name, buffer.to_local(), persistent=False)

    @torch.no_grad()
    def init_weights(self, init_std: float) -> None:
        """Initialise as `FeedForward` does."""
        trunc_normal_(self.w1, mean=0.0, std=0.02)
        trunc_normal_(self.w2, mean=0.0, std=init_std)
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """
        Args:
            x: `[N, dim]`, sorted by expert.
            num_tokens_per_expert: `[E]`, or of the rank's experts; any integral dtype. Rows past their sum give zeros.
        """
        w1, w2 = (each.to_local() if isinstance(each, DTensor) else each for each in (self.w1, self.w2))
        counts, order = num_tokens_per_expert.long(), None
        # Under expert parallelism a rank has some of the experts, and the centroids of all.
        first = self.w1.device_mesh.get_local_rank("ep") * len(counts) if isinstance(self.w1, DTensor) else 0
        if self.sparse and self.sparsity.clusters:
            centroids = self.centroids.unflatten(0, (-1, self.sparsity.clusters))[first : first + len(counts)]
            clusters, order = route_within_experts(x, centroids, counts)
            if not self.training:
                owner = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
                at = (first + owner) * self.sparsity.clusters + clusters[: len(owner)]
                self.routed.add_(torch.bincount(at, minlength=len(self.routed)))
        if not self.training:
            self._count(x, w1, counts, order)
        sparsity = self.sparsity if self.sparse else None
        run = self._compiled if self._compiled and not waits_for_counts(x, w1, sparsity) else _products
        return run(x, w1, w2, counts, sparsity, order)

    def compile_products(self, backend: str) -> None:
        """Compile the experts' products, where the host need not wait for `num_tokens_per_expert`."""
        self._compiled = torch.compile(_products, backend=backend, fullgraph=True)

    def _count(self, x: Tensor, w1: Tensor, counts: Tensor, order: Tensor | None) -> None:
        start, pattern = 0, self.sparsity.pattern if self.sparse else None
        for expert, tokens in enumerate(counts.tolist()):
            rows = slice(start, start + tokens)
            h = hidden_activations(x[rows] if order is None else x[order[rows]], w1[expert].to(x.dtype))
            self.activity.add_(count_activity(h, pattern.mask(h) if isinstance(pattern, Pattern) and tokens else None))
            start += tokens

    def sample_inputs(self, x: Tensor, num_tokens_per_expert: Tensor, tokens: int) -> Tensor:
        """Inputs by whose activations each expert's neurons are clustered.

        Args:
            x, num_tokens_per_expert: as of `forward`.
            tokens: of each expert at most, evenly spaced among those it has.

        Returns:
            `[E, tokens, dim]` float32, of the rank's experts; filled up with zeros, for which no neuron is active.
        """
        counts = num_tokens_per_expert.long()[:, None]
        at = torch.arange(tokens, device=x.device) * counts.clamp(min=tokens) // tokens
        rows = (counts.cumsum(0) - counts + at).clamp(max=x.shape[0] - 1)
        return torch.where((at < counts)[:, :, None], x[rows].float(), 0)


def _products(
    x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, sparsity: FeedForwardSparsity | None, order: Tensor | None
) -> Tensor:
    if sparsity is None:
        return dense_experts(x, w1, w2, counts)
    return sparse_experts(x, w1, w2, counts, sparsity, order)


class _Dispatch(torch.autograd.Function):
    # x[order // top_k], whose gradient is a gather as well: that of indexing adds rows up, which needs a sort on a GPU.
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[order // places.shape[1]]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        return grad[places].sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, scores: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(y, scores, order, places)
        return (y[places] * scores[:, :, None]).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, scores, order, places = ctx.saved_tensors
        dy = grad[order // places.shape[1]] * scores.flatten()[order][:, None]
        return dy.to(y.dtype), (y[places] * grad[:, None]).sum(2), None, None


def dispatch(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Copy every token to its experts.

    Args:
        x: `[T, dim]`.
        order: `[T * top_k]` int64: the copies, numbered token by token, sorted by expert.
        places: `[T, top_k]` int64, where each copy stands among the sorted ones.

    Returns:
        `[T * top_k, dim]`, sorted by expert.
    """
    return _Dispatch.apply(x, order, places)


def combine(y: Tensor, scores: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Add up the experts' results for every token, by its scores.

    Args:
        y: `[T * top_k, dim]`, sorted by expert.
        scores: `[T, top_k]`.
        order, places: as of `dispatch`.

    Returns:
        `[T, dim]`, in the wider dtype of y and the scores.
    """
    return _Combine.apply(y, scores, order, places)


class MixtureOfExperts(MoE):
    """torchtitan's mixture of experts, `[B, S, dim]` to the same, with the experts above.

    Router and balancing are torchtitan's. Its forward pass is not: it copies tokens in float32, and the gradient of
    indexing sorts them once more. What is computed is the same.

    Args:
        args: torchtitan's; its shared experts are SwiGLU, so it must ask for none.
        shared: whether a dense FFN of the experts' width adds to every token.

    Attributes:
        load: `[E]` float32, tokens that each expert got since the trainer set it to zero. torchtitan's count,
            `tokens_per_expert`, goes back to zero when the optimizer's step balances the experts.
    """

    load: Tensor
    experts: Experts  # type: ignore[assignment]

    def __init__(
        self,
        args: MoEArgs,
        dim: int,
        hidden_dim: int,
        sparsity: FeedForwardSparsity,
        always_dense: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__(args, dim, hidden_dim)  # its experts have a gate, and are not kept
        self.experts = Experts(args.num_experts, dim, hidden_dim, sparsity, always_dense)
        if shared:
            self.shared_experts = FeedForward(dim, hidden_dim, FeedForwardSparsity(), always_dense=True)
        self.register_buffer("load", torch.zeros(args.num_experts, dtype=torch.float32), persistent=False)
        self._dispatch, self._combine = dispatch, combine

    def init_weights(self, init_std: float, buffer_device: torch.device) -> None:
        super().init_weights(init_std, buffer_device)
        self.load = torch.zeros_like(self.tokens_per_expert)

    def compile_routing(self, backend: str) -> None:
        """Compile the copies of tokens to experts and back; their sizes do not depend on where tokens go."""
        self._dispatch = torch.compile(dispatch, backend=backend, fullgraph=True)
        self._combine = torch.compile(combine, backend=backend, fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        scores, chosen, counts = self.router(tokens, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
            self.load.add_(counts)
            order = chosen.flatten().argsort(stable=True)
            places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
            places = places.view_as(chosen)
        (read,) = autocast(tokens)
        y = self._combine(self.experts(self._dispatch(read, order, places), counts), scores, order, places)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.to(x.dtype).view_as(x)


class ExpertBlock(TransformerBlock):
    """torchtitan's Llama block with experts for its FFN. torchtitan finds them by `moe_enabled` and `moe`."""

    moe_enabled = True

    def __init__(self, layer: int, args: TransformerModelArgs, moe: MixtureOfExperts) -> None:
        super().__init__(layer, args)
        del self.feed_forward
        self.attention = Attention(args)
        self.moe = moe

    def forward(self, x: Tensor, freqs_cis: Tensor, attention_masks=None, positions=None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, attention_masks, positions)
        return h + self.moe(self.ffn_norm(h))

    def init_weights(self) -> None:
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        self.attention.init_weights(self.weight_init_std)
        self.moe.init_weights(self.weight_init_std, self.moe.tokens_per_expert.device)


def expert_balance(load: Tensor) -> dict[str, float]:
    """How equally busy the experts of each layer are.

    Args:
        load: `[layers, E]`, tokens that each expert got.

    Returns:
        expert_balance: entropy of the tokens' experts over that of a uniform choice, 1 if all get equally many; busiest
        over mean as expert_load_max; both as the mean over layers and by layer.
    """
    share = load.double() / load.double().sum(1, keepdim=True).clamp(min=1)
    series = {
        "expert_balance": -torch.xlogy(share, share).sum(1) / torch.tensor(load.shape[1]).double().log(),
        "expert_load_max": share.amax(1) * load.shape[1],
    }
    row = {}
    for name, values in series.items():
        row[name] = float(values.mean())
        row |= {f"layers/{index}/{name}": value for index, value in enumerate(values.tolist())}
    return row
