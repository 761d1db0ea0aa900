"""What keys mean together: combinations that cannot run are refused here, before any process group or model exists."""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from configs.errors import ConfigError
from configs.schema import Activations, JobConfig, RopeScaling
from configs.titan import RoPEScalingArgs, device_type
from kernels import Groups
from kernels.columns.ffn import LARGE
from kernels.columns.ffn_fp8 import ALIGNED
from kernels.feed_forward import recipe_patterns
from kernels.venom.pattern import COLUMNS
from models.llama import FLAVORS, LlamaArgs, llama_args
from recipes.checkpoint import MANIFEST
from recipes.data import data_parallel_ranks
from recipes.pipeline import check_pipeline, micro_batch_size
from recipes.qat import check_qat
from recipes.schedule import Span, resolve_phases
from recipes.sparsity import activation_pattern, feed_forward_sparsity, orders_neurons

CONVERTERS = ("quantize.linear.float8", "quantize.linear.mx")  # torchtitan's that find something in these models

RING_ATTENTION = {"cuda": ("bfloat16",)}
"""Types of devices on which PyTorch has ring attention, and what it computes in there."""

FOLDERS = (
    *("checkpoint.folder", "metrics.save_tb_folder", "comm.save_traces_folder"),
    *("profiling.save_traces_folder", "profiling.save_memory_snapshot_folder"),
)
OWN_FILES = ("run.json", "metrics.jsonl", "tokenizer", ".lock", "wandb_run")
"""What else a run writes into job.dump_folder."""

UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""The environment variable with which torchrun gives every restart a store of its own."""


def check_config(config: JobConfig, world: int | None = None) -> tuple[LlamaArgs, list[Span]]:
    """Check a configuration as a whole, and settle what one key leaves to another.

    `world` is the number of processes that will run it; by default those that torchrun has started.

    Sets lr_scheduler.decay_ratio where schedule.decay_with_tail asks for it, and training.mixed_precision_param where
    it is "auto": to what the run in job.dump_folder computes in, or to this device's.

    Returns:
        The model's arguments, but for its vocabulary, and the run's phases in steps.

    Raises:
        ConfigError: keys that do not go together, with each other or with the machine.
    """
    if config.training.mixed_precision_param == "auto":
        config.training.mixed_precision_param = _dtype_so_far(config) or device_dtype()[0]
    args, spans = check_keys(config, world or int(os.environ.get("WORLD_SIZE", "1")))
    _check_machine(config)
    return args, spans


def check_keys(config: JobConfig, world: int) -> tuple[LlamaArgs, list[Span]]:
    """`check_config` for a run on `world` GPUs, wherever they are: this machine is not asked, and nothing written.

    training.mixed_precision_param = "auto" becomes bfloat16, which GPUs with kernels for these recipes have.
    """
    if config.training.mixed_precision_param == "auto":
        config.training.mixed_precision_param = "bfloat16"
    spans = resolve_phases(config.schedule.phases, config.training.steps)
    args = model_args(config)
    _check_schedule(config)
    check_pipeline(config, args.n_layers)
    _check_pattern_name(config.activations.pattern)
    _check_phases(config)
    if any(phase.mode == "sparse" for phase in config.schedule.phases):
        _check_sparsity(config, args)
    elif config.precision.ffn == "fp8":
        raise ConfigError(
            f'precision.ffn = "fp8" is for sparse phases, but {config.recipe} has none: use "model", or for dense '
            f'phases model.converters = ["{CONVERTERS[0]}"]'
        )
    if config.precision.qat != "none":
        check_qat(config, args, spans)
    _check_parallelism(config, args, world)
    _check_batch(config, world)
    _check_rest(config)
    return args, spans


def device_dtype() -> tuple[Literal["bfloat16", "float32"], str]:
    """What training.mixed_precision_param = "auto" is on this machine's device, and why."""
    if device_type == "cpu":
        return "float32", "most CPUs have no fast bfloat16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "the GPU computes in it"
    return "float32", "the GPU has no bfloat16"


