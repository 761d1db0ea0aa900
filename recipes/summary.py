"""What a checked job would do, for a person to read before it runs: `python train.py ... --check`."""

import os

import torch

from configs.schema import JobConfig
from configs.titan import TORCH_DTYPE_MAP, device_type
from models.llama import Llama, LlamaArgs
from recipes.data import num_rows
from recipes.files import Report
from recipes.schedule import Span
from recipes.sources import LOCAL, find_source
from recipes.sparsity import computes_in, sparse_family
from recipes.tokenizer import expected_vocabulary


def summary(config: JobConfig, args: LlamaArgs, spans: list[Span]) -> str:
    """The job in a few lines. Files are counted, not read.

    Raises:
        ConfigError: a corpus that is not there.
    """
    training, world = config.training, int(os.environ.get("WORLD_SIZE", "1"))
    args.vocab_size = expected_vocabulary(config)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Llama(args).parameters())
    tensor = config.parallelism.tensor_parallel_degree
    ranks = world // tensor
    tokens = num_rows(config, ranks) * training.seq_len
    dtype = TORCH_DTYPE_MAP[computes_in(training, tensor, ranks > 1)]
    family, reason = sparse_family(args, spans, torch.device(device_type), dtype, tensor_parallel=tensor)
    lines = [
        f"model       {config.model.name} {config.model.flavor}: {parameters / 1e6:,.1f} M parameters, vocabulary "
        f"{args.vocab_size:,}",
        f"run         {training.steps:,} steps of {tokens:,} tokens: {training.steps * tokens / 1e6:,.1f} M, "
        f"{training.steps * tokens / parameters:,.1f} a parameter",
        f"recipe      {config.recipe}: " + ", ".join(f"{span.mode} to step {span.stop}" for span in spans),
        f"sparse FFN  {family.name}: {reason}" if family else f"sparse FFN  none: {reason}",
    ]
    for index, source in enumerate(config.data.sources):
        read = f"{source.path} on the Hugging Face hub, streamed: not looked at"
        if source.type in LOCAL:
            report = Report()
            root, files = find_source(f"data.sources[{index}].path", source, report)
            size = sum(os.path.getsize(file) for file in files) / 1e6
            read = f"{len(files):,} files of {root}, {size:,.1f} MB"
        elif source.type == "tokens":
            read = f"the tokens in {source.path}"
        lines.append(f"{'reads' if index == 0 else '':<12}{source.type}: {read}")
    lines += [
        f"writes      {config.job.dump_folder}",
        f"on          {world} x {device_type}; memory and time: python -m scripts.estimate with the same keys",
        "This job can run.",
    ]
    return "\n".join(lines)
