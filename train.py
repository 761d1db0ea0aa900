"""Train a language model through dense and sparse phases.

    torchrun --nproc_per_node=8 train.py --config configs/1b.toml --recipe recipes/venom_2of16.toml

reads the job (configs/loader.py), checks what its keys mean together (recipes/check.py) and trains it
(recipes/trainer.py). The exit status is 0 for a run that ended or was told to save and stop, 2 for input that cannot be
run, 3 for a job that does not fit into memory, and 1 for any other failure. torchrun turns all but 0 into 1.
"""

import contextlib
import functools
import json
import os
import sys

import torch
import torch.distributed as dist

import kernels
from configs.errors import ConfigError, LostProcessError, TooLargeError, exit_with, show_error

if __name__ == "__main__":
    # Of a Ctrl-C that comes before the trainer's own handler is there.
    sys.excepthook = functools.partial(show_error, speaks=os.environ.get("RANK", "0") == "0")
if not hasattr(kernels, "sparse_feed_forward"):
    exit_with(ConfigError(f"{kernels.__file__} shadows this repository's kernels/: run from the repository's root"))

from configs.loader import load_config, resolved
from configs.schema import JobConfig
from configs.titan import device_type
from models.llama import LlamaArgs
from recipes.check import check_config
from recipes.data import check_data
from recipes.schedule import Span
from recipes.summary import summary
from recipes.trainer import SparseTrainer
from recipes.watchdog import Watchdog

PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say in a collective with a rank that has ended."""


def main(args: list[str]) -> None:
    config, check = load_config(args)
    model_args, spans = check_config(config)
    if check:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(resolved(config), indent=2) if check == "json" else summary(config, model_args, spans))
        return
    limits = config.training.hang_timeout_seconds, config.training.start_timeout_seconds
    with contextlib.closing(Watchdog(*limits)) as watchdog:
        train(config, model_args, spans, watchdog)


def train(config: JobConfig, model_args: LlamaArgs, spans: list[Span], watchdog: Watchdog) -> None:
    """Run a checked job from its start to its end, and turn errors of libraries into messages."""
    watchdog.watch("the start (looking for the data)", starts=True)
    check_data(config)
    trainer = None
    try:
        trainer = SparseTrainer(config, model_args, spans, watchdog)
        trainer.train()
    except Exception as error:
        if lacks_memory(error):
            raise too_large(config, error) from error
        if isinstance(error, LostProcessError):
            raise
        if trainer is not None and (lost := trainer.dataloader.lost_process()):
            raise lost from error
        if said := [line for line in str(error).splitlines() if any(reason in line for reason in PEER_ENDED)]:
            what = said[0].partition(" This is")[0].strip()
            raise LostProcessError(
                f"another process of this run has ended ({what}): its own message says why; the same command resumes"
            ) from error
        raise
    finally:
        if trainer is not None:
            trainer.close()
    watchdog.watch("the end (disconnecting the ranks)")
    dist.destroy_process_group()


def lacks_memory(error: Exception) -> bool:
    """Whether a job does not fit into memory, by an error of PyTorch's allocators, of CUDA, or of NCCL.

    CUDA's kernels and libraries take memory too, and NCCL allocates last.
    """
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | dist.DistBackendError):
        return any(reason in str(error) for reason in ("out of memory", "CUDA calloc"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def too_large(config: JobConfig, error: Exception) -> TooLargeError:
    """What to do about a job that does not fit into memory, by the error that says so."""
    size, mode = config.training.local_batch_size, config.activation_checkpoint.mode
    lines = str(error).strip().splitlines() or ["MemoryError"]
    said = next((line for line in lines if "out of memory" in line), lines[-1])
    # The CPU's begins with a place in the code, others end with advice.
    said = (said.partition("DefaultCPUAllocator: ")[2] or said).split(". ")[0]
    memory = "memory" if device_type == "cpu" else "GPU memory"
    stronger = {"none": ' or activation_checkpoint.mode = "selective" or "full"', "selective": ' or mode = "full"'}
    return TooLargeError(
        f'training.local_batch_size = {size} with activation_checkpoint.mode = "{mode}" does not fit into {memory} '
        f"({said}): use a smaller one{stronger.get(mode, '')}, and keep training.global_batch_size if the run is to go "
        "on from a checkpoint; python -m scripts.estimate says what fits"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        exit_with(error)
    sys.stdout.flush()
    # Not sys.exit: threads of a destroyed process group have been seen to abort the interpreter while it winds down.
    os._exit(0)