def _dtype_so_far(config: JobConfig) -> Any:
    """What the run in job.dump_folder computes in; None where none has begun. A damaged run.json is refused later."""
    folder = Path(config.job.dump_folder)
    if not config.checkpoint.enable or not any((folder / config.checkpoint.folder).glob(f"step-*/{MANIFEST}")):
        return None
    return recorded_dtype(folder / "run.json")


def recorded_dtype(about: Path) -> Any:
    """training.mixed_precision_param of a run.json; None where that is missing or damaged."""
    try:
        dtype = json.loads(about.read_bytes())["config"]["training"]["mixed_precision_param"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dtype if dtype in ("bfloat16", "float32") else None


def model_args(config: JobConfig) -> LlamaArgs:
    """The arguments of the model that the section [model] names, but for its vocabulary and its sparsity.

    Raises:
        ConfigError: an unknown flavor, or heads that do not cut the width.
    """
    model = config.model
    if model.flavor not in FLAVORS:
        close = difflib.get_close_matches(model.flavor, FLAVORS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(FLAVORS)}"
        raise ConfigError(f'model.flavor = "{model.flavor}" is unknown: {hint}')
    args = llama_args(
        model.flavor,
        dim=model.dim,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        hidden_dim=model.hidden_dim,
        rope_theta=model.rope_theta,
        rope_scaling_args=_rope_scaling(model.rope_scaling),
        norm_eps=model.norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        num_experts=model.num_experts,
        top_k=model.top_k,
        shared_expert=model.shared_expert,
        load_balance_coeff=model.load_balance_coeff,
        swiglu=model.name == "llama_swiglu",
        max_seq_len=config.training.seq_len,
    )
    kv_heads = args.n_kv_heads or args.n_heads
    if args.dim % args.n_heads or args.dim // args.n_heads % 2:
        raise ConfigError(
            f"model.n_heads = {args.n_heads} does not cut model.dim = {args.dim} into heads of even width: "
            "change one of them"
        )
    if args.n_heads % kv_heads:
        raise ConfigError(
            f"model.n_kv_heads = {kv_heads} does not divide model.n_heads = {args.n_heads}: change one of them"
        )
    _check_experts(config, args)
    return args


def _rope_scaling(scaling: RopeScaling) -> RoPEScalingArgs:
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"model.rope_scaling.high_freq_factor = {scaling.high_freq_factor} is not above low_freq_factor = "
            f"{scaling.low_freq_factor}: give the two of the model's config.json"
        )
    values = dataclasses.asdict(scaling)
    return RoPEScalingArgs(scaling_factor=values.pop("factor"), **values)


def _check_experts(config: JobConfig, args: LlamaArgs) -> None:
    """Refuse experts that the model's name does not stand for, and choices among them that are none."""
    model = config.model
    if model.name != "llama_moe_relu2":
        if args.num_experts:
            raise ConfigError(
                f'model.name = "{model.name}" has no experts, but model.flavor = "{model.flavor}" has '
                f'model.num_experts = {args.num_experts}: set model.name = "llama_moe_relu2", or choose another flavor'
            )
        for name in ("top_k", "shared_expert", "load_balance_coeff"):
            if getattr(model, name) is not None:
                raise ConfigError(
                    f'model.{name} = {json.dumps(getattr(model, name))} is not read by model.name = "{model.name}": '
                    "leave it out"
                )
        return
    if args.num_experts < 2:
        flavors = ", ".join(name for name, each in FLAVORS.items() if each.num_experts)
        raise ConfigError(
            f'model.name = "llama_moe_relu2" needs two experts or more, but model.flavor = "{model.flavor}" has '
            f"model.num_experts = {args.num_experts}: set it, or choose one of {flavors}"
        )
    if not 1 <= args.top_k <= args.num_experts:
        raise ConfigError(
            f"model.top_k = {args.top_k}: a token goes to 1 to model.num_experts = {args.num_experts} experts"
        )


