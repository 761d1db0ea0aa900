"""Train a language model through dense and sparse phases.

    torchrun --nproc_per_node=8 train.py --config configs/1b.toml --recipe recipes/venom_2of16.toml

reads the job (configs/loader.py), checks what its keys mean together (recipes/check.py) and trains it
(recipes/trainer.py). The exit status is 2 for input that cannot be run.
"""

import json
import multiprocessing
import os
import sys

import torch
import torch.distributed as dist

import kernels
from configs.errors import ConfigError, exit_with

if not hasattr(kernels, "sparse_feed_forward"):
    exit_with(ConfigError(f"{kernels.__file__} shadows this repository's kernels/: run from the repository's root"))

from configs.loader import load_config, resolved
from recipes.check import check_config
from recipes.data import check_data
from recipes.trainer import SparseTrainer


def main(args: list[str]) -> None:
    config, only_check = load_config(args)
    model_args, spans = check_config(config)
    if only_check:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(resolved(config), indent=2))
        return
    check_data(config)
    trainer = SparseTrainer(config, model_args, spans)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"training.local_batch_size = {config.training.local_batch_size} with activation_checkpoint.mode = "
            f'"{config.activation_checkpoint.mode}" does not fit: {str(error).split(". ")[0]}; use a smaller one, '
            '"selective" or "full", or more GPUs (python -m scripts.estimate says what to expect); the same command '
            "resumes from the newest checkpoint"
        ) from error
    finally:
        trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        exit_with(error)
    sys.stdout.flush()
    # Not sys.exit: threads of a destroyed process group have been seen to abort the interpreter while it winds down. It
    # would have ended the processes that read the data, too; whoever reads this one's output waits for them.
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0)
