"""Estimate the cost of a job before it runs: parameters, memory of a GPU, FLOPs, time. Needs no GPU and no data.

    python -m scripts.estimate --config configs/1b.toml --gpus 8
    python -m scripts.estimate --config configs/7b_slice.toml --recipe recipes/groups_quarter.toml --mfu 0.59

All other keys are those of train.py. `--gpus` defaults to the product of the degrees of parallelism, `--peak-tflops` to
the peak of an H100. The model is built on the meta device, so nothing is allocated.

**Memory.** The peak of a step is either at the start of its backward pass, with the activations of all layers, the
logits and their gradient, or at its end, with all gradients and the activations of one layer. With
training.loss_chunk_tokens the logits are those of a chunk, beside the head's gradient in float32. The activations are
those that a compiled block keeps, as its graph shows. Without FSDP the residual stream is float32, unless
training.bf16_residual is set, and every matrix has a copy in bf16; with FSDP both are bf16, and the current layer and
the next are gathered. In a sparse phase h is stored as the family stores it: compact for column groups and Venom,
packed for 2:4, otherwise dense; y1 is not stored.

Tensor parallelism shards the activations, between blocks along the sequence. What the ranks gather before attention,
the FFN and the head, the backward pass reads whole. Where the logits are sharded over the vocabulary, the loss holds
two float32 numbers for each of them at its peak, and keeps one, whether or not it is compiled. Parameters in bf16
(training.dtype) have moments in bf16.

Measured on an H100 (batch of 4 x 4096 tokens, vocabulary 32768, no activation checkpointing, compiled, one GPU), see
docs/training and tests/test_estimate.py:

    7b-slice, dense            32.5 GiB reserved     estimated 31.0, 4% less
    1b, dense                  36.1 GiB of tensors   estimated 36.0
    1b, groups_quarter         25.6 GiB of tensors   estimated 25.5
    1b, groups_eighth          24.9 GiB of tensors   estimated 24.8
    1b, columns_quarter        27.0 GiB of tensors   estimated 26.8
    1b, columns_eighth         26.3 GiB of tensors   estimated 26.2
    1b, venom_4of16            25.7 GiB of tensors   estimated 25.5
    7b-slice, columns_eighth   25.5 GiB of tensors   estimated 25.4
    7b-slice, a dense step     236 ms                estimated 277 at the default --mfu 0.5, 17% more; 235 at 0.59

and on two, by GPU, of the layers of 7b 24:

    FSDP2, 1b, dense           27.0 GiB of tensors   estimated 27.5
    FSDP2, 1b, columns_eighth  17.2 GiB of tensors   estimated 17.7
    FSDP2, 7b, dense           71.2 GiB of tensors   estimated 72.8
    FSDP2, 7b, ..._eighth_fp8  49.8 GiB of tensors   estimated 52.6
    tensor, 1b, dense          28.9 GiB of tensors   estimated 28.8
    tensor, 1b, columns_eighth 19.1 GiB of tensors   estimated 19.0
    pipeline, 1b, dense        13.8 GiB of tensors   estimated 13.8
    pipeline, 1b, ..._eighth   11.3 GiB of tensors   in the switch; the steps are estimated at 9.3
    context, 1b, dense         29.1 GiB of tensors   estimated 27.5
    context, 1b, ..._eighth    19.3 GiB of tensors   estimated 17.7

Not included: fragmentation of the allocator, NCCL's buffers and CUDA's context (about 1 GiB together), temporary memory
of kernels, and the switch to a sparse phase, which holds h of up to sixteen layers and 8192 tokens in float32 (5.3 GiB
at 1b; clusters of tokens alone need their inputs only) but no gradients. torchao's float8 is estimated like bf16 (of 24
layers 72.8 GiB, measured 56.6), an eager model like a compiled one. Other patterns and checkpointing follow the same
rules; no measurement has been compared with them.

**Time.** FLOPs divided by GPUs x peak x MFU. For a sparse step these are the FLOPs that the family executes, at the
*same* MFU, and in fp8 at twice the peak. This is a lower bound of the time: smaller products run at a lower rate, and
selection and packing take time without FLOPs. If the FFN benchmark (docs/kernels) has measured this recipe at this
shape, a second time uses the measured speed of the FFN. MFU does not count recomputation, so give a lower value with
activation checkpointing. Start-up, validation, checkpoints and exposed communication are not included.

**Pipeline.** Memory is that of the GPU that holds most: a schedule keeps the activations of several micro-batches, most
in the first stage. With FSDP a stage stays gathered, and its gradients whole, through all micro-batches of a local
batch. The time includes the pipeline's bubble, as if all stages took equally long. With context parallelism a GPU has
its share of a sequence's tokens; what ring attention keeps beside them, 2 GiB at 1b by the runs above, is left out.
Pipelines with FSDP have not been measured.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass

import torch

from configs.errors import ConfigError, run_program
from configs.loader import load_config
from configs.repository import ROOT
from configs.schema import JobConfig
from configs.titan import TORCH_DTYPE_MAP
from kernels import MASKED, Cost, Family, Shape
from kernels.experts import ExpertByExpert
from models.llama import Llama, LlamaArgs
from recipes.check import check_keys
from recipes.data import data_parallel_ranks, num_rows
from recipes.pipeline import filled, in_flight, micro_batch_size, micro_batches, stages
from recipes.schedule import Span
from recipes.sparsity import (
    computes_in,
    describe_experts,
    expert_shape,
    flops_per_token,
    phase_sparsity,
    sparse_family,
    sparse_layers_flops,
)
from recipes.tokenizer import expected_vocabulary
from scripts.benchmark_kernels import CONTENDERS
from scripts.options import TERMS, Parser

GIB = 2**30
MODES = "none", "selective", "full"
FP8_SPEED = 2  # peak of a GPU's fp8 tensor cores relative to bf16


@dataclass(frozen=True)
class Layout:
    """How a job lies on its GPUs.

    Attributes:
        gpus: all of them. shard, tensor: GPUs that share the parameters of one copy (FSDP), and a layer (TP).
        context: those of the former that share a sequence.
        pipeline: groups of GPUs that have different layers.
        tokens: of a micro-batch on one GPU. accumulates: micro-batches of a step, on one GPU.
        compute: bytes of a number that products read; stream: of one between blocks; state: of a parameter.
    """

    gpus: int
    shard: int
    tensor: int
    context: int
    pipeline: int
    tokens: int
    accumulates: int
    compute: int
    stream: int
    state: int

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.accumulates * self.gpus // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class Part:
    """What of a model a GPU of a pipeline has; without a pipeline all of it.

    Attributes:
        layers: their numbers. embeds, heads: whether it has the embedding, and the head with the loss.
        in_flight: micro-batches whose activations it keeps at most.
    """

    layers: list[int]
    embeds: bool = True
    heads: bool = True
    in_flight: float = 1


def parts_of(config: JobConfig, n_layers: int) -> list[Part]:
    """The parts that the ranks of a pipeline have, in their order."""
    degree = config.parallelism.pipeline_parallel_degree
    if degree == 1:
        return [Part(list(range(n_layers)))]
    parts = []
    for rank in range(degree):
        names = [name for stage in stages(config, n_layers)[rank::degree] for name in stage]
        layers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
        flight = in_flight(config, n_layers, rank)
        parts.append(Part(layers, "tok_embeddings" in names, "output" in names, flight))
    return parts


def layout(config: JobConfig, gpus: int, sparse: bool = False) -> Layout:
    """How a checked job lies on so many GPUs, in dense or in sparse phases, whose micro-batches may differ."""
    parallelism, training = config.parallelism, config.training
    tensor = parallelism.tensor_parallel_degree
    pipeline = parallelism.pipeline_parallel_degree
    context = parallelism.context_parallel_degree
    data = data_parallel_ranks(config, gpus)
    shard = context * data // parallelism.data_parallel_replicate_degree
    micro = micro_batch_size(config, sparse)
    state = TORCH_DTYPE_MAP[training.dtype].itemsize
    compute = TORCH_DTYPE_MAP[computes_in(config, shard > 1)].itemsize
    return Layout(
        gpus=gpus,
        shard=shard,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        tokens=micro * training.seq_len // context,
        accumulates=num_rows(config, data) // (micro * data),
        compute=compute,
        stream=compute if shard > 1 or training.bf16_residual else state,
        state=state,
    )


def memory(config: JobConfig, model: Llama, on: Layout, mode: str, family: Family | None) -> dict[str, float]:
    """Bytes that a GPU holds at the peak of a step; of a pipeline the one that holds most.

    Args:
        config: a checked job.
        model: on the meta device.
        on: how the job lies on GPUs.
        mode: of activation checkpointing, instead of the job's own.
        family: that computes the FFNs of a sparse step; None: a dense step.

    Returns:
        its parts, and their `peak`, less than their sum: gradients come as activations go.
    """
    parts = parts_of(config, model.model_args.n_layers)
    return max((_memory_of(part, config, model, on, mode, family) for part in parts), key=lambda held: held["peak"])


def rounded_weights(config: JobConfig, model: Llama, on: Layout) -> float:
    """Bytes that a step keeps for its backward pass because of precision.qat, at most; of a GPU.

    torchao's fake quantisation keeps two numbers of the products' dtype for each weight of a block's linear layers.
    They are activations, so FSDP2 does not shard them.
    """
    (layer, *_) = model.layers.values()
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
    parts = parts_of(config, model.model_args.n_layers)
    return 2 * on.compute * weights * max(part.in_flight * len(part.layers) for part in parts)


def _memory_of(
    part: Part, config: JobConfig, model: Llama, on: Layout, mode: str, family: Family | None
) -> dict[str, float]:
    args, tokens, (layer, *_) = model.model_args, on.tokens, model.layers.values()
    width, d, layers = on.compute, args.dim, len(part.layers)
    kv = d // args.n_heads * (args.n_kv_heads or args.n_heads)
    # Rows that the FFN, or the experts, of a layer multiply.
    rows = tokens * args.top_k if args.num_experts else tokens
    hidden = args.hidden_dim if args.num_experts else layer.feed_forward.w1.out_features
    count = sum(parameter.numel() for parameter in layer.parameters())
    experts = config.parallelism.expert_parallel_degree
    head = args.vocab_size * d
    parameters = layers * count + (head if part.embeds else 0) + (head + d if part.heads else 0)
    states = 0 if config.training.enable_cpu_offload else on.state * parameters / (on.shard * on.tensor)
    # torch's AdamW keeps them in the parameters' dtype.
    moments = 2 * states * min(TORCH_DTYPE_MAP[config.optimizer.moments].itemsize / on.state, 1)
    fsdp = on.shard > 1

    attention = tokens * (on.stream * d + width * (5 * d + 2 * kv) + 4 * args.n_heads)
    if args.num_experts:
        # Sorted by expert on the way in, and to be weighed by the router's scores on the way out.
        attention += rows * d * 2 * width
        attention += 2 * width * tokens * hidden if args.shared_expert else 0
    # `attention` has both norms' outputs; what other ranks have of them is gathered for wq, wk, wv and for W1.
    gathered_inputs = 2 * tokens * width * d * (1 - 1 / on.tensor)
    copies = 0 if fsdp or width == on.state else width * count
    by_operator = mode == "selective" and config.activation_checkpoint.selective_ac_option == "op"
    every = 1.0
    if mode == "selective" and not by_operator:
        every = layers // int(config.activation_checkpoint.selective_ac_option) / layers
    if mode == "memory_budget":
        every = 1 - config.activation_checkpoint.memory_budget
    every = 0.0 if mode == "none" else every

    def of_a_layer(family: Family | None) -> tuple[float, float, float]:
        """Bytes that it keeps of attention and norms, and of the FFN; that its backward pass works in."""
        if family is None:
            whole = 3.0 if args.swiglu else 2.0  # y1, y3 and their product; y1 and h
            cost = Cost(kept_h=whole)
        else:
            shape = expert_shape(args, tokens, experts) if args.num_experts else Shape(d, hidden, tokens)
            cost = family.cost(args.sparsity, shape)
        own = args.num_experts // experts if args.num_experts else 1  # FFNs of a rank
        ffn = width * hidden * (rows * cost.kept_h + own * d * cost.kept_weights)
        work = rows * width * hidden * 2 * cost.gradients
        work += width * d * hidden * cost.copied_rows  # or as many rows of a gradient
        # The gradient of x; between ranks of tensor parallelism that of y, gathered, and this rank's part of that of x.
        whole = rows * d * (on.stream if on.tensor == 1 else 2 * width)
        recomputed = tokens * on.stream * d
        if by_operator:
            # Every second product of two dimensions, and attention. A sparse FFN's first one is the router's scores.
            recomputed += tokens * (width * (2 * d + kv) + 4 * args.n_heads)
            if args.num_experts:
                recomputed += tokens * width * args.num_experts  # the router's scores; grouped products are not of two
            elif family is None:
                recomputed += tokens * width * hidden
            elif args.sparsity.clusters:
                recomputed += tokens * width * args.sparsity.clusters
            elif 1 not in args.sparsity.weight_products:
                recomputed += tokens * width * hidden * cost.chosen_by
        block = attention + ffn + copies
        kept = (1 - every) * attention + every * min(recomputed, block)
        working = work + (block if every else 0.0)
        return (
            kept / on.tensor + (1 - every) * gathered_inputs,
            (1 - every) * ffn / on.tensor,
            working / on.tensor + whole + (gathered_inputs if every else 0.0),
        )

    dense_layers = sum(number < args.dense_layers for number in part.layers) if family else 0
    first, last = of_a_layer(None if dense_layers else family), of_a_layer(family)
    kept_attention, kept_ffn = (
        part.in_flight * (dense_layers * first[i] + (layers - dense_layers) * last[i]) for i in (0, 1)
    )
    kept_copies = layers * (1 - every) * copies / on.tensor

    loss_compiled = config.compile.enable and "loss" in config.compile.components
    chunk = config.training.loss_chunk_tokens
    if chunk:  # the chunk's logits and gradient, and the head's gradient in float32
        rows_at_once = min(chunk, tokens)
        logits = rows_at_once * args.vocab_size * (2 * width + (0 if loss_compiled else 3 * 4)) + 4 * head
    elif on.tensor > 1 and not config.parallelism.disable_loss_parallel:
        logits = tokens * args.vocab_size * (width + 2 * 4) / on.tensor
    else:  # whole on every rank of tensor parallelism
        logits = tokens * args.vocab_size * 2 * (width if loss_compiled else width + 4)
    logits += tokens * d * (on.stream / on.tensor + width)
    logits *= part.in_flight if part.heads else 0
    reduced = 1  # after how many micro-batches
    if fsdp and on.pipeline > 1:
        # PyTorch's stages stay gathered for all micro-batches, and their gradients whole.
        gathered, reduced = (width + 4) * parameters / on.tensor, micro_batches(config)
    elif fsdp:
        never = config.parallelism.fsdp_reshard_after_forward == "never"
        # The layer in work, the next, and the head; the gradients of one before and while they are reduced.
        own = count - 2 * d * hidden * (args.num_experts - args.num_experts // experts)  # without other ranks' experts
        gathered = (width * (own * (layers if never else min(layers, 2)) + head) + (width + 4) * own) / on.tensor
    else:
        gathered = kept_copies + (0 if width == on.state else width * head / on.tensor)
    begins = kept_attention + kept_ffn + max(logits, last[2]) + (states if on.accumulates > reduced else 0)
    ends = states + sum(first)
    # Copies of the matrices go with the layers' activations.
    begins, ends = begins + gathered, ends + (gathered if fsdp else gathered / layers)
    return {
        "parameters": states,
        "gradients": states,
        "optimizer's two moments": moments,
        "gathered layers, head" if fsdp else "matrices in bf16": gathered,
        "activations: attention, norms": kept_attention,
        "activations: h, y1 of the FFN": kept_ffn,
        "logits and loss": logits,
        "backward pass of one layer": max(first[2], last[2]),
        "peak": states + moments + max(begins, ends),
    }


def ffn_reached(args: LlamaArgs) -> tuple[float, str] | None:
    """An FFN's measured speed-up over dense and where it stands, of this recipe at this shape; None: not measured."""
    if args.num_experts:
        return None
    wanted = dataclasses.replace(args.sparsity, clusters=0)
    names = [name for name, (_, sparsity) in CONTENDERS.items() if sparsity == wanted]
    for file in sorted((ROOT / "docs" / "kernels").rglob("kernels.json")):
        for shape in json.loads(file.read_bytes())["shapes"]:
            if (shape["dim"], shape["hidden_dim"]) == (args.dim, args.hidden_dim):
                for name in names:
                    if speedup := shape["contenders"].get(name, {}).get("graph_speedup"):
                        return speedup, f"{name} in {file.relative_to(ROOT)}"
    return None


