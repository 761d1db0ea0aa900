"""What a recipe does to a model: from its TOML sections to FFNs that are dense or sparse at a step.

At every step `Sparsity.enter` derives the phase and sets the FFNs' flag. At the first step in a sparse phase, and at
every re-clustering, it prepares them: W1's rows are clustered and the neurons put into cluster order, with their
optimizer moments; at the first step also the scales of the 2:4 weights are fitted, once and for the whole phase.

Preparation reads nothing but the weights, the step, the seed and the step's first micro-batches. So a run killed before
the switch prepares at its resume what it would have prepared, and one killed after it finds scales, centroids and the
neurons' order in the checkpoint (the order is the weights' own: a cluster is a run of neighbouring rows of W1 or,
spread, every C-th).

Under tensor parallelism neurons are clustered inside a rank's shard, so that none moves to another rank; every rank has
the centroids of all shards. The run is that of one process whose pattern chooses inside each shard.

Under pipeline parallelism a rank has the FFNs of its stages. Their neurons are clustered by the ranks that have the
same stages, by the tokens of the step's first pipeline micro-batch: what a run without a pipeline, with micro-batches
of that size, would read.
"""

import ast
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
)
from kernels.experts import ExpertByExpert, explain_experts
from kernels.feed_forward import recipe_patterns
from models.experts import Experts
from models.feed_forward import FeedForward
from models.llama import LlamaArgs
from recipes.pipeline import micro_batch_size, micro_batches
from recipes.schedule import Span, span_at

logger = logging.getLogger("sparsetitan")

# Preparing a sparse phase depends on these keys; a checkpoint keeps their values.
PREPARED_BY = (
    "schedule.dense_layers",
    "weights.pattern",
    "router.enable",
    "router.cluster_size",
    "router.cluster_by",
    "router.spread",
)
STATE_VERSION = 2
BUFFERS = ("w1_scale", "w2_scale", "centroids")
MASK_ROWS = 1024  # of a matrix whose mask is watched
SAMPLE = 8192  # tokens by whose activations neurons are clustered
TILE_COLUMNS = 128  # of cuBLAS's products in bf16
EXPERTS_SAMPLE = 16384  # of all experts of a layer, which share a layer's tokens
TOGETHER = 16  # layers that are clustered at once: of the 1b h is 5.3 GiB then


def activation_pattern(activations: Activations) -> Pattern | None:
    """The pattern that the section [activations] describes.

    Raises:
        KeyError: a name that no family knows.
    """
    if activations.pattern == "none":
        return None
    made = recipe_patterns()[activations.pattern]
    return made.make(**{key: getattr(activations, key) for key in made.keys})


