"""The sparse state of a model's FFNs, derived at every step from the recipe's TOML sections.

`Sparsity.enter(step)` finds the step's phase and sets the FFNs' mode, dense or sparse. Before the first step of a
sparse phase, and at every re-clustering, it prepares the FFNs:

    router      the rows of W1 are clustered; the neurons, and the optimizer's moments with them, are reordered so that
                a cluster is a run of neighbouring rows or, with router.spread, every C-th row of C clusters. With
                router.token_clusters the inputs of the FFNs are clustered, for the order of the tokens, and neurons
                only if their order matters: not where a block chooses single neurons among all
    2:4         the scales of the soft threshold are fitted, once for the whole phase

Preparation depends only on the weights, the step, the seed and the step's first micro-batches. A run that is killed
before the switch therefore prepares the same state when it resumes. A run that is killed after it finds the scales, the
centroids and, as the order of the weights' rows, the clusters in its checkpoint.

Tensor parallelism: each shard's neurons are clustered separately, so that no neuron moves to another rank. Every rank
holds the centroids of all shards, or those of the tokens. The result is that of one process whose pattern chooses
within each shard.

Pipeline parallelism: a rank has the FFNs of its stages. The ranks that have the same stages cluster them, by the tokens
of the step's first pipeline micro-batch.
"""

import ast
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from statistics import fmean
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from configs.errors import ConfigError
from configs.schema import Activations, JobConfig
from kernels import (
    MASKED,
    Family,
    FeedForwardSparsity,
    Pattern,
    Shape,
    activation_clusters,
    balanced_clusters,
    explain,
    soft_threshold_2_4,
    soft_threshold_scale,
    token_clusters,
)
from kernels.experts import ExpertByExpert, explain_experts
from kernels.feed_forward import recipe_patterns
from models.experts import Experts
from models.feed_forward import FeedForward
from models.llama import LlamaArgs
from recipes.pipeline import micro_batch_size, micro_batches
from recipes.schedule import Kind, Span, span_at

logger = logging.getLogger("sparsetitan")

# Preparing a sparse phase depends on these keys; a checkpoint keeps their values.
PREPARED_BY = (
    "schedule.dense_layers",
    "weights.pattern",
    "router.enable",
    "router.cluster_size",
    "router.cluster_by",
    "router.token_clusters",
    "router.spread",
)
STATE_VERSION = 2
BUFFERS = ("w1_scale", "w2_scale", "centroids")
MASK_ROWS = 1024  # rows of a matrix in which flips of the 2:4 mask are counted
SAMPLE = 8192  # tokens whose activations cluster a layer's neurons
TILE_COLUMNS = 128  # of cuBLAS's products in bf16
EXPERTS_SAMPLE = 16384  # the same for a layer of experts, each of which sees a part of the tokens
TOGETHER = 16  # layers that are clustered at once; their h, for clusters of neurons, takes 5.3 GiB for the 1b model


def activation_pattern(activations: Activations) -> Pattern | None:
    """The pattern of h that the section [activations] describes; None: h is not cut.

    Raises:
        KeyError: no kernel family has a pattern of that name.
    """
    if activations.pattern == "none":
        return None
    made = recipe_patterns()[activations.pattern]
    return made.make(**{key: getattr(activations, key) for key in made.keys})


def _read_table(text: str) -> dict[str, Any]:
    """The values that a checkpoint's FFNs were prepared with: "start" and the keys of `PREPARED_BY`.

    Args:
        text: `Sparsity.state_dict()["prepared"]`, a JSON table with its version. The first version (up to commit
            c93bbb7) is "START DENSE_LAYERS" and the sections as Python prints dataclasses:
            "Weights(pattern='2:4', ...) Activations(...) Router(...)".

    Raises:
        ConfigError: the table has a later version.
    """
    if not text:
        return {}
    if text.startswith("{"):
        table = json.loads(text)
        if table.pop("version") > STATE_VERSION:
            raise ConfigError(
                f"the checkpoint's sparse state is of a later release (its version is above {STATE_VERSION}): "
                "resume it with that release"
            )
    else:
        start, dense_layers, sections = text.split(" ", 2)
        table = {"start": int(start), "schedule.dense_layers": int(dense_layers)}
        for name, arguments in re.findall(r"(\w+)\((.*?)\)", sections):
            call = ast.parse(f"{name}({arguments})", mode="eval").body
            assert isinstance(call, ast.Call)
            table |= {f"{name.lower()}.{each.arg}": ast.literal_eval(each.value) for each in call.keywords}
    table = {"router.token_clusters": 0} | table  # which older checkpoints lack
    return {key: table[key] for key in ("start", *PREPARED_BY)}  # in one order, so that its text is one


