"""torchtitan's own trainer, as it is, on a job of this project: what `scripts/benchmark.py` compares with.

    python -m scripts.titan_baseline --config configs/7b_slice.toml --model.name llama_swiglu

takes the keys of train.py. Trainer, metrics, loss, optimizer and parallelism are torchtitan's; so is the model where
model.name = "llama_swiglu". Only the tokenizer and the batches are those that train.py would read, so that both see the
same tokens. Dense from the first step to the last, whatever the recipe says, and nothing is saved or validated.
"""

import json
import sys
from dataclasses import replace

import torch.distributed as dist

import configs.titan as titan
from configs.errors import ConfigError, run_program
from configs.loader import load_config
from recipes.check import check_config
from recipes.data import check_data
from recipes.tokenizer import prepare_tokenizer, token_bytes
from recipes.trainer import set_up_process, train_spec


def main(words: list[str]) -> None:
    config, _ = load_config(words)
    args, _ = check_config(config)
    for key, value, plain in (
        ("training.loss_chunk_tokens", config.training.loss_chunk_tokens, 0),
        ("training.bf16_residual", config.training.bf16_residual, False),
        ("optimizer.moments", config.optimizer.moments, "float32"),
    ):
        if value != plain:
            raise ConfigError(f"{key} = {json.dumps(value)} is not for torchtitan's own trainer: leave it out")
    check_data(config)
    config.metrics.verbose = True
    config.validation.enable = config.checkpoint.enable = False
    set_up_process(config)
    config.model.hf_assets_path = prepare_tokenizer(config)
    args.vocab_size = len(token_bytes(config.model.hf_assets_path))
    theirs = {"parallelize_fn": titan.parallelize_llama, "build_validator_fn": None, "build_metrics_processor_fn": None}
    spec = replace(train_spec(config, args), **theirs)
    if args.swiglu:
        # torchtitan takes two thirds of 4 d times this factor, rounded up to a multiple of 64, as we do of hidden_dim.
        args.ffn_dim_multiplier = args.hidden_dim / (4 * args.dim)
        spec = replace(spec, model_cls=titan.Transformer)
    titan.use_train_spec(config.model.name, spec, titan.CheckpointManager)
    trainer = titan.Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
