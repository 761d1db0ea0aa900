"""Pipeline parallelism: each rank has some of the layers, and micro-batches pass from rank to rank.

The engine is torchtitan's and PyTorch's: they cut the model into stages by the keys `parallelism.pipeline_parallel_*`
and run a schedule. A step's micro-batches of `training.local_batch_size` are cut once more, into those of
`pipeline_parallel_microbatch_size`, which fill the pipeline. Added here are what the keys have to fit, before any
process group exists, and the right gradient: torchtitan 0.2.2 leaves out its division by the number of tokens.

A run with a pipeline equals one without whose `training.local_batch_size` is the pipeline's micro-batch: stages draw
the weights that one model would, and a block of tokens that shares a pattern lies inside a micro-batch.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

import configs.titan as titan
from configs.errors import ConfigError
from configs.schema import JobConfig

# The schedules that are tested, and how many stages of the model a rank has.
SCHEDULES = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}


def micro_batches(config: JobConfig) -> int:
    """Into how many micro-batches a pipeline cuts those of training.local_batch_size; 1 without a pipeline."""
    return config.training.local_batch_size // micro_batch_size(config)


def micro_batch_size(config: JobConfig, sparse: bool = False) -> int:
    """Sequences that the model computes at once, in dense phases or in sparse ones."""
    parallelism, training = config.parallelism, config.training
    if parallelism.pipeline_parallel_degree > 1:
        return parallelism.pipeline_parallel_microbatch_size
    return training.sparse_local_batch_size or training.local_batch_size if sparse else training.local_batch_size


def stages(config: JobConfig, n_layers: int) -> list[list[str]]:
    """The names of each stage's modules, in order of depth, of a checked job. Rank r of R has stages r, r + R, ..."""
    parallelism = config.parallelism
    return titan.generate_llm_fqn_per_model_part(
        _number_of_stages(config, n_layers),
        n_layers,
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )


def in_flight(config: JobConfig, n_layers: int, rank: int) -> float:
    """Micro-batches whose activations a rank of a pipeline keeps at most; a fraction is of some of its stages."""
    degree, count = config.parallelism.pipeline_parallel_degree, micro_batches(config)
    if config.parallelism.pipeline_parallel_schedule == "GPipe":
        return count
    if config.parallelism.pipeline_parallel_schedule == "1F1B":
        return min(count, degree - rank)
    # Before its first backward pass a rank runs each stage but the last on a round of micro-batches, and the last one
    # until the gradient of the first micro-batch can be there.
    own = _number_of_stages(config, n_layers) // degree
    a_round = count // max(1, count // degree)
    return min((own - 1) * a_round + 2 * (degree - 1 - rank) + 1, count * own) / own


def filled(config: JobConfig, n_layers: int) -> float:
    """Share of a step in which stages work, if all take equally long: the rest is the bubble."""
    degree, count = config.parallelism.pipeline_parallel_degree, micro_batches(config)
    own = _number_of_stages(config, n_layers) // degree if degree > 1 else 1
    return count / (count + (degree - 1) / own)


