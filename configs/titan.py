"""The door to torchtitan 0.2.2: every name that this project takes from it is imported here, and nowhere else.

torchtitan chooses a device when it is imported, and without a CUDA device it does not choose the CPU. On such a machine
its look-up is answered with the CPU while it is imported. It also compiles kinds of attention that this project does
not use, which would import the compiler, a third of the time to start: they are left uncompiled.

Names of torchtitan that are not public, and may change in any release, are used in this file alone. `PRIVATE` lists
them with the reason for each; `lacking()` says which of them another release does not have. The other modules override
and call the public names that the classes `*Hooks` give them.
"""

import contextlib
import functools
import inspect
import logging
import os
import resource
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch._utils
import torch.distributed.checkpoint  # must see the real look-up functions, so before they are answered below
from tokenizers import Tokenizer

import configs.safe_load  # replaces how DCP reads pickles, before anything is read


class _CpuModule:
    """torch.cpu with the device functions that torchtitan calls and torch.cpu lacks."""

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def set_device(self, device) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device=None) -> str:
        return "CPU"

    def get_device_properties(self, device=None) -> types.SimpleNamespace:
        return types.SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device=None) -> dict:
        # The peak of the resident set stands in for the allocator's peak: both say what the run needed.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self, device=None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


_look_up = torch._utils._get_available_device_type, torch._utils._get_device_module
_compile, torch.compile = torch.compile, lambda function, **_: function  # type: ignore[assignment]
if not torch.cuda.is_available():
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: _CpuModule()  # type: ignore[assignment]
# At its import torchao warns of extensions that this machine lacks and, through _pytree, of torchao's own code: none of
# it is a fault that a reader could mend.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
try:
    import torchtitan.tools.utils
finally:
    torch._utils._get_available_device_type, torch._utils._get_device_module = _look_up
    torch.compile = _compile

import torchtitan.train
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX, build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.metrics import MetricsProcessor, TensorBoardLogger
from torchtitan.components.optimizer import (
    OptimizersContainer,
    build_optimizers,
    build_optimizers_with_moe_load_balancing,
)
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config import job_config as titan_config
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part, pipeline_llm
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.llama3.model.model import Attention, TransformerBlock
from torchtitan.models.llama3.model.model import FeedForward as SwiGLU
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.models.llama4 import parallelize_llama as parallelize_moe
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.moe import moe as _moe
from torchtitan.models.moe import utils as _moe_utils
from torchtitan.models.utils import trunc_normal_
from torchtitan.protocols import train_spec as _train_spec
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from torchtitan.tools.utils import device_module, device_type, get_peak_flops
from torchtitan.train import Trainer


