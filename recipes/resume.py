"""What may change when a run resumes, and what is refused: the one list.

A run's folder keeps, in run.json, the configuration of its last start. A resume compares the two before it reads or
writes anything. These must stay as they were:

    the model          its name, sizes and RoPE (`model_facts` of recipes/restore.py), whatever keys say them
    what is read       data.seed, data.validation_share, each source but its path, training.seq_len,
                       training.global_batch_size; the path of a local source may change if the corpus has as many
                       documents and bytes as before
    the precision      training.dtype, training.mixed_precision_param ("auto" is what the run has, on any device),
                       optimizer.moments
    the seed           debug.seed
    the recipe         the sections schedule, weights, activations, router and precision, unless
                       checkpoint.change_recipe = true

Everything else may change: training.steps, the optimizer's rate and its other numbers (they hold from the next step),
the rest of lr_scheduler, intervals, metrics, compilation, activation checkpointing, micro-batch size. The tokenizer is
compared by its files (recipes/tokenizer.py). The number of GPUs, their layout and the number of data-loading processes
may change as long as the global batch stays, but for streamed mixtures, whose order depends on whether a process reads
them: recipes/data.py.
"""

import json
import os
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.loader import as_word, restored
from configs.schema import RECIPE_SECTIONS, JobConfig
from models.llama import LlamaArgs
from recipes.check import model_args
from recipes.data import data_parallel_ranks, num_rows
from recipes.mixture import used_sources
from recipes.restore import model_facts

FIXED = (
    "data.seed",
    "data.validation_share",
    "training.seq_len",
    "training.dtype",
    "training.mixed_precision_param",
    "optimizer.moments",
    "debug.seed",
)
REMEDY = "give the run's own value, or start another run with another job.dump_folder"


def check_resume(config: JobConfig, args: LlamaArgs, corpus: dict[str, Any]) -> None:
    """Refuse to resume the run in job.dump_folder as another one.

    Args:
        config: the job that is about to resume.
        args: of its model.
        corpus: what it is about to read, as run.json has it: documents, copies, file_bytes.

    Raises:
        ConfigError: a value that differs from the run's, with both and the remedy.
    """
    file = Path(config.job.dump_folder) / "run.json"
    if not file.exists():  # a checkpoint that was copied here, as scripts.study does
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        about = json.loads(file.read_bytes())
        before = restored(about["config"], str(file))
        ranks_before = int(about.get("hardware", {}).get("ranks", world))
        corpus_before = dict(about.get("corpus", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is damaged: restore it, or start another run with another job.dump_folder") from None
    facts = model_facts(model_args(before))
    for name, value in model_facts(args).items():
        _compare(f"the model's {name}", value, facts[name], file, REMEDY)
    for key in FIXED:
        value_of = attrgetter(key)
        _compare(key, value_of(config), value_of(before), file, REMEDY)
    rows = num_rows(config, data_parallel_ranks(config, world))
    rows_before = num_rows(before, data_parallel_ranks(before, ranks_before))
    if rows != rows_before:
        raise ConfigError(
            f"the global batch is {rows} sequences, but the run in {file.parent} has {rows_before}: set "
            f"training.global_batch_size = {rows_before}"
        )
    _compare_sources(config, before, corpus, corpus_before, file)
    if corpus["documents"] is None and len(used_sources(config)) > 1:
        key, (new, old) = "training.dataloader.num_workers", (job.training.dataloader for job in (config, before))
        remedy = f"a process draws the sources of a streamed mixture in another order; {REMEDY}"
        _compare(key, new.num_workers, old.num_workers, file, remedy)
    if not config.checkpoint.change_recipe:
        remedy = f"{REMEDY}, or go on with another recipe by --checkpoint.change_recipe"
        if config.recipe != before.recipe:
            remedy = f"its recipe is {before.recipe}, this one {config.recipe}; {remedy}"
        for section in RECIPE_SECTIONS:
            new, kept = asdict(getattr(config, section)), asdict(getattr(before, section))
            for name, value in new.items():
                _compare(f"{section}.{name}", value, kept[name], file, remedy)


def _compare(key: str, new: Any, old: Any, file: Path, remedy: str) -> None:
    if new != old:
        shown, had = (as_word(value, inside=True) for value in (new, old))
        raise ConfigError(f"{key} = {shown}, but the run in {file.parent} has {had}: {remedy}")


def _compare_sources(
    config: JobConfig, before: JobConfig, corpus: dict[str, Any], corpus_before: dict[str, Any], file: Path
) -> None:
    def but_paths(job: JobConfig) -> list[dict[str, Any]]:
        return [asdict(source) | {"path": source.path if source.type == "hub" else ""} for source in job.data.sources]

    _compare("data.sources", but_paths(config), but_paths(before), file, REMEDY)
    # A run.json without `files_not_read` is of a release that counted bytes in another way.
    names = ("documents", "file_bytes") if "files_not_read" in corpus_before else ("documents",)
    for name in names:
        _compare(f"data.sources: {name}", corpus.get(name), corpus_before.get(name), file, REMEDY)