def _number_of_stages(config: JobConfig, n_layers: int) -> int:
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_layers_per_stage is None:
        return parallelism.pipeline_parallel_degree * SCHEDULES[parallelism.pipeline_parallel_schedule]
    first, last = (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    return math.ceil((n_layers + first + last) / parallelism.pipeline_parallel_layers_per_stage)


def check_pipeline(config: JobConfig, n_layers: int) -> None:
    """Check the keys of a pipeline with each other, the model and the micro-batch.

    Raises:
        ConfigError: keys that the schedule would refuse, or that leave a rank without a layer.
    """
    parallelism = config.parallelism
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1:
        return
    if config.training.sparse_local_batch_size:
        raise ConfigError(
            "training.sparse_local_batch_size is not supported with parallelism.pipeline_parallel_degree > 1, whose "
            "micro-batches are of pipeline_parallel_microbatch_size: leave it out"
        )
    for name in ("pipeline_parallel_schedule_csv", "module_fqns_per_model_part"):
        if getattr(parallelism, name):
            raise ConfigError(
                f"parallelism.{name} is not supported: leave it out, and use pipeline_parallel_schedule and "
                "pipeline_parallel_layers_per_stage"
            )
    if schedule not in SCHEDULES:
        raise ConfigError(
            f'parallelism.pipeline_parallel_schedule = "{schedule}" is not supported: use {", ".join(SCHEDULES)}'
        )
    batch, size = config.training.local_batch_size, parallelism.pipeline_parallel_microbatch_size
    if batch % size:
        raise ConfigError(
            f"training.local_batch_size = {batch} is not a multiple of parallelism.pipeline_parallel_microbatch_size = "
            f"{size}: change one of them"
        )
    count = batch // size
    of = f"training.local_batch_size / parallelism.pipeline_parallel_microbatch_size = {batch} / {size} = {count}"
    if schedule == "1F1B" and count < degree:
        raise ConfigError(
            f"{of} micro-batches do not fill parallelism.pipeline_parallel_degree = {degree} stages: raise "
            'training.local_batch_size, or use pipeline_parallel_schedule = "GPipe"'
        )
    if schedule == "Interleaved1F1B" and count % max(1, count // degree):
        raise ConfigError(
            f'{of} micro-batches do not fit pipeline_parallel_schedule = "Interleaved1F1B": let them be a multiple of '
            f"parallelism.pipeline_parallel_degree = {degree}"
        )
    _check_stages(config, n_layers)


def _check_stages(config: JobConfig, n_layers: int) -> None:
    parallelism = config.parallelism
    degree, per_stage = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_layers_per_stage
    number, of_a_rank = _number_of_stages(config, n_layers), SCHEDULES[parallelism.pipeline_parallel_schedule]
    fits = number == degree if of_a_rank == 1 else number % degree == 0 and number >= 2 * degree
    if not fits:
        wanted = f"{degree}" if of_a_rank == 1 else f"a multiple of {degree}, at least {2 * degree}"
        raise ConfigError(
            f"parallelism.pipeline_parallel_layers_per_stage = {per_stage} makes {number} stages of {n_layers} layers, "
            f"but {parallelism.pipeline_parallel_schedule} with pipeline_parallel_degree = {degree} needs {wanted}: "
            "change it, or leave it out"
        )
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    enough = (n_layers + first + last) // number >= max(1, first, last)
    if enough:  # some stage may still have the embedding or the head alone
        names = stages(config, n_layers)
        enough = all(any("layers." in name for part in names[rank::degree] for name in part) for rank in range(degree))
    if not enough:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree = {degree}: the model's {n_layers} layers are too few for {number} "
            f"stages with pipeline_parallel_first_stage_less_layers = {first} and "
            f"pipeline_parallel_last_stage_less_layers = {last}, since each GPU needs a layer: lower the degree, or "
            "those two"
        )


def in_words(config: JobConfig, n_layers: int) -> str:
    """A checked job's pipeline: "1F1B, 4 micro-batches of 1 x 512 tokens, layers of each GPU: 0-1 | 2-3"."""
    degree, length = config.parallelism.pipeline_parallel_degree, config.training.seq_len
    names = stages(config, n_layers)
    ranks = []
    for rank in range(degree):
        parts = [[name.removeprefix("layers.") for name in part if "layers." in name] for part in names[rank::degree]]
        ranks.append(", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else part[0] for part in parts if part))
    return (
        f"{config.parallelism.pipeline_parallel_schedule}, {micro_batches(config)} micro-batches of "
        f"{micro_batch_size(config)} x {length} tokens, layers of each GPU: {' | '.join(ranks)}"
    )


def build_pipeline(model: nn.Module, parallel_dims: titan.ParallelDims, job_config: JobConfig, *arguments):
    """torchtitan's hook for a pipeline: its schedule, this rank's stages, and whether they have the first and last."""
    mesh = parallel_dims.get_mesh("pp")
    seed = torch.tensor(torch.initial_seed() % 2**63, device=titan.device_type)
    dist.broadcast(seed, group=mesh.get_group(), group_src=0)  # torchtitan has given each rank of a pipeline its own
    schedule, parts, *has = titan.pipeline_llm(model, parallel_dims, job_config, *arguments)
    for part in parts:
        part.init_seed = int(seed)  # type: ignore[assignment]
    return schedule, parts, *has


def stage_peers(parallel_dims: titan.ParallelDims) -> dist.ProcessGroup | None:
    """The ranks that have the same stages as this one; None without a pipeline: all."""
    if not parallel_dims.pp_enabled:
        return None
    # Ranks of one pipeline are as far from one another as possible, so those of one stage are neighbours.
    peers, _ = dist.new_subgroups(dist.get_world_size() // parallel_dims.pp)
    return peers


@dataclass(frozen=True)
class Inference:
    """A pipeline's forward pass alone.

    Attributes:
        schedule: torchtitan's.
        has_first_stage, has_last_stage: whether this rank has them.
    """

    schedule: PipelineScheduleSingle | PipelineScheduleMulti
    has_first_stage: bool
    has_last_stage: bool

    def losses(self, inputs: Tensor, labels: Tensor, /, **keywords: Tensor) -> list[Tensor]:
        """The losses of the micro-batches of inputs and labels `[B, S]`; none without the last stage.

        `keywords`, such as `positions [B, S]` and the head's `labels`, are for all stages.

        All ranks of a pipeline call it. The first call after a training step, and the first step after a call, run each
        stage once more: on data of no meaning, to infer the shapes that stages send.
        """
        losses: list[Tensor] = []
        arguments = (inputs,) if self.has_first_stage else ()
        last = (labels, losses) if self.has_last_stage else (None, None)
        self.schedule.eval(*arguments, **keywords, target=last[0], losses=last[1], return_outputs=False)
        return losses


class LossPerToken:
    """A sum of losses over a number of tokens that is set for each step: what a pipeline takes gradients of.

    Args:
        loss_fn: logits `[B, S, vocabulary]` and labels `[B, S]` to the sum of the tokens' losses.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss_fn = loss_fn
        self._tokens: Tensor | float | None = None

    @contextlib.contextmanager
    def divided_by(self, tokens: Tensor | float) -> Iterator[None]:
        """Give losses over so many tokens; outside, their sum."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss_fn(logits, labels)
        return loss if self._tokens is None else loss / self._tokens


def of_head(loss: Tensor, labels: Tensor) -> Tensor:
    """The loss where the head has computed it, training.loss_chunk_tokens: what the model gave."""
    return loss


def build_loss(job_config: JobConfig, parallel_dims: titan.ParallelDims):
    """torchtitan's hook for a loss: cross-entropy, summed over tokens."""
    in_head = job_config.training.loss_chunk_tokens
    loss_fn = of_head if in_head else titan.build_cross_entropy_loss(job_config)
    return LossPerToken(loss_fn) if parallel_dims.pp_enabled else loss_fn