def estimate(arguments: list[str]) -> str:
    """The report of a command line, for a terminal.

    Raises:
        ConfigError: a job that could not run, on any machine.
    """
    parser = Parser(
        prog="python -m scripts.estimate",
        description=__doc__,
        epilog=TERMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="default: what the degrees of parallelism multiply to")
    parser.add_argument("--mfu", type=float, default=0.5, help="share of the peak in dense steps; default: 0.5")
    parser.add_argument("--peak-tflops", type=float, default=989, help="of a GPU, dense bf16; default: 989, an H100's")
    options, words = parser.parse_known_args(arguments)
    config, _ = load_config(words)
    degrees = config.parallelism
    gpus = options.gpus
    if gpus is None:
        gpus = degrees.data_parallel_replicate_degree * degrees.tensor_parallel_degree
        gpus *= degrees.pipeline_parallel_degree * degrees.context_parallel_degree
        gpus *= max(degrees.data_parallel_shard_degree, 1)
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give 1 or more")
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu:g}: give a share of the peak above 0 and up to 1, such as 0.5")
    if not 0 < options.peak_tflops < float("inf"):
        raise ConfigError(f"--peak-tflops {options.peak_tflops:g}: give the GPU's dense bf16 peak, such as 989")
    args, spans = check_keys(config, gpus)
    args.vocab_size = expected_vocabulary(config)
    on, on_sparse = layout(config, gpus), layout(config, gpus, sparse=True)
    sparse = [span for span in spans if span.mode == "sparse"]
    # The sparse step of the report is that of the phase that keeps most.
    fullest = max(sparse, key=lambda span: span.keep or config.activations.keep, default=spans[0])
    if sparse:
        args.sparsity = phase_sparsity(args.sparsity, config, fullest)
    with torch.device("meta"):
        model = Llama(args)
    dtype = TORCH_DTYPE_MAP[computes_in(config, on.shard > 1)]
    family, reason = sparse_family(args, spans, torch.device("cuda"), dtype, here=False, tensor_parallel=on.tensor)
    parameters, dense = args.get_nparams_and_flops(model, config.training.seq_len)
    experts = config.parallelism.expert_parallel_degree
    flops = {
        span: flops_per_token(dense, config, args, [span], family, on.tensor, on_sparse.tokens, experts)
        for span in spans
    }
    active = parameters - args.inactive_parameters
    mode = config.activation_checkpoint.mode

    lines = [
        f"{config.model.name} {config.model.flavor}, {config.recipe}, {gpus} GPU{'s' if gpus > 1 else ''}: "
        f"{gpus // (on.shard * on.tensor * on.pipeline)} x {on.shard} x {on.tensor} x {on.pipeline} "
        "(replicate x shard x tensor x pipeline)" + f", {on.context} to a sequence" * (on.context > 1),
        f"{parameters / 1e6:,.1f} M parameters, {(parameters - 2 * args.vocab_size * args.dim) / 1e6:,.1f} M without "
        f"embedding and output; vocabulary {args.vocab_size}",
        *(
            [f"{active / 1e6:,.1f} M active parameters, which a token uses; FLOPs are theirs"]
            if args.num_experts
            else []
        ),
        f"{config.training.steps:,} steps of {on.step_tokens:,} tokens: {config.training.steps * on.step_tokens:,}; "
        f"micro-batches of {on.tokens:,}, {on.accumulates} a step"
        + (
            f"; in sparse phases of {on_sparse.tokens:,}, {on_sparse.accumulates} a step"
            if family and on_sparse != on
            else ""
        ),
    ]
    if family is not None:
        lines.append(
            f"sparse phases: {family.name} ({reason if _is_reference(family) else 'on a GPU with its kernels'})"
        )
    if args.num_experts:
        said, slow = describe_experts(config, args, spans, family)
        lines.append(f"experts: {said}")
        if slow:
            lines.append(f"WARNING: sparse experts will not be faster: {slow}")

    columns = [None] if family is None else [None, family]
    layouts = [on, on_sparse]
    parts = [memory(config, model, each, mode, of) for each, of in zip(layouts, columns, strict=False)]
    lines += ["", _row("memory of a GPU, GiB", ["dense step", "sparse step"][: len(columns)])]
    lines += [_row(name, [f"{part[name] / GIB:.2f}" for part in parts]) for name in parts[0]]
    lines += ["", _row("activation checkpointing", ["kept", "peak"] * len(columns))]
    for other in dict.fromkeys((*MODES, mode)):
        cells = []
        for each, of in zip(layouts, columns, strict=False):
            part = memory(config, model, each, other, of)
            kept = sum(value for name, value in part.items() if name.startswith("activations"))
            cells += [f"{kept / GIB:.2f}", f"{part['peak'] / GIB:.2f}"]
        option = config.activation_checkpoint.selective_ac_option
        name = other if other != "selective" else "selective, by op" if option == "op" else f"selective, 1 in {option}"
        lines.append(_row(name + (" (the job's)" if other == mode else ""), cells))

    if config.precision.qat != "none":
        more = f"{rounded_weights(config, model, on) / GIB:.2f} GiB"
        lines += [
            f'precision.qat = "{config.precision.qat}": steps of the last phase keep up to {more} more, rounded '
            "weights that FSDP2",
            "does not shard. Counted, not measured on a GPU; less with activation checkpointing.",
        ]

    ffn = sparse_layers_flops(args)
    # The reference rounds to fp8 and multiplies in another dtype.
    in_fp8 = args.sparsity.fp8 and family is not None and not _is_reference(family)

    def ffn_timed(span: Span) -> float:
        """FLOPs a token in bf16 that take the least time that the FFNs of a phase's sparse layers need."""
        executed = flops[span]["sparse_executed"] - (dense - ffn)
        return executed / FP8_SPEED if in_fp8 and span.mode == "sparse" else executed

    share = filled(config, args.n_layers)
    speed = gpus * options.peak_tflops * 1e12 * options.mfu * share
    lines += ["", _row("phase", ["steps", "dense EFLOP", "executed EFLOP", "ms a step", "hours"])]
    total = [0.0, 0.0, 0.0, 0.0]
    for span in spans:
        steps = span.stop - span.start
        executed = (flops[span][kind] for kind in ("dense", "sparse_executed"))
        values = [steps, *(steps * on.step_tokens * each / 1e18 for each in executed)]
        seconds = on.step_tokens * (dense - ffn + ffn_timed(span)) / speed
        total = [a + b for a, b in zip(total, [*values, steps * seconds], strict=True)]
        lines.append(_phase(f"{span.name} to step {span.stop}", values, 1e3 * seconds, steps * seconds))
    lines.append(_phase("run", total[:3], 1e3 * total[3] / total[0], total[3]))
    lines.append(
        f"at {100 * options.mfu:g}% of {options.peak_tflops:g} TFLOP/s on each GPU; see --help for what it bounds"
    )
    if on.pipeline > 1:
        lines.append(
            f"The pipeline's stages work {100 * share:.0f}% of a step, if all take equally long; layers of a GPU: "
            + ", ".join(str(len(part.layers)) for part in parts_of(config, args.n_layers))
        )
    if family is not None:
        lines += _sparse_note(dense, ffn, ffn_timed(fullest), args, family, on.step_tokens / speed)
    return "\n".join(lines)


