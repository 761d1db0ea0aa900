"""What a job would do (`python train.py ... --check`), and what a finished run did, for a person to read."""

import os
import shlex
from collections.abc import Iterator
from typing import Any

import torch

from configs.schema import JobConfig
from configs.titan import TORCH_DTYPE_MAP, device_type
from models.llama import LlamaArgs, count_parameters, parameters_in_words
from recipes.data import check_loading
from recipes.files import Report
from recipes.metrics import short
from recipes.mixture import used_sources
from recipes.pipeline import in_words
from recipes.progress import duration
from recipes.schedule import Span
from recipes.sources import LOCAL, find_source, load_tokens
from recipes.sparsity import computes_in, describe_experts, sparse_family
from recipes.tokenizer import expected_vocabulary


def summary(config: JobConfig, args: LlamaArgs, spans: list[Span]) -> str:
    """The job in a few lines. Files of text are counted, not read.

    Raises:
        ConfigError: a corpus that is not there, or micro-batches that the data-loading processes cannot share.
    """
    training, world = config.training, int(os.environ.get("WORLD_SIZE", "1"))
    tokens = check_loading(config) * training.seq_len
    args.vocab_size = expected_vocabulary(config)
    parameters = count_parameters(args)
    tensor = config.parallelism.tensor_parallel_degree
    shards = world // (tensor * config.parallelism.pipeline_parallel_degree)  # by data or, each sequence, by context
    dtype = TORCH_DTYPE_MAP[computes_in(config, shards > 1)]
    family, reason = sparse_family(args, spans, torch.device(device_type), dtype, tensor_parallel=tensor)
    lines = [
        f"model       {config.model.name} {config.model.flavor}: {parameters_in_words(args)}, vocabulary "
        f"{args.vocab_size:,}",
        f"run         {training.steps:,} steps of {tokens:,} tokens: {training.steps * tokens / 1e6:,.1f} M, "
        f"{training.steps * tokens / parameters:,.1f} a parameter",
        f"recipe      {config.recipe}: " + ", ".join(f"{span.name} to step {span.stop}" for span in spans),
        f"sparse FFN  {family.name}: {reason}" if family else f"sparse FFN  none: {reason}",
    ]
    if config.precision.qat != "none":
        first = spans[-1].start + 1
        lines.append(f"QAT         weights of the blocks' linear layers in {config.precision.qat} from step {first}")
    if args.num_experts:
        said, slow = describe_experts(config, args, spans, family)
        lines.append(f"experts     {said}")
        if slow:
            lines.append(f"WARNING     sparse experts would not be faster: {slow}")
    if config.parallelism.pipeline_parallel_degree > 1:
        lines.append(f"pipeline    {in_words(config, args.n_layers)}")
    for place, (index, source) in enumerate(used_sources(config)):
        key, read = f"data.sources[{index}].path", f"{source.path} on the Hugging Face hub, streamed: not looked at"
        if source.type in LOCAL:
            root, files = find_source(key, source, Report())
            size = sum(os.path.getsize(file) for file in files) / 1e6
            read = f"{len(files):,} files of {root}, {size:,.1f} MB"
        elif source.type == "tokens":
            read = f"the tokens of {len(load_tokens(key, source, Report())):,} documents in {source.path}"
        lines.append(f"{'reads' if place == 0 else '':<12}{source.type}: {read}")
    lines += [
        f"writes      {config.job.dump_folder}",
        f"on          {world} x {device_type}, products in {str(dtype).removeprefix('torch.')}; memory and time: "
        "python -m scripts.estimate with the same keys",
        "This job can run.",
    ]
    return "\n".join(lines)


def outcome(config: JobConfig, about: dict[str, Any], row: dict[str, Any], first: int, seconds: float) -> Iterator[str]:
    """The lines that a run ends with: its cost, its loss, and the commands that use its model.

    Args:
        about: the run's run.json; empty on ranks that do not log.
        row: its last row of metrics.
        first: the first step of this process; a resumed run did the steps before it in another one.
        seconds: this process's time for its steps, with validations and saves.
    """
    if not about:
        return
    steps, tokens = row["step"], row["tokens"]
    sparse = sum(stop - start + 1 for mode, start, stop in about["phases"] if mode == "sparse") / steps
    did = f"{steps:,} steps" if first == 1 else f"steps {first:,} to {steps:,}"
    yield (
        f"finished: {did} in {duration(seconds)}; {short(tokens)} tokens, "
        f"{tokens / about['parameters']:.3g} a parameter; {100 * sparse:.0f}% of the steps sparse"
    )
    if "val_loss" in row:
        entropy, loss = about["unigram_entropy"], row["val_loss"]
        than = f"{entropy - loss:.3f} below" if loss < entropy else f"{loss - entropy:.3f} ABOVE"
        yield (
            f"validation loss {loss:.4f} nats a token ({row['val_bpb']:.3f} bits a byte): {than} the unigram entropy "
            f"{entropy:.3f}, the loss of a model that knows only how frequent each token is"
        )
        if "val_loss_quantised" in row:
            yield f"validation loss with weights rounded to {config.precision.qat}: {row['val_loss_quantised']:.4f}"
    else:
        yield f"training loss {row['loss']:.4f} nats a token; validation.enable = false, so there is no other"
    folder = config.job.dump_folder
    named, export = shlex.quote(folder), shlex.quote(f"{folder.rstrip('/')}-hf")
    yield "next:"
    yield f"  python -m scripts.plot {named}"
    if config.checkpoint.enable and not config.checkpoint.load_only:
        yield f'  python -m scripts.generate {named} --prompt "The"'
        yield f"  python -m scripts.evaluate {named} --text FILE"
        if config.model.name != "llama_moe_relu2":  # which no architecture of transformers fits
            yield f"  python -m scripts.export_hf {named} {export}"