def _value_of(config: JobConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _read_table(text: str) -> dict[str, Any]:
    """What a checkpoint's FFNs are prepared for.

    Args:
        text: a JSON table with its version; the first version, up to commit c93bbb7, wrote "START DENSE_LAYERS" and the
            sections as Python shows dataclasses: "Weights(pattern='2:4', ...) Activations(...) Router(...)".

    Raises:
        ConfigError: a later version.
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
        return table
    start, dense_layers, sections = text.split(" ", 2)
    values: dict[str, Any] = {"schedule.dense_layers": int(dense_layers)}
    for name, arguments in re.findall(r"(\w+)\((.*?)\)", sections):
        call = ast.parse(f"{name}({arguments})", mode="eval").body
        assert isinstance(call, ast.Call)
        values |= {f"{name.lower()}.{each.arg}": ast.literal_eval(each.value) for each in call.keywords}
    return {"start": int(start)} | {key: values[key] for key in PREPARED_BY}


def _apart(clusters: int) -> Tensor:
    """An order of clusters, which are numbered by likeness, in which neighbours are far from one another."""
    golden = round(clusters * (math.sqrt(5) - 1) / 2)
    step = next(step for step in range(golden, 2 * clusters + 2) if math.gcd(step, clusters) == 1)
    return torch.arange(clusters) * step % clusters


def feed_forward_sparsity(config: JobConfig, hidden_dim: int) -> FeedForwardSparsity:
    """What the recipe's sparse phases do to an FFN of width `hidden_dim`."""
    return FeedForwardSparsity(
        pattern=activation_pattern(config.activations),
        weight_products=tuple(config.weights.products) if config.weights.pattern == "2:4" else (),
        cut_along_tokens=config.activations.cut_along_tokens,
        clusters=hidden_dim // config.router.cluster_size if config.router.enable else 0,
        fp8=config.precision.ffn == "fp8",
    )


def computes_in(config: JobConfig, shards: bool) -> str:
    """The dtype of products: tensor or pipeline parallelism alone has neither FSDP's mixed precision nor autocast.

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
    """What computes the FFNs in sparse phases, and why; None where there is no sparse phase.

    Args:
        args: of the model, with its sparsity.
        spans: the run's phases.
        device, dtype, here: as in `kernels.choose`; FSDP and, on one GPU, autocast compute in the dtype.
        tensor_parallel: ranks that share a layer.
    """
    if all(span.mode == "dense" for span in spans):
        return None, "no sparse phase"
    if args.num_experts:
        return explain_experts(args.sparsity, expert_shape(args), device, dtype, here)
    return explain(args.sparsity, Shape(args.dim, args.hidden_dim // tensor_parallel), device, dtype, here)


def expert_shape(args: LlamaArgs, tokens: int = 0, expert_parallel: int = 1) -> Shape:
    """The shape of a rank's experts in a layer, for `tokens` of a micro-batch; so many ranks share the experts."""
    return Shape(args.dim, args.hidden_dim, tokens * args.top_k, args.num_experts // expert_parallel)


def describe_experts(config: JobConfig, args: LlamaArgs, family: Family | None) -> tuple[str, str]:
    """What the experts of a layer get of a micro-batch and execute in a sparse phase, for a person to read.

    Args:
        args: of the model, with its sparsity.
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
    pattern = args.sparsity.pattern
    assert isinstance(pattern, Pattern)
    share = family.cost(args.sparsity, expert_shape(args, tokens, ranks)).executed_share
    kept = round(pattern.density(args.hidden_dim) * args.hidden_dim)
    said += f", {each / pattern.v:.1f} blocks of {pattern.v}; a block keeps {kept:,} of {args.hidden_dim:,} neurons"
    if isinstance(family, ExpertByExpert) and family.inner is MASKED:
        return said, ""  # which is no faster for any experts
    said += f"; {share:.0%} of the dense experts' FLOPs, with the rows that fill up last blocks"
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
    """FLOPs a token, forward and backward, of the dense FFNs in the layers that a sparse phase makes sparse."""
    ffn = 0 if args.swiglu else 6 * (args.n_layers - args.dense_layers) * 2 * args.dim * args.hidden_dim
    return ffn * (args.top_k if args.num_experts else 1)


def flops_per_token(
    dense: float,
    args: LlamaArgs,
    family: Family | None,
    tensor_parallel: int = 1,
    tokens: int = 0,
    expert_parallel: int = 1,
) -> dict[str, float]:
    """FLOPs a token, forward and backward: dense; without what the pattern drops; and what the family executes.

    Args:
        dense: those of a dense step.
        args: of the model, with its sparsity.
        family: that computes sparse FFNs; None: there is no sparse phase.
        tensor_parallel: ranks that share a layer.
        tokens: of a micro-batch, for experts, which fill up blocks; 0: without the rows that fill up.
        expert_parallel: ranks that share a layer's experts.
    """
    ffn = sparse_layers_flops(args)
    shape = Shape(args.dim, args.hidden_dim // tensor_parallel)
    if args.num_experts:
        shape = expert_shape(args, tokens, expert_parallel)
    executed = 1.0 if family is None else family.cost(args.sparsity, shape).executed_share
    return {
        "dense": dense,
        "sparse_pattern": dense - ffn * (1 - args.sparsity.flops_share(shape.hidden_dim)),
        "sparse_executed": dense - ffn * (1 - executed),
    }


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _reorder(tensor: Tensor, order: Tensor, dim: int) -> None:
    """Put the entries of a tensor, sharded or not, along `dim` into another order, in place.

    Of a tensor of all experts, `[E, f, d]`, the order is that of all their neurons, in which none leaves its expert.
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
    """The sparse state of a model's FFNs, and the one place that changes it.

    Args:
        config: the job.
        feed_forwards: the FFNs of this rank in order of depth, by name; none in a model that has no sparse mode.
        optimizers: those that hold the FFNs' moments.
        spans: the run's phases.
        depth: FFNs of the whole model; None: this rank has them all.
        peers: the ranks that have the same FFNs; None: all.
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
        self.phase = "dense"
        # What the FFNs are prepared for, see `_wanted`; empty: nothing. A resumed run may have another recipe.
        self.prepared: dict[str, Any] = {}
        self._by_position = False

    def _wanted(self, span: Span) -> dict[str, Any]:
        """What `prepared` is in a sparse phase: the phase, by its start, and the keys that preparation depends on."""
        return {"start": span.start} | {key: _value_of(self.config, key) for key in PREPARED_BY}

    def prepares(self, step: int) -> bool:
        """Whether entering this step clusters neurons or fits scales, which takes as long as some steps."""
        span, every = span_at(self.spans, step), self.config.router.recluster_every
        again = bool(every) and (step - span.start - 1) % every == 0
        return span.mode == "sparse" and (again or self.prepared != self._wanted(span))

    def enter(self, step: int, forward: Callable[[], Any] | None = None) -> bool:
        """Put the FFNs into the mode of this step.

        Args:
            step: from 1.
            forward: runs the model on the step's tokens; called where the neurons are clustered by activations.

        Returns:
            whether the phase differs from that of the step before.
        """
        span = span_at(self.spans, step)
        if self.prepares(step):
            wanted = self._wanted(span)
            if self.prepared.get("start") == span.start and self.prepared != wanted:
                logger.info(f"step {step}: the recipe is not the one that this phase began with; prepared anew")
            self._prepare(step, self.prepared != wanted, forward)
            self.prepared = wanted
        changed, self.phase = span.mode != self.phase, span.mode
        self._run(span.mode == "sparse")
        return changed

    def _run(self, sparse: bool) -> None:
        for feed_forward in self.feed_forwards:
            feed_forward.sparse = sparse and not feed_forward.always_dense

    def run_as(self, mode: FeedForwardSparsity | None) -> None:
        """Run the FFNs as inference may: densely, for None, or with a sparsity that need not be the recipe's.

        Raises:
            ValueError: the mode has a router or 2:4 weights, and nothing has been prepared for them.
        """
        if mode is not None and (mode.clusters or mode.weight_products) and not self.prepared:
            raise ValueError("the FFNs are not prepared for a sparse mode: enter one first")
        self.phase = "dense" if mode is None else "sparse"
        for feed_forward in self.feed_forwards:
            feed_forward.sparsity = mode or feed_forward.sparsity
        self._run(mode is not None)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the FFNs densely, as inference does, whatever the phase."""
        self._run(False)
        try:
            yield
        finally:
            self._run(self.phase == "sparse")

    @torch.no_grad()
    def _prepare(self, step: int, first: bool, forward: Callable[[], Any] | None) -> None:
        if self.config.router.enable:
            self._cluster(step, self._inputs(forward) if self.config.router.cluster_by == "activations" else [])
        for feed_forward in self.feed_forwards:
            if isinstance(feed_forward, Experts) or feed_forward.always_dense:
                continue
            if first and self.config.weights.pattern == "2:4":
                # Rounded here, since some products multiply by beta in bf16 and some in float32.
                feed_forward.w1_scale.copy_(soft_threshold_scale(_full(feed_forward.w1.weight)).bfloat16())
                feed_forward.w2_scale.copy_(soft_threshold_scale(_full(feed_forward.w2.weight).T).bfloat16())

    def _inputs(self, forward: Callable[[], Any] | None) -> list[Tensor]:
        """What each FFN reads while `forward` runs the model densely: `[T, d]` float32, SAMPLE tokens of all ranks'.

        A pipeline runs a stage on several micro-batches, of which the first is read. Of a layer of experts
        `[E, T, d]`, EXPERTS_SAMPLE tokens in all, and of each expert at least one a rank.
        """
        if forward is None:
            raise ValueError("neurons are clustered by activations: give the step's forward pass")
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
            # The hooks are for this once: not to be compiled, nor missed by what has been.
            with torch.compiler.set_stance("force_eager"), self.dense():
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        inputs = []
        for feed_forward, of_calls in samples.items():
            # A pipeline that turns to inference first runs its stages once more, to infer shapes.
            x = of_calls[max(0, calls[feed_forward] - self.micro_batches)]
            if ranks > 1:
                parts = [torch.empty_like(x) for _ in range(ranks)]
                dist.all_gather(parts, x, group=self.peers)
                # Neighbouring ranks are a group of tensor parallelism, and read the same tokens.
                own = [torch.cat(parts[rank :: self.expert_ranks], -2) for rank in range(self.expert_ranks)]
                x = torch.cat(own) if isinstance(feed_forward, Experts) else torch.cat(parts[:: self.shards])
            inputs.append(x)
        return inputs

    def _cluster(self, step: int, inputs: Sequence[Tensor]) -> None:
        """Cluster the neurons of every layer that is to be sparse, by its inputs or, without, by its weights.

        Under tensor parallelism every shard of a layer is clustered by itself, and so is every expert of one. Ranks
        take these parts in turn.
        """
        ranks, rank = self._ranks()
        layers = [(index, each) for index, each in enumerate(self.feed_forwards) if not each.always_dense]
        # All of them are gathered first: a rank that still clusters a layer would hold up the gathering of the next.
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
            for part, centroids in enumerate(feed_forward.centroids.chunk(parts)):
                order = torch.empty(neurons, dtype=torch.int64, device=device)
                order, own = found.get((index, part), (order, centroids))
                if ranks > 1:
                    source = (turn * parts + part) % ranks
                    dist.broadcast(order, group=self.peers, group_src=source)
                    dist.broadcast(own, group=self.peers, group_src=source)
                centroids.copy_(own)
                orders.append(order + part * neurons)
            order = torch.cat(orders)
            for weight, dim in feed_forward.matrices:
                _reorder(weight, order, dim)
                for moment in self._moments(weight):
                    _reorder(moment, order, dim)

    def _clusters(
        self, inputs: Sequence[Tensor], weights: dict[tuple[int, int], Tensor], step: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The neurons of each part of a layer in the order that the pattern wants, and the centroids of its clusters.

        Args:
            inputs: of the layers, `[T, d]` or by expert `[E, T, d]`; empty: neurons are clustered by their weights.
            weights: rows of W1 `[f / parts, d]`, by layer and part, a shard or an expert.
            step: from 1.
        """
        size = self.config.router.cluster_size
        seed = (self.config.debug.seed or 0) * 1_000_003 + step * 1_009
        seeds = [(seed + self.layers[index]) % 2**31 for index, _ in weights]
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

    def _moments(self, weight: Tensor) -> list[Tensor]:
        """The optimizer's tensors that belong to a weight entry by entry."""
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
        """Let `state_dict` have the keys of a checkpoint: the first version named layers by their position.

        Args:
            table: the checkpoint's "prepared".

        Returns:
            Whether the checkpoint has state that fits this recipe: something is prepared, for as many clusters.
        """
        self._by_position = bool(table) and not table.startswith("{")
        found = _read_table(table)
        keys = ("router.enable", "router.cluster_size")
        return bool(found) and all(found[key] == _value_of(self.config, key) for key in keys)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave.

        Raises:
            ConfigError: state of a later version than this one.
        """
        self.prepared = _read_table(state_dict["prepared"])
        for index, name, feed_forward in zip(self.layers, self.names, self.feed_forwards, strict=True):
            for buffer_name in BUFFERS:
                value = state_dict.get(f"{name}.{buffer_name}", state_dict.get(f"{index}.{buffer_name}"))
                if value is not None:
                    feed_forward.get_buffer(buffer_name).copy_(value)
        self._by_position = False

    def reset_health(self) -> None:
        """Forget what the FFNs have counted so far in evaluation mode."""
        for feed_forward in self.feed_forwards:
            feed_forward.activity.zero_()
            feed_forward.routed.zero_()

    def health(self) -> dict[str, float]:
        """What the FFNs counted since `reset_health`, over all ranks, by layer and in all.

        nonzero_share: non-zero entries of h before the cut. energy_kept: share of the sum of h^2 that the pattern
        keeps. router_balance: entropy of the tokens' clusters over that of a uniform choice, 1 when all clusters get
        equally many; the clusters of a layer's experts count as one set. The aggregates are over all layers' entries
        and energies; router_balance is the mean over layers. What tells of the pattern leaves out layers that are
        always dense.
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
        """Which weights of W1 and W2 the 2:4 pattern keeps now, by layer; of a sharded weight this rank's part.

        A large matrix is sampled, every k-th row: all of them held a step up by 25 ms (groups_eighth_2of4 in
        docs/training/1b, which was traced so).
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
        """Share of the mask's entries that changed since `before`, by layer and in all (Hu et al., NeurIPS 2024)."""
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
        """What all ranks counted, `[depth, n]` float64, from the rows `[n]` of this rank's layers."""
        own = torch.stack(list(rows)).double()
        counts = own.new_zeros(self.depth, own.shape[1])
        counts[self.layers] = own
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        return counts

    def _ranks(self) -> tuple[int, int]:
        """How many ranks have the FFNs of this one, and its number among them."""
        return (dist.get_world_size(self.peers), dist.get_rank(self.peers)) if dist.is_initialized() else (1, 0)


def _holds_whole_groups(weight: Tensor) -> bool:
    """Whether every rank's rows of W2 are whole groups of four: the same answer on all ranks, as gathering needs it."""
    if not isinstance(weight, DTensor):
        return True
    sizes = zip(weight.device_mesh.shape, weight.placements, strict=True)
    # Under tensor parallelism the columns are sharded as well.
    shards = math.prod(size for size, placement in sizes if placement.is_shard(0))
    return -(-weight.shape[0] // shards) % 4 == 0


def _groups_of_four(feed_forward: FeedForward) -> Iterator[Tensor]:
    """
    W1 and W2^T, both with d last, the dimension in which they are 2:4; local shards where these hold whole groups.
    """
    for weight, transposed in ((feed_forward.w1.weight.detach(), False), (feed_forward.w2.weight.detach(), True)):
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if transposed and not _holds_whole_groups(weight):
            local = _full(weight)
        yield local.T if transposed else local


def _by_layer(series: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """{name: (numerators, denominators)} a layer to the shares in all and by layer, of layers that have any."""
    shares = {}
    for name, (numerator, denominator) in series.items():
        shares[name] = float(numerator.sum() / denominator.sum())
        for index, share in enumerate((numerator / denominator).tolist()):
            if denominator[index]:
                shares[f"layers/{index}/{name}"] = share
    return shares