def _sparse_note(
    dense: float, ffn: float, ffn_executed: float, args: LlamaArgs, family: Family, seconds_a_flop: float
) -> list[str]:
    """How far to trust a sparse step's time.

    Args:
        dense: FLOPs a token of a dense step.
        ffn: those of the FFNs that a sparse phase makes sparse.
        ffn_executed: FLOPs in bf16 that take the least time that these need in a sparse step.
        args: the model's.
        family: that computes them.
        seconds_a_flop: seconds of a step for each FLOP a token.
    """
    if _is_reference(family):
        return ["Sparse steps run on the reference, which is never faster than dense."]
    fp8 = f", those in fp8 at {FP8_SPEED} times the speed" if args.sparsity.fp8 else ""
    said = [f"Sparse steps: the FLOPs that are executed, at the MFU of dense ones{fp8}. That is a bound."]
    reached = ffn_reached(args)
    if reached is None:
        return [*said, "The FFN benchmark (docs/kernels) has not this recipe at this shape."]
    share, (speedup, where) = ffn_executed / ffn, reached
    seconds = (dense - ffn * (1 - 1 / speedup)) * seconds_a_flop
    return [
        *said,
        f"The FFN reaches {100 * speedup * share:.0f}% of it: {speedup:.2f}x of {1 / share:.2f}x ({where}).",
        f"With the FFN at what it reaches a sparse step takes {1e3 * seconds:,.1f} ms.",
    ]


def _is_reference(family: Family) -> bool:
    return family is MASKED or (isinstance(family, ExpertByExpert) and family.inner is MASKED)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>16}" for cell in cells)


def _phase(name: str, values: list[float], milliseconds: float, seconds: float) -> str:
    steps, *flops = values
    cells = [f"{steps:,.0f}", *(f"{value:,.3g}" for value in flops), f"{milliseconds:,.1f}", f"{seconds / 3600:,.2f}"]
    return _row(name, cells)


if __name__ == "__main__":
    run_program(lambda: print(estimate(sys.argv[1:])))