def _apart(clusters: int) -> Tensor:
    """A permutation int64 [clusters] in which neighbouring clusters, whose numbers say how alike they are, lie apart.

    It steps through the numbers by the golden ratio, rounded to a step that is coprime to their count.
    """
    golden = round(clusters * (math.sqrt(5) - 1) / 2)
    step = next(step for step in range(golden, 2 * clusters + 2) if math.gcd(step, clusters) == 1)
    return torch.arange(clusters) * step % clusters


def feed_forward_sparsity(config: JobConfig, hidden_dim: int) -> FeedForwardSparsity:
    """The sparsity of an FFN of `hidden_dim` neurons in the recipe's sparse phases."""
    router = config.router
    return FeedForwardSparsity(
        pattern=activation_pattern(config.activations),
        weight_products=tuple(config.weights.products) if config.weights.pattern == "2:4" else (),
        cut_along_tokens=config.activations.cut_along_tokens,
        clusters=(router.token_clusters or hidden_dim // router.cluster_size) if router.enable else 0,
        fp8=config.precision.ffn == "fp8",
    )


def phase_sparsity(sparsity: FeedForwardSparsity, config: JobConfig, span: Span) -> FeedForwardSparsity:
    """The sparsity in a sparse phase: the recipe's, with the share of the groups that the phase keeps."""
    keep = config.activations.keep if span.keep is None else span.keep
    return replace(sparsity, pattern=activation_pattern(replace(config.activations, keep=keep)))


def orders_neurons(config: JobConfig) -> bool:
    """Whether the order of the neurons matters: to windows or groups of neighbours, or to a router by neurons."""
    activations = config.activations
    single = activations.pattern == "groups" and activations.g == 1 and not activations.window
    return not (config.router.token_clusters and single)


def computes_in(config: JobConfig, shards: bool) -> str:
    """The name of the dtype of matrix products.

    It is training.mixed_precision_param, by FSDP's mixed precision or by autocast; tensor or pipeline parallelism
    without FSDP has neither and computes in training.dtype.

    Args:
        config: the job.
        shards: whether FSDP shards the parameters.
    """
    parallelism, training = config.parallelism, config.training
    splits = parallelism.tensor_parallel_degree * parallelism.pipeline_parallel_degree > 1
    return training.dtype if splits and not shards else training.mixed_precision_param


def sparse_family(
    args: LlamaArgs,
    spans: Sequence[Span],
    device: torch.device,
    dtype: torch.dtype,
    here: bool = True,
    tensor_parallel: int = 1,
) -> tuple[Family | None, str]:
    """The kernel family that computes FFNs in sparse phases and the reason for it; no family without a sparse phase.

    Args:
        args: the model's arguments, with its sparsity.
        spans: the run's phases.
        device, dtype, here: as in `kernels.choose`; dtype is that of the products.
        tensor_parallel: number of ranks that share a layer.
    """
    if all(span.mode == "dense" for span in spans):
        return None, "no sparse phase"
    if args.num_experts:
        return explain_experts(args.sparsity, expert_shape(args), device, dtype, here)
    return explain(args.sparsity, Shape(args.dim, args.hidden_dim // tensor_parallel), device, dtype, here)


def expert_shape(args: LlamaArgs, tokens: int = 0, expert_parallel: int = 1) -> Shape:
    """The shape of a rank's experts in one layer.

    Args:
        args: the model's arguments.
        tokens: of a micro-batch on this rank.
        expert_parallel: number of ranks that share a layer's experts.
    """
    return Shape(args.dim, args.hidden_dim, tokens * args.top_k, args.num_experts // expert_parallel)


def describe_experts(
    config: JobConfig, args: LlamaArgs, spans: Sequence[Span], family: Family | None
) -> tuple[str, str]:
    """What the experts of a layer get of a micro-batch and execute in a sparse phase, for a person to read.

    Args:
        config: the job.
        args: of the model, with its sparsity.
        spans: the run's phases.
        family: that computes the sparse experts; None: there is no sparse phase.

    Returns:
        a description; and why sparse experts would not be faster than dense ones, or "".
    """
    ranks = config.parallelism.expert_parallel_degree
    tokens = micro_batch_size(config, sparse=family is not None) * config.training.seq_len
    each = tokens * args.top_k * ranks / args.num_experts
    said = f"{each:,.0f} tokens of a micro-batch for each of {args.num_experts} on average"
    if family is None:
        return said, ""
    sparsities = dict.fromkeys(phase_sparsity(args.sparsity, config, span) for span in spans if span.mode == "sparse")
    shares, keeps = [], []
    for sparsity in sparsities:
        pattern = sparsity.pattern
        assert isinstance(pattern, Pattern)
        shares.append(family.cost(sparsity, expert_shape(args, tokens, ranks)).executed_share)
        keeps.append(round(pattern.density(args.hidden_dim) * args.hidden_dim))
    v = config.activations.v
    said += f", {each / v:.1f} blocks of {v}; a block keeps {' or '.join(f'{kept:,}' for kept in keeps)} of "
    said += f"{args.hidden_dim:,} neurons"
    if isinstance(family, ExpertByExpert) and family.inner is MASKED:
        return said, ""  # which is no faster for any experts
    said += f"; {' or '.join(f'{share:.0%}' for share in shares)} of the dense experts' FLOPs, with the rows that fill"
    said += " up last blocks"
    share, kept = max(shares), min(keeps)
    why = []
    if share >= 1:
        why.append(
            f"they execute {share:.0%} of the FLOPs: raise training.sparse_local_batch_size, or lower activations.v "
            "or model.num_experts"
        )
    if kept < TILE_COLUMNS:
        why.append(
            f"{kept} neurons are fewer than the {TILE_COLUMNS} columns that a GPU's products multiply at once: raise "
            "activations.keep or, with fewer experts, model.hidden_dim"
        )
    return said, "; ".join(why)


def sparse_layers_flops(args: LlamaArgs) -> float:
    """FLOPs per token, forward and backward, that the FFNs of the sparse phases' layers take when they are dense."""
    ffn = 0 if args.swiglu else 6 * (args.n_layers - args.dense_layers) * 2 * args.dim * args.hidden_dim
    return ffn * (args.top_k if args.num_experts else 1)


def flops_per_token(
    dense: float,
    config: JobConfig,
    args: LlamaArgs,
    spans: Sequence[Span],
    family: Family | None,
    tensor_parallel: int = 1,
    tokens: int = 0,
    expert_parallel: int = 1,
) -> dict[str, float]:
    """FLOPs per token, forward and backward.

    Args:
        dense: FLOPs of a dense step per token.
        config: the job.
        args: the model's arguments, with its sparsity.
        spans: phases of the run, all of them or some.
        family: the kernel family of the sparse FFNs; None: there is no sparse phase.
        tensor_parallel: number of ranks that share a layer.
        tokens: of a micro-batch. Experts pad their tokens to whole blocks, which counts; 0: padding does not count.
        expert_parallel: number of ranks that share a layer's experts.

    Returns:
        dense: as given. sparse_pattern: without the products of entries that the pattern drops. sparse_executed: what
        the family's kernels execute. Both are means over the sparse steps of the phases.
    """
    ffn = sparse_layers_flops(args)
    shape = Shape(args.dim, args.hidden_dim // tensor_parallel)
    if args.num_experts:
        shape = expert_shape(args, tokens, expert_parallel)
    sparse = [span for span in spans if span.mode == "sparse"]
    if family is None or not sparse:
        return dict.fromkeys(("dense", "sparse_pattern", "sparse_executed"), dense)
    steps = [span.stop - span.start for span in sparse]
    sparsities = [phase_sparsity(args.sparsity, config, span) for span in sparse]
    pattern = fmean([each.flops_share(shape.hidden_dim) for each in sparsities], steps)
    executed = fmean([family.cost(each, shape).executed_share for each in sparsities], steps)
    return {
        "dense": dense,
        "sparse_pattern": dense - ffn * (1 - pattern),
        "sparse_executed": dense - ffn * (1 - executed),
    }


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _reorder(tensor: Tensor, order: Tensor, dim: int) -> None:
    """Permute a tensor, sharded or not, along `dim` in place.

    Args:
        tensor: a weight or a moment, of experts `[E, f, d]`.
        order: int64, which entry comes first, second, ... For experts it permutes all `E f` neurons, each within its
            expert.
        dim: the dimension of the neurons; ignored for experts.
    """
    whole = _full(tensor)
    if whole.ndim == 3:
        ordered = whole.flatten(0, 1).index_select(0, order).view_as(whole)
    else:
        ordered = whole.index_select(dim, order)
    if isinstance(tensor, DTensor):
        # Every rank holds the whole: each cuts out its own shard, and none has to send any.
        ordered = distribute_tensor(ordered, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(ordered)


class Sparsity(Stateful):
    """The sparse state of a model's FFNs, and the only code that changes it.

    Args:
        config: the job.
        feed_forwards: this rank's FFNs in order of depth, by name; empty for a model without a sparse mode.
        optimizers: the optimizers of the FFNs' weights.
        spans: the run's phases.
        depth: number of FFNs in the whole model; None: this rank has all of them.
        peers: group of the ranks that have the same FFNs; None: all ranks.
    """

    def __init__(
        self,
        config: JobConfig,
        feed_forwards: Mapping[str, FeedForward | Experts],
        optimizers: Sequence[Optimizer],
        spans: Sequence[Span],
        depth: int | None = None,
        peers: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config
        self.names = list(feed_forwards)
        self.feed_forwards = list(feed_forwards.values())
        self.optimizers = optimizers
        self.spans = spans
        self.depth = len(feed_forwards) if depth is None else depth
        self.layers = [int(name.split(".")[1]) for name in feed_forwards]  # their numbers in the whole model
        self.peers = peers
        self.micro_batches = micro_batches(config)
        self.shards = config.parallelism.tensor_parallel_degree
        self.expert_ranks = config.parallelism.expert_parallel_degree  # neighbouring ones share out a layer's experts
        self.kind: Kind = ("dense", None)  # of the step at hand
        # What the FFNs are prepared for, see `_wanted`; empty: nothing. A resumed run may have another recipe.
        self.prepared: dict[str, Any] = {}
        self._by_position = False

    @property
    def phase(self) -> Literal["dense", "sparse"]:
        """The mode of the step at hand."""
        return self.kind[0]

    def _wanted(self, span: Span) -> dict[str, Any]:
        """The value of `prepared` in a sparse phase: the phase's start, and the keys that preparation depends on."""
        return {"start": span.start} | {key: attrgetter(key)(self.config) for key in PREPARED_BY}

    def prepares(self, step: int) -> bool:
        """Whether `enter` clusters or fits scales at this step, which takes as long as several steps."""
        span, every = span_at(self.spans, step), self.config.router.recluster_every
        again = bool(every) and (step - span.start - 1) % every == 0
        return span.mode == "sparse" and (again or self.prepared != self._wanted(span))

    def enter(self, step: int, forward: Callable[[], Any] | None = None) -> bool:
        """Set the FFNs to the mode of a step, after preparing them where that is due.

        Args:
            step: number of the step, from 1.
            forward: runs the model on the step's tokens; called if the inputs of FFNs are needed, by which neurons
                or tokens are clustered.

        Returns:
            Whether the phase is of another kind than at the last call: another mode, or another share that is kept.

        Raises:
            ValueError: `forward` is needed and None.
        """
        span = span_at(self.spans, step)
        if self.prepares(step):
            wanted = self._wanted(span)
            if self.prepared.get("start") == span.start and self.prepared != wanted:
                logger.info(f"step {step}: the recipe is not the one that this phase began with; prepared anew")
            self._prepare(step, self.prepared != wanted, forward)
            self.prepared = wanted
        changed, self.kind = span.kind != self.kind, span.kind
        if changed and span.mode == "sparse" and any(each.keep is not None for each in self.spans):
            for feed_forward in self.feed_forwards:
                feed_forward.sparsity = phase_sparsity(feed_forward.sparsity, self.config, span)
        self._run(span.mode == "sparse")
        return changed

    def _run(self, sparse: bool) -> None:
        for feed_forward in self.feed_forwards:
            feed_forward.sparse = sparse and not feed_forward.always_dense

    def run_as(self, mode: FeedForwardSparsity | None) -> None:
        """Set the FFNs to a mode of inference.

        Args:
            mode: a sparsity, which need not be the recipe's; None: dense.

        Raises:
            ValueError: the mode has a router or 2:4 weights, and the FFNs are not prepared.
        """
        if mode is not None and (mode.clusters or mode.weight_products) and not self.prepared:
            raise ValueError("the FFNs are not prepared for a sparse mode: enter one first")
        self.kind = ("dense" if mode is None else "sparse"), None
        for feed_forward in self.feed_forwards:
            feed_forward.sparsity = mode or feed_forward.sparsity
        self._run(mode is not None)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the FFNs densely inside the context, whatever the phase."""
        self._run(False)
        try:
            yield
        finally:
            self._run(self.phase == "sparse")

    @torch.no_grad()
    def _prepare(self, step: int, first: bool, forward: Callable[[], Any] | None) -> None:
        router = self.config.router
        if router.enable:
            inputs = self._inputs(forward) if router.token_clusters or router.cluster_by == "activations" else []
            if orders_neurons(self.config):
                self._cluster(step, inputs if router.cluster_by == "activations" else [])
            if router.token_clusters:
                self._cluster_tokens(step, inputs)
        for feed_forward in self.feed_forwards:
            if isinstance(feed_forward, Experts) or feed_forward.always_dense:
                continue
            if first and self.config.weights.pattern == "2:4":
                # Rounded here, since some products multiply by beta in bf16 and some in float32.
                feed_forward.w1_scale.copy_(soft_threshold_scale(_full(feed_forward.w1.weight)).bfloat16())
                feed_forward.w2_scale.copy_(soft_threshold_scale(_full(feed_forward.w2.weight).T).bfloat16())

    def _inputs(self, forward: Callable[[], Any] | None) -> list[Tensor]:
        """The inputs of each FFN in a dense forward pass, of a sample of the tokens of all ranks.

        Args:
            forward: runs the model. In a pipeline it runs a stage on several micro-batches; the first one counts.

        Returns:
            For each FFN float32 `[T, d]`, T about SAMPLE; for a layer of experts `[E, T, d]`, EXPERTS_SAMPLE tokens in
            all, and at least one for each expert and rank.

        Raises:
            ValueError: there is no `forward`.
        """
        if forward is None:
            raise ValueError("neurons or tokens are clustered by the inputs of FFNs: give the step's forward pass")
        ranks, _ = self._ranks()
        calls: Counter[nn.Module] = Counter()
        samples: dict[nn.Module, list[Tensor]] = {feed_forward: [] for feed_forward in self.feed_forwards}

        def keep(feed_forward: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            calls[feed_forward] += 1
            if calls[feed_forward] <= 2:
                x = arguments[0]
                replicas = self.shards if isinstance(x, DTensor) else 1
                if isinstance(feed_forward, Experts):
                    tokens = EXPERTS_SAMPLE * self.expert_ranks // (feed_forward.parts * ranks)
                    x = feed_forward.sample_inputs(x, arguments[1], max(1, tokens))  # of many experts on many ranks
                else:
                    x = (x.to_local() if isinstance(x, DTensor) else x).flatten(0, -2)
                    x = x[:: -(-x.shape[0] * ranks // (replicas * SAMPLE))]
                samples[feed_forward].append(x.float().contiguous())

        hooks = [feed_forward.register_forward_pre_hook(keep) for feed_forward in self.feed_forwards]
        try:
            # Eagerly: compiled graphs would not call the hooks, and new graphs would contain them.
            with torch.compiler.set_stance("force_eager"), self.dense():
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        inputs = []
        for feed_forward, of_calls in samples.items():
            # A pipeline's first inference calls its stages once more than it has micro-batches, to infer shapes.
            x = of_calls[max(0, calls[feed_forward] - self.micro_batches)]
            if ranks > 1:
                parts = [torch.empty_like(x) for _ in range(ranks)]
                dist.all_gather(parts, x, group=self.peers)
                # Neighbouring ranks form a tensor-parallel group, whose ranks read the same tokens.
                own = [torch.cat(parts[rank :: self.expert_ranks], -2) for rank in range(self.expert_ranks)]
                x = torch.cat(own) if isinstance(feed_forward, Experts) else torch.cat(parts[:: self.shards])
            inputs.append(x)
        return inputs

    def _cluster(self, step: int, inputs: Sequence[Tensor]) -> None:
        """Cluster and reorder the neurons of all layers that become sparse.

        Shards of tensor parallelism and experts are clustered separately; the ranks take these parts in turn.

        Args:
            step: seeds the clustering.
            inputs: as `_inputs` returns them; empty: neurons are clustered by their rows of W1.
        """
        ranks, rank = self._ranks()
        layers = [(index, each) for index, each in enumerate(self.feed_forwards) if not each.always_dense]
        # All weights are gathered first: gathering is a collective, and would wait for ranks that cluster.
        weights: dict[tuple[int, int], Tensor] = {}
        for turn, (index, feed_forward) in enumerate(layers):
            parts = self.shards * feed_forward.parts
            for part, weight in enumerate(_full(feed_forward.matrices[0][0]).flatten(0, -2).chunk(parts)):
                if (turn * parts + part) % ranks == rank:
                    weights[index, part] = (
                        weight.clone() if parts > 1 and ranks > 1 else weight
                    )  # not all parts' memory
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        while weights:
            some = {key: weights.pop(key) for key in list(weights)[:TOGETHER]}
            found |= zip(some, self._clusters(inputs, some, step), strict=True)
        for turn, (index, feed_forward) in enumerate(layers):
            parts = self.shards * feed_forward.parts
            neurons = math.prod(feed_forward.matrices[0][0].shape[:-1]) // parts
            device, orders = feed_forward.centroids.device, []
            of_parts = [] if self.config.router.token_clusters else feed_forward.centroids.chunk(parts)
            for part in range(parts):
                order = torch.empty(neurons, dtype=torch.int64, device=device)
                source, (order, own) = (turn * parts + part) % ranks, found.get((index, part), (order, None))
                if ranks > 1:
                    dist.broadcast(order, group=self.peers, group_src=source)
                if of_parts:
                    if own is not None:
                        of_parts[part].copy_(own)
                    if ranks > 1:
                        dist.broadcast(of_parts[part], group=self.peers, group_src=source)
                orders.append(order + part * neurons)
            order = torch.cat(orders)
            for weight, dim in feed_forward.matrices:
                _reorder(weight, order, dim)
                for moment in self._moments(weight):
                    _reorder(moment, order, dim)

    def _clusters(
        self, inputs: Sequence[Tensor], weights: dict[tuple[int, int], Tensor], step: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cluster the neurons of some parts of layers.

        Args:
            inputs: of each layer, `[T, d]` or by expert `[E, T, d]`; empty: neurons are clustered by their weights.
            weights: rows of W1 `[f / parts, d]`, by (layer, part), where a part is a shard or an expert.
            step: number of the step, from 1.

        Yields:
            For each part the order of its neurons, int64 `[f / parts]`, and its centroids `[clusters, d]`.
        """
        size = self.config.router.cluster_size
        seeds = [self._seed(step, index) for index, _ in weights]
        weight = torch.stack(list(weights.values()))
        if inputs:
            of_experts = inputs[0].ndim == 3
            x = torch.stack([inputs[layer][part] if of_experts else inputs[layer] for layer, part in weights])
            orders, centroids = activation_clusters(x, weight, size, seed=seeds)
        else:
            orders, centroids = balanced_clusters(weight, size, seed=seeds)
        if self.config.router.spread:
            apart = _apart(centroids.shape[1]).to(orders.device)
            orders = orders.unflatten(1, (-1, size))[:, apart].mT.flatten(1)
        return zip(orders, centroids, strict=True)

    def _cluster_tokens(self, step: int, inputs: Sequence[Tensor]) -> None:
        """Cluster the tokens of all layers that become sparse; the ranks take the layers in turn.

        Args:
            step: seeds the clustering.
            inputs: of each layer, `[T, d]` or by expert `[E, T, d]`.
        """
        ranks, rank = self._ranks()
        layers = [(index, each) for index, each in enumerate(self.feed_forwards) if not each.always_dense]
        own = layers[rank::ranks]
        for first in range(0, len(own), TOGETHER):
            some = own[first : first + TOGETHER]
            x = torch.cat([inputs[index].reshape(each.parts, -1, inputs[index].shape[-1]) for index, each in some])
            seeds = [self._seed(step, index) for index, each in some for _ in range(each.parts)]
            found = token_clusters(x, self.config.router.token_clusters, seed=seeds)
            for (_, each), centroids in zip(some, found.split([each.parts for _, each in some]), strict=True):
                each.centroids.copy_(centroids.flatten(0, 1))
        for turn, (_, each) in enumerate(layers if ranks > 1 else ()):
            dist.broadcast(each.centroids, group=self.peers, group_src=turn % ranks)

    def _seed(self, step: int, index: int) -> int:
        """The seed of the clustering of a layer, by its place among this rank's layers."""
        seed = (self.config.debug.seed or 0) * 1_000_003 + step * 1_009
        return (seed + self.layers[index]) % 2**31

    def _moments(self, weight: Tensor) -> list[Tensor]:
        """The optimizer's tensors that have an entry for each entry of a weight."""
        states = (optimizer.state[weight] for optimizer in self.optimizers if weight in optimizer.state)
        return [
            value
            for state in states
            for value in state.values()
            if isinstance(value, Tensor) and value.shape == weight.shape
        ]

    def state_dict(self) -> dict[str, Any]:
        table = json.dumps({"version": STATE_VERSION, **self.prepared}) if self.prepared else ""
        return {"prepared": table} | {
            f"{index if self._by_position else name}.{buffer_name}": buffer
            for index, name, feed_forward in zip(self.layers, self.names, self.feed_forwards, strict=True)
            for buffer_name in BUFFERS
            if (buffer := feed_forward.get_buffer(buffer_name)).numel()
        }

    def expect(self, table: str) -> bool:
        """Make `state_dict` use a checkpoint's keys, of which the first version named layers by their numbers.

        Args:
            table: the checkpoint's "prepared".

        Returns:
            Whether the checkpoint holds state that fits this recipe: FFNs that are prepared, with as many clusters.

        Raises:
            ConfigError: the state has a later version.
        """
        found = _read_table(table)
        keys = ("router.enable", "router.cluster_size", "router.token_clusters")
        fits = bool(found) and all(found[key] == attrgetter(key)(self.config) for key in keys)
        self._by_position = fits and not table.startswith("{")
        return fits

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ConfigError: the state has a later version.
        """
        self.prepared = _read_table(state_dict["prepared"])
        for index, name, feed_forward in zip(self.layers, self.names, self.feed_forwards, strict=True):
            for buffer_name in BUFFERS:
                value = state_dict.get(f"{name}.{buffer_name}", state_dict.get(f"{index}.{buffer_name}"))
                if value is not None:
                    feed_forward.get_buffer(buffer_name).copy_(value)
        self._by_position = False

    def reset_health(self) -> None:
        """Set the FFNs' counts of evaluation mode, which `health` reads, to zero."""
        for feed_forward in self.feed_forwards:
            feed_forward.activity.zero_()
            feed_forward.routed.zero_()

    def health(self) -> dict[str, float]:
        """Shares from the FFNs' counts since `reset_health`, over all ranks. A collective.

        Returns:
            The shares over all layers by name, and of single layers by "layers/<number>/<name>":
            nonzero_share: share of h's entries that are not zero, before the cut.
            energy_kept: share of the sum of h^2 that the pattern keeps, in sparse phases; always-dense layers are left
            out.
            router_balance: entropy of the tokens' clusters over that of a uniform choice, so 1 if all clusters get
            equally many tokens; the mean over layers. The clusters of a layer's experts count as one set.
        """
        if not self.depth:
            return {}
        activity = self._of_all_layers([feed_forward.activity for feed_forward in self.feed_forwards])
        routed = self._of_all_layers([feed_forward.routed for feed_forward in self.feed_forwards])
        series = {"nonzero_share": (activity[:, 1], activity[:, 0])}
        sparse = self.phase == "sparse"
        if sparse and self.config.activations.pattern != "none":
            cut = self._of_all_layers([each.activity * (not each.always_dense) for each in self.feed_forwards])
            series["energy_kept"] = (cut[:, 3], cut[:, 2])
        if sparse and routed.shape[1] > 1 and routed.any():  # not every way to run the FFNs has a router
            total = routed.sum(1, keepdim=True)
            share = routed / total.clamp(min=1)
            entropy = -torch.xlogy(share, share).sum(1)
            series["router_balance"] = (entropy, torch.where(total[:, 0] > 0, math.log(routed.shape[1]), 0.0))
        return _by_layer(series)

    def weight_masks(self) -> list[list[Tensor]]:
        """The masks of the 2:4 pattern on W1 and W2, bool, by layer; of sharded weights this rank's part.

        Of a large matrix every k-th row is used, about MASK_ROWS in all: masks of all rows took 25 ms a step
        (groups_eighth_2of4 in docs/training/1b).
        """
        return [
            []
            if feed_forward.always_dense or isinstance(feed_forward, Experts)
            else [
                soft_threshold_2_4(local[:: max(1, local.shape[0] // MASK_ROWS)]) != 0
                for local in _groups_of_four(feed_forward)
            ]
            for feed_forward in self.feed_forwards
        ]

    def flip_rate(self, before: list[list[Tensor]]) -> dict[str, float]:
        """Share of the masks' entries that changed, by layer and over all layers (Hu et al., NeurIPS 2024).

        A collective.

        Args:
            before: what `weight_masks` returned.
        """
        device = self.feed_forwards[0].activity.device
        counts = self._of_all_layers(
            [
                torch.tensor(
                    [
                        float(sum((old != new).sum() for old, new in zip(olds, news, strict=True))),
                        float(sum(new.numel() for new in news)),
                    ],
                    device=device,
                    dtype=torch.float64,
                )
                for olds, news in zip(before, self.weight_masks(), strict=True)
            ]
        )
        return _by_layer({"flip_rate": (counts[:, 0], counts[:, 1])})

    def _of_all_layers(self, rows: Sequence[Tensor]) -> Tensor:
        """The sums over all ranks, float64 `[depth, n]`, of rows `[n]` for each of this rank's layers. A collective."""
        own = torch.stack(list(rows)).double()
        counts = own.new_zeros(self.depth, own.shape[1])
        counts[self.layers] = own
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        return counts

    def _ranks(self) -> tuple[int, int]:
        """The number of ranks that have this rank's FFNs, and its own number among them."""
        return (dist.get_world_size(self.peers), dist.get_rank(self.peers)) if dist.is_initialized() else (1, 0)


def _holds_whole_groups(weight: Tensor) -> bool:
    """Whether every rank's shard of W2 has whole groups of four rows. The answer is the same on all ranks."""
    if not isinstance(weight, DTensor):
        return True
    sizes = zip(weight.device_mesh.shape, weight.placements, strict=True)
    # Under tensor parallelism the columns are sharded as well.
    shards = math.prod(size for size, placement in sizes if placement.is_shard(0))
    return -(-weight.shape[0] // shards) % 4 == 0


def _groups_of_four(feed_forward: FeedForward) -> Iterator[Tensor]:
    """W1 `[f, d]` and W2^T `[f, d]`, 2:4 along their last dimension: as local shards, if these hold whole groups."""
    for weight, transposed in ((feed_forward.w1.weight.detach(), False), (feed_forward.w2.weight.detach(), True)):
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if transposed and not _holds_whole_groups(weight):
            local = _full(weight)
        yield local.T if transposed else local


def _by_layer(series: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Shares over all layers and by layer.

    Args:
        series: by name, numerators and denominators `[layers]`.

    Returns:
        Shares by name, and by "layers/<number>/<name>" for layers whose denominator is not zero.
    """
    shares = {}
    for name, (numerator, denominator) in series.items():
        shares[name] = float(numerator.sum() / denominator.sum())
        for index, share in enumerate((numerator / denominator).tolist()):
            if denominator[index]:
                shares[f"layers/{index}/{name}"] = share
    return shares