def _check_schedule(config: JobConfig) -> None:
    scheduler, steps = config.lr_scheduler, config.training.steps
    if scheduler.total_steps is not None and scheduler.total_steps < steps:  # torchtitan's rate would fall below 0
        raise ConfigError(
            f"lr_scheduler.total_steps = {scheduler.total_steps} ends the schedule of the learning rate before "
            f"training.steps = {steps}: raise it, or leave it out"
        )
    if config.schedule.decay_with_tail:
        if scheduler.total_steps not in (None, steps):
            raise ConfigError(
                f"lr_scheduler.total_steps = {scheduler.total_steps}, but with schedule.decay_with_tail = true the "
                f"rate decays in the tail, up to training.steps = {steps}: leave it out"
            )
        if len(config.schedule.phases) < 2:
            raise ConfigError("schedule.decay_with_tail = true needs a tail: give schedule.phases two phases or more")
        end = config.schedule.phases[-2].end
        scheduler.decay_ratio = 1 - end if isinstance(end, float) else 1 - end / steps


def _check_sparsity(config: JobConfig, args: LlamaArgs) -> None:
    activations, weights, router = config.activations, config.weights, config.router
    if args.swiglu:
        raise ConfigError(
            f'model.name = "{config.model.name}" has no sparse mode, but {config.recipe} has a sparse phase: '
            "use --recipe recipes/dense.toml, or model.name = llama_relu2"
        )
    if activations.pattern == "none" and weights.pattern == "none":
        raise ConfigError(
            f"{config.recipe} has a sparse phase, but weights.pattern and activations.pattern are none: set one of them"
        )
    if config.training.enable_cpu_offload:
        raise ConfigError("training.enable_cpu_offload = true works with dense phases only: set it to false")
    if weights.pattern == "2:4":
        unknown = set(weights.products) - {1, 3}
        if unknown or not weights.products:
            raise ConfigError(
                f"weights.products = {weights.products}: list 1, 3 or both, the products with a 2:4 weight"
            )
        if args.dim % 4:
            raise ConfigError(f"model.dim = {args.dim} is not divisible by 4, as weights.pattern = 2:4 needs")
    _check_activation_keys(activations)
    if args.num_experts:
        _check_sparse_experts(config, args)
    tensor = config.parallelism.tensor_parallel_degree
    if args.hidden_dim % tensor:
        raise ConfigError(
            f"model.hidden_dim = {args.hidden_dim} is not divisible by parallelism.tensor_parallel_degree = {tensor}: "
            "change one of them"
        )
    neurons = args.hidden_dim // tensor  # among which a rank's pattern chooses
    of = f" / parallelism.tensor_parallel_degree = {args.hidden_dim} / {tensor} = {neurons}" if tensor > 1 else ""
    pattern = activation_pattern(activations)
    why = f" (model.hidden_dim{of})" if of else ""
    for section, each in _activations_of_phases(config):
        try:
            if (of_phase := activation_pattern(each)) is not None:
                of_phase.check(neurons)
        except ValueError as error:
            said = re.sub(r"\b(activations\.)?keep = ", f"{section}.keep = ", f"activations.{error}")
            raise ConfigError(f"{said}{why}; change it or what it has to fit") from None
    context = config.parallelism.context_parallel_degree
    tokens = micro_batch_size(config, sparse=True) * config.training.seq_len // context
    share = f" / parallelism.context_parallel_degree = {context}" if context > 1 else ""
    batch = f"training.{'sparse_' if config.training.sparse_local_batch_size else ''}local_batch_size"
    if config.parallelism.pipeline_parallel_degree > 1:
        batch = "parallelism.pipeline_parallel_microbatch_size"
    if pattern is not None and pattern.v > tokens:
        raise ConfigError(
            f"activations.v = {pattern.v} exceeds the {tokens} tokens of a micro-batch in sparse phases "
            f"({batch} x training.seq_len{share}): lower v or raise those"
        )
    if activations.cut_along_tokens and tokens % COLUMNS:
        raise ConfigError(
            f"activations.cut_along_tokens: the {tokens} tokens of a micro-batch ({batch} x training.seq_len{share}) "
            f"are no multiple of {COLUMNS}: change one of those"
        )
    _check_router(config, args, tokens)
    if router.enable:
        if orders_neurons(config) and neurons % router.cluster_size:
            raise ConfigError(
                f"router.cluster_size = {router.cluster_size} does not divide model.hidden_dim"
                f"{of or f' = {neurons}'}: change one of them"
            )
        if activations.pattern == "none":
            raise ConfigError("router.enable = true has no meaning with activations.pattern = none: set it to false")
    if config.schedule.dense_layers >= args.n_layers:
        raise ConfigError(
            f"schedule.dense_layers = {config.schedule.dense_layers} leaves none of the {args.n_layers} layers to a "
            "sparse phase: lower it, or use --recipe recipes/dense.toml"
        )
    if config.precision.ffn == "fp8":
        for section, each in _activations_of_phases(config):
            _check_fp8(config, section, each, args.dim, neurons)
    args.sparsity, args.dense_layers = feed_forward_sparsity(config, args.hidden_dim), config.schedule.dense_layers


