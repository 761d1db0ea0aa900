"""Validation on held-out documents: loss and bits per byte, on the same sequences whatever the number of ranks.

Loss is in nats a token and depends on the tokenizer; bits per byte does not:

    bpb = (sum of the tokens' losses) / (ln 2 * bytes of text that the tokens stand for)

Markers of beginning and end stand for no bytes but cost their loss, so bpb is on the safe side.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from configs.schema import JobConfig
from configs.titan import (
    IGNORE_INDEX,
    BaseTokenizer,
    BaseValidator,
    ParallelDims,
    device_type,
    prepare_context_parallel_input,
)
from recipes.data import validation_sequences
from recipes.pipeline import Inference
from recipes.tokenizer import token_bytes

logger = logging.getLogger("sparsetitan")


class Score(NamedTuple):
    loss: float
    """Nats a token."""

    bits_per_byte: float


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left gathered.

    FSDP keeps layers for a backward pass, the last ones or, as the configuration may have it, all. Whoever looks at the
    parameters next, such as a checkpoint or what puts neurons into another order, expects shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Validator(BaseValidator):
    """Scores a model on this rank's share of the held-out sequences. Constructed by torchtitan's Trainer."""

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        parallel_dims: ParallelDims,
        loss_fn,
        validation_context,
        maybe_enable_amp: AbstractContextManager,
        pp_schedule=None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
        **_,
    ) -> None:
        super().__init__(job_config)
        self.loss_fn = loss_fn
        self.context = validation_context
        self.amp = maybe_enable_amp
        self.mesh = parallel_dims.get_optional_mesh("batch")
        self.context_mesh = parallel_dims.get_optional_mesh("cp")
        self.pipeline = parallel_dims.get_optional_mesh("pp")
        self.inference = pp_schedule and Inference(pp_schedule, bool(pp_has_first_stage), bool(pp_has_last_stage))
        sequences = validation_sequences(tokenizer, job_config)
        self.inputs, self.labels = sequences[:, :-1], sequences[:, 1:]
        self.bytes = token_bytes(job_config.model.hf_assets_path)[self.labels].sum(1)
        share = self.labels.flatten().bincount().double() / self.labels.numel()
        # Nats a token of a model that knows only how frequent each token is.
        self.unigram_entropy = -torch.xlogy(share, share).sum().item()
        logger.info(
            f"validation on {len(sequences)} sequences, {int(self.bytes.sum())} bytes, "
            f"of unigram entropy {self.unigram_entropy:.3f} nats a token"
        )
        self.batch_size = job_config.training.local_batch_size
        self.sparse_batch_size = job_config.training.sparse_local_batch_size or self.batch_size  # a multiple of it
        self.loss_in_head = job_config.training.loss_chunk_tokens > 0
        self.load_balancer = job_config.parallelism.context_parallel_load_balancer
        # All ranks run equally many batches of one shape: the last ones are filled up with rows that count for nothing.
        missing = -len(sequences) % (self.sparse_batch_size * dp_world_size)
        filler = self.inputs[:1].expand(missing, -1)
        self.inputs = torch.cat([self.inputs, filler])[dp_rank::dp_world_size]
        self.labels = torch.cat([self.labels, torch.full_like(filler, IGNORE_INDEX)])[dp_rank::dp_world_size]
        self.bytes = torch.cat([self.bytes, self.bytes.new_zeros(missing)])[dp_rank::dp_world_size]

    def should_validate(self, step: int) -> bool:
        """Whether this step ends with a validation: every `validation.freq` steps, and the last one."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    @torch.no_grad()
    def validate(  # type: ignore[override]
        self, model_parts: list[nn.Module], step: int, sparse: bool = False
    ) -> Score:
        """Score the model as it stands, FFNs in whatever mode they are in.

        Args:
            model_parts: the model, or the stages of it that this rank has.
            step: not used.
            sparse: in the micro-batches of sparse phases, whose tokens a pattern's blocks are sorted from.
        """
        batch_size = self.sparse_batch_size if sparse else self.batch_size
        with self._inference(model_parts):
            total = torch.zeros(3, dtype=torch.float64)
            batches = (rows.split(batch_size) for rows in (self.inputs, self.labels, self.bytes))
            for inputs, labels, size in zip(*batches, strict=True):
                loss = self._loss(model_parts, inputs.to(device_type), labels.to(device_type))
                total += torch.stack([loss.double().cpu(), (labels != IGNORE_INDEX).sum(), size.sum()])
        total = total.to(device_type)
        if self.context_mesh is not None:  # each rank has the losses of its share of the sequences
            dist.all_reduce(total[:1], group=self.context_mesh.get_group())
        if self.mesh is not None:
            dist.all_reduce(total, group=self.mesh.get_group())
        if self.pipeline is not None:  # the last stage has the loss
            dist.broadcast(total, group=self.pipeline.get_group(), group_src=self.pipeline.size() - 1)
        loss, tokens, size = total.tolist()
        return Score(loss / tokens, loss / (math.log(2) * size))

    @torch.no_grad()
    def warm_up(self, model_parts: list[nn.Module]) -> None:
        """Turn a pipeline from training to inference, by a pass that the FFNs' counts of a validation must not have."""
        if self.inference is not None:
            with self._inference(model_parts):
                self._loss(
                    model_parts, *(rows[: self.batch_size].to(device_type) for rows in (self.inputs, self.labels))
                )

    @contextmanager
    def _inference(self, model_parts: list[nn.Module]) -> Iterator[None]:
        """The model in evaluation mode; afterwards in training mode, and sharded again."""
        for part in model_parts:
            part.eval()
        yield
        for part in model_parts:
            part.train()
            reshard(part)

    def _loss(self, model_parts: list[nn.Module], inputs: Tensor, labels: Tensor) -> Tensor:
        """Sum of the losses of a batch's tokens; 0 where a rank has not the last stage."""
        with self.context(), self.amp:
            keywords: dict[str, Any] = {}
            if self.context_mesh is not None:
                inputs, labels, keywords = prepare_context_parallel_input(
                    inputs, labels, keywords, self.context_mesh, inputs.device, self.load_balancer
                )
            if self.loss_in_head:
                keywords["labels"] = labels
            if self.inference is None:
                (model,) = model_parts
                return _local(self.loss_fn(model(inputs, **keywords), labels))
            losses = [_local(loss) for loss in self.inference.losses(inputs, labels, **keywords)]
            return torch.stack(losses).sum() if losses else inputs.new_zeros(())


def _local(loss: Tensor) -> Tensor:
    """Under tensor parallelism the loss is a replicated DTensor."""
    return loss.full_tensor() if hasattr(loss, "full_tensor") else loss