class _TorchOnCpu:
    """torch for torchtitan's router, which counts integers by a histogram: torch's has no kernel for them on a CPU."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def histc(self, input: torch.Tensor, bins: int, min: int, max: int) -> torch.Tensor:
        if input.device.type != "cpu":
            return torch.histc(input, bins=bins, min=min, max=max)
        return torch.bincount(input, minlength=bins)


if device_type == "cpu":
    _moe.torch = _TorchOnCpu()
    _moe_utils.generate_permute_indices = functools.partial(_moe_utils.generate_permute_indices, use_cpu=True)
# This project's grouped products fill up each expert's rows themselves: rows of zeros would stand in sparse blocks.
_moe_utils.TOKEN_GROUP_ALIGN_SIZE_M = 1


# Owner, name, and why it is used: torchtitan has no public way to do this.
PRIVATE: list[tuple[Any, str, str]] = [
    (CheckpointManager, "_create_checkpoint_id", "the folder of a step's checkpoint, to verify, name and rename it"),
    (CheckpointManager, "_flattened_model_states_sd", "all of a run's state, to save at once when a signal comes"),
    (CheckpointManager, "_async_wait", "overridden: a save has ended when it is committed, and may have failed"),
    (CheckpointManager, "_purge_stale_checkpoints", "overridden: torchtitan counts checkpoints that are incomplete"),
    (HuggingFaceTokenizer, "_load_tokenizer_from_path", "overridden: truncation, padding and dropout are taken out"),
    (dist_utils, "clip_grad_norm_", "watched: the norm of the gradient is known before the optimizer's step, and kept"),
    (_train_spec, "_extra_train_specs", "a name can be registered once, and a process may train several jobs"),
    (
        torchtitan.components.metrics,
        "_get_metrics_rank",
        "replaced: rank 0 has the loss of a pipeline, too, and writes",
    ),
    (torchtitan.train, "CheckpointManager", "replaced: the Trainer constructs this class, TrainSpec names no other"),
    (_moe_utils, "generate_permute_indices", "replaced without a GPU by its own CPU path, which nothing chooses"),
    (_moe_utils, "TOKEN_GROUP_ALIGN_SIZE_M", "set: expert parallelism sends each expert its rows and no others"),
    (_moe, "torch", "replaced without a GPU: its router counts tokens by a histogram that a CPU has not"),
    (torchtitan.tools.utils, "_get_available_device_type", "replaced while torchtitan is imported without a GPU"),
    (torchtitan.tools.utils, "_get_device_module", "replaced while torchtitan is imported without a GPU"),
]


def lacking() -> list[str]:
    """What of `PRIVATE` the installed torchtitan does not define and use any more, with the reason for each."""
    return [
        f"{owner.__name__}.{name}: {reason}"
        for owner, name, reason in PRIVATE
        # Defined or imported once, used at least once more: an override of what nothing calls would do nothing.
        if not hasattr(owner, name) or inspect.getsource(owner).count(name) < 2
    ]


torchtitan.components.metrics._get_metrics_rank = lambda parallel_dims, job_config: 0


class CheckpointHooks(CheckpointManager):
    """torchtitan's checkpoint manager with public names for what a subclass overrides and calls."""

    def folder_of(self, step: int) -> str:
        """The folder of a step's checkpoint."""
        return self._create_checkpoint_id(step)

    def resumable_state(self) -> dict[str, Any]:
        """All that a run resumes from: model, optimizer, data and the trainer's own."""
        return self._flattened_model_states_sd()

    def wait_for_save(self) -> None:
        """Wait for an asynchronous save that is under way."""
        super()._async_wait()

    def _async_wait(self) -> None:
        self.wait_for_save()

    def _purge_stale_checkpoints(self) -> None:
        """Nothing: torchtitan deletes when a save begins. A subclass deletes once the new checkpoint is complete."""


class TokenizerHooks(HuggingFaceTokenizer):
    """torchtitan's tokenizer with a public name for what a subclass overrides."""

    def load_tokenizer(self, folder: str) -> Tokenizer:
        """Read the tokenizer of a folder; called once, by the constructor."""
        return super()._load_tokenizer_from_path(folder)

    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Tokenizer:
        return self.load_tokenizer(tokenizer_path)


@contextlib.contextmanager
def watch_gradient_norms() -> Iterator[list[torch.Tensor]]:
    """Collect the norms that torchtitan's training step clips by, before its optimizer's step."""
    original, norms = dist_utils.clip_grad_norm_, []

    def clip(*args, **kwargs) -> torch.Tensor:
        norms.append(original(*args, **kwargs))
        return norms[-1]

    dist_utils.clip_grad_norm_ = clip  # type: ignore[assignment]
    try:
        yield norms
    finally:
        dist_utils.clip_grad_norm_ = original


def use_train_spec(name: str, spec: TrainSpec, checkpoint_manager: type[CheckpointManager]) -> None:
    """Make the next Trainer build the model `name` by this specification, with this checkpoint manager.

    torchtitan registers a name once and for all; here a process may train several jobs, one after the other.
    """
    _train_spec._extra_train_specs[name] = spec
    torchtitan.train.CheckpointManager = checkpoint_manager  # type: ignore[misc]