def _check_sparse_experts(config: JobConfig, args: LlamaArgs) -> None:
    """Refuse what sparse experts do not have, and blocks that their tokens do not fill."""
    activations, training = config.activations, config.training
    for key, value, wanted in (
        ("weights.pattern", config.weights.pattern, "none"),
        ("activations.pattern", activations.pattern, "groups"),
    ):
        if value != wanted:
            raise ConfigError(
                f'{key} = "{value}" is not supported for experts (model.name = "llama_moe_relu2"): use "{wanted}", as '
                "recipes/columns_quarter.toml does, or --recipe recipes/dense.toml"
            )
    pattern = activation_pattern(activations)
    assert pattern is not None
    ranks = config.parallelism.expert_parallel_degree  # whose tokens an expert gets
    batch = f"training.{'sparse_' if training.sparse_local_batch_size else ''}local_batch_size"
    rows = micro_batch_size(config, sparse=True) * training.seq_len * args.top_k * ranks
    if rows < pattern.v * args.num_experts:
        raise ConfigError(
            f"activations.v = {pattern.v} exceeds the tokens of an expert, {rows // args.num_experts} on average "
            f"({batch} x training.seq_len x model.top_k x parallelism.expert_parallel_degree / "
            f"model.num_experts = {rows} / {args.num_experts}): lower v or raise those"
        )


def _activations_of_phases(config: JobConfig) -> Iterator[tuple[str, Activations]]:
    """The section [activations] of the recipe and of each phase with a share of its own, after where the share is set.

    The recipe's own share counts as well where no phase reads it: modes of inference do.
    """
    yield "activations", config.activations
    for index, phase in enumerate(config.schedule.phases):
        if phase.keep is not None:
            yield f"schedule.phases[{index}]", dataclasses.replace(config.activations, keep=phase.keep)


def _check_phases(config: JobConfig) -> None:
    """Refuse a share of its own of a phase that reads none."""
    name = config.activations.pattern
    for index, phase in enumerate(config.schedule.phases):
        if phase.keep is None:
            continue
        key = f"schedule.phases[{index}].keep = {phase.keep:g}"
        if phase.mode == "dense":
            raise ConfigError(f"{key} is not read by a dense phase: leave it out")
        if name == "none" or "keep" not in recipe_patterns()[name].keys:
            raise ConfigError(f'{key} is not read by activations.pattern = "{name}": leave it out')


def _check_fp8(config: JobConfig, section: str, activations: Activations, dim: int, neurons: int) -> None:
    pattern = activation_pattern(activations)
    if not isinstance(pattern, Groups) or pattern.v < LARGE:
        raise ConfigError(
            f'precision.ffn = "fp8" is for activations.pattern = "groups" with v of at least {LARGE}, not for '
            f'pattern = "{activations.pattern}" with v = {activations.v}: use "model", or a columns recipe'
        )
    if config.weights.pattern != "none":
        raise ConfigError(
            f'precision.ffn = "fp8" needs dense weights, but weights.pattern = "{config.weights.pattern}": '
            "set one of them to its default"
        )
    kept = pattern.kept_groups(neurons) * pattern.g
    share = f"{section}.keep = {activations.keep:g}: "
    for key, name, value in (
        ("", "activations.v", pattern.v),
        ("", "model.dim", dim),
        (share, "the kept neurons", kept),
    ):
        if value % ALIGNED:
            raise ConfigError(
                f'{key}precision.ffn = "fp8" needs multiples of {ALIGNED}, but {name} = {value}: change it, or use '
                '"model"'
            )


def _check_pattern_name(name: str) -> None:
    patterns = recipe_patterns()
    if name == "columns" and name not in patterns:
        raise ConfigError(
            'activations.pattern = "columns" is pattern = "groups" with g = 1 and v of 512 tokens or more, as in '
            "recipes/columns_quarter.toml: write it so"
        )
    if name != "none" and name not in patterns:
        close = difflib.get_close_matches(name, patterns, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"there are none, {', '.join(sorted(patterns))}"
        raise ConfigError(f'activations.pattern = "{name}" is unknown: {hint}')


def _check_activation_keys(activations: Activations) -> None:
    """Refuse a key that the pattern does not read but that has been set."""
    name, patterns = activations.pattern, recipe_patterns()
    reads = {"pattern"} if name == "none" else {"pattern", *patterns[name].keys, *patterns[name].options}
    for field in dataclasses.fields(activations):
        value = getattr(activations, field.name)
        if field.name not in reads and value != field.default:
            raise ConfigError(
                f'activations.{field.name} = {json.dumps(value)} is not read by pattern = "{name}", which reads '
                f"{', '.join(sorted(reads - {'pattern'})) or 'no other key'}: leave it at {json.dumps(field.default)}"
            )


def _check_router(config: JobConfig, args: LlamaArgs, tokens: int) -> None:
    """Refuse clusters of tokens without a router or with too few tokens, and keys of a clustering that is not made.

    Args:
        config: the job.
        args: of its model.
        tokens: of a micro-batch in sparse phases.
    """
    router, count = config.router, config.router.token_clusters
    # A recipe's cluster_size, cluster_by and spread may stay: `--router.enable false` alone turns its router off.
    for name in ("token_clusters", "recluster_every") if not router.enable else ():
        if value := getattr(router, name):
            raise ConfigError(
                f"router.{name} = {value} is not read by router.enable = false: set that to true, or router.{name} to 0"
            )
    if not count:
        return
    of = "of a micro-batch in sparse phases"
    if args.num_experts:
        tokens = tokens * args.top_k * config.parallelism.expert_parallel_degree // args.num_experts
        of = f"that an expert gets {of}, on average"
    if count > tokens:
        raise ConfigError(f"router.token_clusters = {count} exceeds the {tokens} tokens {of}: lower it")
    if orders_neurons(config):
        return
    defaults = type(router)()
    for name in ("cluster_size", "cluster_by", "spread"):
        value, default = getattr(router, name), getattr(defaults, name)
        if value != default:
            raise ConfigError(
                f"router.{name} = {json.dumps(value)} is not read by router.token_clusters = {count} where blocks "
                f"choose single neurons among all, whose order does not matter: leave it at {json.dumps(default)}"
            )


def _check_parallelism(config: JobConfig, args: LlamaArgs, world: int) -> None:
    parallelism = config.parallelism
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    tensor, pipeline = parallelism.tensor_parallel_degree, parallelism.pipeline_parallel_degree
    context, experts = parallelism.context_parallel_degree, parallelism.expert_parallel_degree
    if (degree := parallelism.expert_tensor_parallel_degree) != 1:
        raise ConfigError(f"parallelism.expert_tensor_parallel_degree = {degree} is not supported: set it to 1")
    if experts != 1 and not args.num_experts:
        raise ConfigError(
            f'parallelism.expert_parallel_degree = {experts}, but model.name = "{config.model.name}" has no experts: '
            "set it to 1"
        )
    if parallelism.expert_parallel_comm_backend != "standard":
        raise ConfigError(
            f'parallelism.expert_parallel_comm_backend = "{parallelism.expert_parallel_comm_backend}" is not '
            'supported: use "standard"'
        )
    shares = "tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"
    for name in shares if args.num_experts else ():
        if (degree := getattr(parallelism, name)) != 1:
            raise ConfigError(
                f"parallelism.{name} = {degree} is not supported for experts (model.name = "
                '"llama_moe_relu2"): set it to 1, shard with data_parallel_shard_degree'
            )
    sparse = any(phase.mode == "sparse" for phase in config.schedule.phases)
    if parallelism.enable_async_tensor_parallel and tensor > 1 and sparse:
        raise ConfigError(
            f"parallelism.enable_async_tensor_parallel = true works with dense phases only, but {config.recipe} has "
            "a sparse one: set it to false"
        )
    if context > 1:
        _check_context_parallelism(config)
    others = replicate * tensor * pipeline * context
    if shard == 0 or world % others or (shard > 0 and shard * others != world):
        piped = f" x pipeline_parallel_degree = {pipeline}" if pipeline > 1 else ""
        piped += f" x context_parallel_degree = {context}" if context > 1 else ""
        raise ConfigError(
            f"parallelism: data_parallel_replicate_degree = {replicate} x data_parallel_shard_degree = {shard} x "
            f"tensor_parallel_degree = {tensor}{piped} is not the {world} process{'es' if world > 1 else ''} of this "
            "run: change a degree (data_parallel_shard_degree = -1 takes what is left) or torchrun's --nproc_per_node"
        )
    if shard < 0:
        shard = world // others
    if shard % experts or (args.num_experts and args.num_experts % experts):
        raise ConfigError(
            f"parallelism.expert_parallel_degree = {experts} does not divide the {shard} ranks that shard the model "
            f"(data_parallel_shard_degree) and model.num_experts = {args.num_experts}: change one of them"
        )
    if replicate > 1 and shard == 1:
        raise ConfigError(
            f"parallelism.data_parallel_replicate_degree = {replicate} without sharding halves gradients in "
            "torchtitan 0.2.2: use data_parallel_shard_degree"
        )
    kv_heads = args.n_kv_heads or args.n_heads  # and so n_heads, which it divides
    if kv_heads % tensor:
        raise ConfigError(
            f"model.n_kv_heads = {kv_heads} is not divisible by tensor_parallel_degree = {tensor}: change one of them"
        )
    if config.training.seq_len % (2 * tensor * context):  # as torchtitan asserts
        shared = f" x context_parallel_degree = {2 * tensor * context}" if context > 1 else f" = {2 * tensor}"
        raise ConfigError(
            f"training.seq_len = {config.training.seq_len} is not divisible by 2 x tensor_parallel_degree{shared}: "
            "change it"
        )


def _check_context_parallelism(config: JobConfig) -> None:
    parallelism = config.parallelism
    if parallelism.context_parallel_load_balancer != "headtail":
        raise ConfigError(
            f"parallelism.context_parallel_load_balancer = {json.dumps(parallelism.context_parallel_load_balancer)} is "
            'not for causal attention: use "headtail"'
        )
    if parallelism.context_parallel_rotate_method != "allgather":  # torchtitan 0.2.2 reads the key no more
        raise ConfigError(
            f'parallelism.context_parallel_rotate_method = "{parallelism.context_parallel_rotate_method}" has no '
            'effect in torchtitan 0.2.2: leave it at "allgather"'
        )


def _check_batch(config: JobConfig, world: int) -> None:
    training, ranks = config.training, data_parallel_ranks(config, world)
    local, batch = training.local_batch_size, training.global_batch_size
    if batch != -1 and (batch < 1 or batch % (local * ranks)):
        raise ConfigError(
            f"training.global_batch_size = {batch} is not a multiple of training.local_batch_size = {local} times "
            f"{ranks} data-parallel rank{'s' if ranks > 1 else ''}: change one of them"
        )
    sparse, batch = training.sparse_local_batch_size, local * ranks if batch == -1 else batch
    if sparse and (sparse % local or batch % (sparse * ranks)):
        raise ConfigError(
            f"training.sparse_local_batch_size = {sparse} is not a multiple of training.local_batch_size = {local} of "
            f"which {ranks} data-parallel rank{'s' if ranks > 1 else ''} can share the {batch} sequences of a step "
            "(training.global_batch_size): change one of them"
        )


def _check_folders(config: JobConfig) -> None:
    """Refuse folders of a run that are outside of its own, where they may be another run's."""
    for key in FOLDERS:
        value, default = (attrgetter(key)(job) for job in (config, JobConfig()))
        path = Path(value)
        if not path.parts or path.is_absolute() or ".." in path.parts or path.parts[0] in OWN_FILES:
            raise ConfigError(
                f"{key} = {json.dumps(value)} is no folder inside job.dump_folder that is free for it: give a name, "
                f'such as "{default}"; a folder on another disk can be linked there'
            )


def _check_rest(config: JobConfig) -> None:
    _check_folders(config)
    if config.checkpoint.keep_latest_k == 1:
        raise ConfigError(
            "checkpoint.keep_latest_k = 1 could leave no complete checkpoint: keep 2 or more, or 0 for all"
        )
    if config.training.loss_chunk_tokens:
        _check_loss_chunks(config)
    if config.optimizer.name not in ("Adam", "AdamW"):
        raise ConfigError(f'optimizer.name = "{config.optimizer.name}" is unknown: use "AdamW" or "Adam"')
    if config.optimizer.moments == "bfloat16":
        _check_bf16_moments(config)
    if config.training.max_norm == 0:
        raise ConfigError(
            "training.max_norm = 0 clips every gradient to nothing: give a norm such as 1.0, or 1e30 to clip none"
        )
    if unknown := [name for name in config.compile.components if name not in ("model", "loss")]:
        raise ConfigError(f'compile.components has "{unknown[0]}", which is unknown: use "model" and "loss"')
    # Only where it is used: asking imports the compiler.
    if config.compile.enable and config.compile.backend not in torch.compiler.list_backends(()):
        raise ConfigError(f'compile.backend = "{config.compile.backend}" is unknown: use "inductor"')
    if unknown := [name for name in config.model.converters if name not in CONVERTERS]:
        raise ConfigError(f'model.converters has "{unknown[0]}", which is unknown: use "{CONVERTERS[0]}"')
    if config.model.name == "llama_moe_relu2":
        if config.model.converters:
            raise ConfigError(
                f"model.converters = {config.model.converters} is not supported for experts (model.name = "
                '"llama_moe_relu2"): leave it empty'
            )
        if config.training.enable_cpu_offload:
            raise ConfigError(
                "training.enable_cpu_offload = true is not supported for experts (model.name = "
                '"llama_moe_relu2"): set it to false'
            )
    checkpointing = config.activation_checkpoint
    option = checkpointing.selective_ac_option
    if checkpointing.mode == "selective" and option != "op" and not (option.isdigit() and int(option) > 0):
        raise ConfigError(
            f'activation_checkpoint.selective_ac_option = "{option}": give "op", or every how many layers, such as "2"'
        )
    if checkpointing.mode == "memory_budget" and not (config.compile.enable and "model" in config.compile.components):
        raise ConfigError('activation_checkpoint.mode = "memory_budget" needs compile.enable = true')
    profiling = config.profiling
    if profiling.enable_profiling and profiling.profile_freq < profiling.profiler_warmup + profiling.profiler_active:
        raise ConfigError(
            f"profiling.profile_freq = {profiling.profile_freq} is less than profiler_warmup = "
            f"{profiling.profiler_warmup} and profiler_active = {profiling.profiler_active} steps together: raise it"
        )
    if config.optimizer.early_step_in_backward:
        raise ConfigError("optimizer.early_step_in_backward = true leaves no gradients to clip: set it to false")


def _check_bf16_moments(config: JobConfig) -> None:
    moments = 'optimizer.moments = "bfloat16"'
    if config.optimizer.name != "AdamW":
        raise ConfigError(
            f'{moments} is for optimizer.name = "AdamW", not "{config.optimizer.name}": change one of them'
        )
    if config.optimizer.beta2 > 0.99:
        raise ConfigError(
            f"{moments} with optimizer.beta2 = {config.optimizer.beta2:g} would round away what a step adds to the "
            "second moment: lower beta2 to 0.99 or less, or keep float32"
        )
    if config.model.name == "llama_moe_relu2":
        raise ConfigError(f'{moments} is not supported for experts (model.name = "llama_moe_relu2"): use "float32"')
    if config.training.enable_cpu_offload:
        raise ConfigError(f"{moments} is not supported with training.enable_cpu_offload = true: set one of them back")


def _check_loss_chunks(config: JobConfig) -> None:
    chunks = f"training.loss_chunk_tokens = {config.training.loss_chunk_tokens}"
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        raise ConfigError(
            f"{chunks} is not supported with parallelism.tensor_parallel_degree = {degree}, which shards the logits "
            "over the vocabulary: set it to 0"
        )
    for converter in config.model.converters:
        key = converter.rsplit(".", 1)[1]
        left_out = getattr(config.quantize.linear, key).filter_fqns
        if not any(name in "output" for name in left_out):
            raise ConfigError(
                f'{chunks} computes the head in training.mixed_precision_param, but model.converters = ["{converter}"] '
                f'converts it: add "output" to quantize.linear.{key}.filter_fqns'
            )


def _emulates_float8(config: JobConfig) -> bool:
    """Whether float8 is the only converter, and torchao computes it in float32: slow, on any machine, eager alone."""
    float8, compiles = config.quantize.linear.float8, config.compile.enable and "model" in config.compile.components
    alone = config.model.converters == ["quantize.linear.float8"] and float8.recipe_name is None
    return alone and float8.emulate and not compiles


def _check_machine(config: JobConfig) -> None:
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Found with torch 2.13: ranks that start again look for one another at the addresses of the killed ones.
        raise ConfigError(
            f"torchrun --max-restarts={restarts} would fail at the first restart, since its store keeps the addresses "
            f"of the ranks before it: set the environment variable {UNSHARED}=1 for torchrun"
        )
    if (degree := config.parallelism.context_parallel_degree) > 1:
        context, dtype = f"parallelism.context_parallel_degree = {degree}", config.training.mixed_precision_param
        if device_type not in RING_ATTENTION:
            raise ConfigError(f"{context} needs GPUs: PyTorch has no ring attention for the {device_type}; set it to 1")
        if dtype not in RING_ATTENTION[device_type]:
            raise ConfigError(
                f'{context}: PyTorch has no ring attention in training.mixed_precision_param = "{dtype}"; use '
                f'"{RING_ATTENTION[device_type][0]}"'
            )
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_type == "cuda" and local_world > torch.cuda.device_count():
        raise ConfigError(
            f"--nproc_per_node={local_world} asks for more GPUs than the {torch.cuda.device_count()} of this machine: "
            "lower it"
        )
    if config.model.converters and device_type == "cpu" and not _emulates_float8(config):
        raise ConfigError(
            f"model.converters = {json.dumps(config.model.converters)} needs a GPU: leave it empty on this machine, or "
            "for a test set quantize.linear.float8.emulate = true and compile.enable = false"
        )
    if config.training.enable_cpu_offload and device_type == "cpu":
        raise ConfigError("training.enable_cpu_offload = true needs a GPU to offload from: set it to false")
    if config.checkpoint.async_mode == "async_with_pinned_mem" and device_type == "cpu":
        raise ConfigError('checkpoint.async_mode = "async_with_pinned_mem" needs a GPU: use "async" on this machine')
    if config.profiling.enable_profiling and device_type == "cpu":
        raise ConfigError("profiling.enable_profiling = true needs a GPU: torchtitan profiles no CPU; set it to false")
    if config.profiling.enable_memory_snapshot and device_type == "cpu":
        raise ConfigError("profiling.enable_memory_snapshot = true needs a GPU, whose memory it shows; set it to false")
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.enable_wandb = true, but wandb is not installed: pip install wandb, or set it to false"
        )
    if not config.job.dump_folder.strip():
        raise ConfigError('job.dump_folder = "" names no folder: name one, such as "outputs/run"')
    folder = Path(config.job.dump_folder).absolute()
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())  # nothing is made by a check
    except OSError as error:  # such as a name that is too long
        raise ConfigError(
            f'job.dump_folder = "{folder}" cannot be made ({error.strerror}); name another folder'
        ) from error
    if not there.is_dir():
        raise ConfigError(f'job.dump_folder = "{folder}" cannot be made: {there} is a file; name another folder')
    for key in FOLDERS:
        if (own := folder / attrgetter(key)(config)).exists() and not own.is_dir():
            raise ConfigError(f"{key}: {own} is a file: move it away, or name another folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(
            f'job.dump_folder = "{folder}" cannot be written: {there} is not writable; name another folder'
        )
