"""Evaluate a checkpoint or an export: benchmark tasks, the loss on any text, quantised weights, sparse inference.

    python -m scripts.evaluate outputs/debug-hf                               the paper's tasks, from the network
    python -m scripts.evaluate outputs/debug --text README.md                 loss, perplexity and bits per byte
    python -m scripts.evaluate outputs/debug --text README.md --tasks local   items made of the text, no network
    python -m scripts.evaluate outputs/debug --text README.md --quantize int8 the loss before and after
    python -m scripts.evaluate outputs/debug-hf --text README.md --gguf outputs/debug.gguf    and in llama.cpp
    python -m scripts.evaluate outputs/debug --text README.md --pattern       the loss with h cut to the run's pattern

Tasks are lm-evaluation-harness's. The text is what the trainer would make of it: documents begun and ended by their
markers, one after the other, cut to the length the model was trained at, or to --length; every token but the first is
scored, so the bytes of bits per byte are the text's own (recipes/validation.py has the formula).

The local task asks which of four lines comes next in a document; the three wrong ones are lines from elsewhere in the
same document. Chance is 25%.

A mixture of experts is scored in the trainer's own model; it has no tasks and no quantised weights yet.

With --pattern the checkpoint runs in the trainer's own model, in every mode of `inference_modes`
(models/feed_forward.py): dense; as in a sparse phase, whose choice sees later tokens; and by choices that do not.

Every evaluation is a line of evaluations.jsonl, in the run's folder or in the export.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import tqdm
from torch import Tensor, nn

from configs.errors import ConfigError, first_line, run_program
from models.feed_forward import inference_modes
from recipes.files import DAMAGES, UnreadableError, read_text
from recipes.pipeline import micro_batch_size
from recipes.progress import Progress
from recipes.qat import GROUP
from recipes.restore import Checkpoint
from recipes.tokenizer import load_tokenizer, token_bytes
from scripts.export_gguf import import_llama_cpp
from scripts.options import TERMS, Parser, check_bounds
from scripts.trained import choose_device, find_model, load_model, refuse_experts

# arXiv 2602.06183's list, in lm-evaluation-harness's names.
PAPER_TASKS = (
    *("arc_easy", "arc_challenge", "boolq", "hellaswag", "lambada_openai"),
    *("piqa", "race", "sciq", "record", "openbookqa"),
)
CONTEXT_LINES, CHOICES = 4, 4
GGUF_TYPES = {"0": "f32", "1": "f16", "2": "q4_0", "7": "q8_0", "32": "bf16"}  # by llama.cpp's general.file_type
LONGEST = 4096  # tokens in a sequence of an export: the positions of a long-context model would not fit into memory


class Text:
    """Local text as token ids, ready to be scored.

    Args:
        files: text files, a document each.
        tokenizer: the folder of the model's tokenizer.
    """

    def __init__(self, files: list[Path], tokenizer: Path) -> None:
        self.documents = [_read(file) for file in files]
        self.encode: Callable[..., list[int]] = load_tokenizer(str(tokenizer)).encode
        self.ids: list[int] = []
        for document in self.documents:
            self.ids += self.encode(document, add_bos=True, add_eos=True)
        self.bytes = int(token_bytes(str(tokenizer))[self.ids[1:]].sum())
        if not self.bytes:
            raise ConfigError(f"--text {' '.join(map(str, files))} is empty: name files with text")

    def batches(self, length: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels, both `[batch_size, length]` int64; what is left is in a last one or two."""
        inputs, labels = torch.tensor(self.ids[:-1]), torch.tensor(self.ids[1:])
        whole = len(inputs) // length * length
        batches: list[tuple[Tensor, Tensor]] = []
        if whole:
            rows = (ids[:whole].view(-1, length).split(batch_size) for ids in (inputs, labels))
            batches += zip(*rows, strict=True)
        if whole < len(inputs):
            batches.append((inputs[whole:].unsqueeze(0), labels[whole:].unsqueeze(0)))
        return batches

    @torch.no_grad()
    def score(self, logits: Callable[[Tensor], Tensor], length: int, batch_size: int, name: str) -> dict[str, float]:
        """Loss (nats a token), perplexity and bits per byte of a model.

        Args:
            logits: token ids `[B, S]` to logits `[B, S, vocabulary]`, on any device.
            length: tokens in a sequence, but for a shorter last one.
            batch_size: sequences in a batch.
            name: what is scored, for the lines of progress.
        """
        total, progress = 0.0, Progress(f"text, {name}", len(self.ids) - 1)
        for ids, targets in self.batches(length, batch_size):
            out = logits(ids).float()
            progress.advance(ids.numel())
            total += float(F.cross_entropy(out.flatten(0, 1), targets.flatten().to(out.device), reduction="sum"))
        loss = total / (len(self.ids) - 1)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": total / (math.log(2) * self.bytes)}


def _read(file: Path) -> str:
    try:
        return read_text(str(file))
    except (UnreadableError, *DAMAGES) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ConfigError(f"--text {file} cannot be read ({reason}): name a text file in UTF-8") from None


def local_items(documents: list[str], count: int, longest: int) -> list[dict[str, Any]]:
    """Items of the local task, the same ones for the same documents: `context`, `choices` (4) and `answer` (index).

    Args:
        documents: what they are made of.
        count: items at most.
        longest: bytes of a choice at most; as many tokens it has at most.
    """
    chance = random.Random(0)
    items = []
    for document in documents:
        lines = document.splitlines()
        telling = [
            index for index, line in enumerate(lines) if len(line.strip()) >= 12 and len(line.encode()) <= longest
        ]
        for index in telling:
            # Not among the neighbours, where another line may follow as well.
            others = sorted({lines[other] for other in telling if abs(other - index) > CONTEXT_LINES} - {lines[index]})
            if index == 0 or len(others) < CHOICES - 1:
                continue
            choices = [lines[index], *chance.sample(others, CHOICES - 1)]
            chance.shuffle(choices)
            context = "\n".join(lines[max(0, index - CONTEXT_LINES) : index]) + "\n"
            items.append({"context": context, "choices": choices, "answer": choices.index(lines[index])})
    return chance.sample(items, min(count, len(items)))


def evaluate_tasks(
    model: Any, tokenizer: Any, names: list[str], documents: list[str], batch_size: int, limit: int | None
) -> dict[str, dict[str, float]]:
    """lm-evaluation-harness's metrics by task.

    Args:
        model, tokenizer: transformers'.
        names: its tasks, and "local".
        documents: what the local task is made of.
        batch_size: sequences in a batch.
        limit: items of a task at most; None: all, of the local one 500.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, or its data cannot be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('--tasks needs lm-evaluation-harness: pip install -e ".[eval]", or give only --text')
    import lm_eval
    import lm_eval.api.model
    import lm_eval.api.task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Harness(HFLM):
        """The harness's model, which says how many of a task's requests it has answered."""

        def _loglikelihood_tokens(self, requests, *args, **kwargs):
            self.progress = Progress("tasks", len(requests))
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps, *args, **kwargs):
            logits = super()._model_call(inps, *args, **kwargs)
            self.progress.advance(len(inps))
            return logits

        def generate_until(self, requests, *args, **kwargs):
            self.progress = Progress("tasks", len(requests))
            return super().generate_until(requests, *args, **kwargs)

        def _model_generate(self, context, *args, **kwargs):
            tokens = super()._model_generate(context, *args, **kwargs)
            self.progress.advance(len(context))
            return tokens

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for every context that is cut to the model's length
    tasks: list[Any] = [name for name in names if name != "local"]
    manager = TaskManager(include_defaults=bool(tasks))  # the harness's own are thousands of files to read
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f'--tasks {unknown[0]} is unknown to lm-evaluation-harness; "lm-eval ls tasks" lists them')
    with tempfile.TemporaryDirectory() as folder:
        if "local" in names:
            items = local_items(documents, limit or 500, model.config.max_position_embeddings - 1)
            if not items:
                raise ConfigError("--tasks local finds no items in --text: give a longer text, of many lines")
            file = Path(folder) / "local.jsonl"
            file.write_text("".join(json.dumps(item) + "\n" for item in items))
            tasks.append(_local_task(file))
        harness = Harness(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        print(f"tasks: reading the items of {', '.join(names)}", flush=True)
        try:
            with _without_bars(lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
                results = lm_eval.simple_evaluate(
                    harness, tasks=tasks, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
                )
        except OSError as error:  # ConnectionError and its kin; what else a task raises is a fault of its own
            raise ConfigError(
                f"the tasks' data cannot be had ({str(error).splitlines()[0]}): without a network give "
                "--tasks local --text FILES"
            ) from error
    return {
        name: {key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, int | float)}
        for name, metrics in results["results"].items()
    }


@contextlib.contextmanager
def _without_bars(*modules: ModuleType) -> Iterator[None]:
    """Keep modules, and what imports tqdm meanwhile, from drawing bars: lines of progress take their place."""

    class Without(tqdm.tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    bar = tqdm.tqdm
    try:
        for module in (tqdm, *modules):
            module.tqdm = Without  # type: ignore[attr-defined]
        yield
    finally:
        for module in (tqdm, *modules):
            module.tqdm = bar  # type: ignore[attr-defined]


def _local_task(file: Path) -> dict[str, Any]:
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }


def quantize(model: nn.Module, kind: str) -> None:
    """Quantise the weights of the blocks' linear layers in place, through torchao; the head stays as it is.

    Args:
        kind: "int8" (a scale a row), "int4" (a scale for GROUP weights) or "float8" (e4m3, a scale a row). int4 is
            kept a weight a byte and multiplied in the model's dtype: its loss is that of packed weights, its speed and
            memory are not.

    Raises:
        ConfigError: a GPU that has no float8, or a width that GROUP does not divide.
    """
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    device = next(model.parameters()).device
    if kind == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"--quantize float8: {torch.cuda.get_device_name(device)} has no float8; use int8")
    if kind == "int4":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.in_features % GROUP:
                raise ConfigError(
                    f"--quantize int4 has a scale for {GROUP} weights, which do not divide the {module.in_features} "
                    f"inputs of {name}: use int8"
                )
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)),  # type: ignore[attr-defined]
        "float8": Float8WeightOnlyConfig(),
    }
    quantize_(model, configs[kind], lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def score_export(model: Any, text: Text, length: int, batch_size: int, kind: str | None) -> dict[str, dict[str, float]]:
    """The scores of transformers' model on a text, and once more after its weights are quantised to `kind`.

    Args:
        model: transformers'.
        text: that is scored.
        length: tokens in a sequence.
        batch_size: sequences in a batch.
        kind: "int8", "int4" or "float8"; None: not quantised.
    """

    def logits(ids: Tensor) -> Tensor:
        return model(ids.to(model.device), use_cache=False).logits

    dtype = str(model.dtype).removeprefix("torch.")
    scores = {f"exported, {dtype}": text.score(logits, length, batch_size, dtype)}
    if kind is not None:
        quantize(model, kind)
        scores[f"exported, {kind} weights"] = text.score(logits, length, batch_size, kind)
    return scores


def score_gguf(files: list[Path], text: Text, length: int) -> dict[str, dict[str, float]]:
    """The scores of GGUF files on a text, by llama.cpp on the CPU, through the package llama-cpp-python.

    Args:
        files: as scripts.export_gguf writes them, of the model whose tokenizer the text was encoded by.
        text: that is scored.
        length: tokens in a sequence.

    Raises:
        ConfigError: the package is not installed, or llama.cpp refuses a file.
    """
    llama_cpp = import_llama_cpp("--gguf")
    scores = {}
    for file in files:
        try:
            model = llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
        except ValueError as error:
            raise ConfigError(f"--gguf {file} cannot be loaded by llama.cpp ({first_line(error)})") from None
        name = f"llama.cpp, {GGUF_TYPES.get(model.metadata['general.file_type'], file.name)}"

        def logits(ids: Tensor, model: Any = model) -> Tensor:
            rows = []
            for row in ids.tolist():
                model.reset()
                model.eval(row)
                rows.append(torch.tensor(model.scores[: len(row)]))
            return torch.stack(rows)

        scores[name] = text.score(logits, length, 1, name) | {"file_bytes": file.stat().st_size}
        model.close()
    return scores


def score_patterns(
    checkpoint: Checkpoint, text: Text, device: torch.device, dtype: str | None, patterns: bool = True
) -> dict[str, dict[str, float]]:
    """The checkpoint's scores on a text in the trainer's own model, dense and in every inference mode.

    With them the share of h's energy that is kept, and the tokens a second of a prompt of one micro-batch.

    Args:
        checkpoint: of a run with activation sparsity.
        text: that is scored.
        device: where the model runs.
        dtype: of products, "float32" or "bfloat16"; None: what the run computed in.
        patterns: False: dense alone.

    Raises:
        ConfigError: a run without activation sparsity.
    """
    # Tokens of a micro-batch are sorted together, so that the loss depends on its size.
    length, batch_size = checkpoint.config.training.seq_len, micro_batch_size(checkpoint.config, sparse=patterns)
    if patterns and checkpoint.args.sparsity.pattern is None:
        raise ConfigError(f"--pattern: {checkpoint.config.recipe} cuts no activations, so there is nothing to compare")
    experts = bool(checkpoint.args.num_experts)
    modes = inference_modes(checkpoint.args.sparsity, length, experts) if patterns else {"dense": None}
    model, sparsity = checkpoint.model(device, text.batches(length, batch_size)[0][0])

    def logits(ids: Tensor) -> Tensor:
        with checkpoint.autocast(device, dtype):
            return model(ids.to(device))

    scores = {}
    for name, mode in modes.items():
        sparsity.run_as(mode)
        sparsity.reset_health()
        scores[name] = text.score(logits, length, batch_size, name)
        scores[name]["energy_kept"] = sparsity.health().get("energy_kept", 1.0)

    ids, _ = text.batches(length, batch_size)[0]
    model.train()  # in evaluation the FFNs measure the energy, which takes time
    if device.type == "cuda" and not experts:
        for block in model.layers.values():
            block.compile(fullgraph=True)  # as the trainer does
    for name, mode in modes.items():
        sparsity.run_as(mode)
        torch._dynamo.reset()  # or the modes' graphs would add up to more than the compiler keeps of a block
        scores[name]["prefill_tokens/s"] = _speed(logits, ids, device)
    return scores


@torch.no_grad()
def _speed(logits: Callable[[Tensor], Tensor], ids: Tensor, device: torch.device) -> float:
    """Tokens a second of a forward pass, the median of five after one that compiles."""
    seconds = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        logits(ids)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return ids.numel() / statistics.median(seconds[1:])


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(scores: dict[str, dict[str, float]]) -> str:
    columns = {key: None for values in scores.values() for key in values}
    width = max(map(len, scores), default=0)
    lines = ["  ".join([" " * width, *(f"{column:>{max(10, len(column))}}" for column in columns)])]
    for name, values in scores.items():
        cells = [_number(values[key]).rjust(max(10, len(key))) if key in values else "" for key in columns]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=TERMS)
    parser.add_argument("checkpoint", help="a run's folder (its newest checkpoint), a checkpoint in it, or an export")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="score these text files")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="lm-evaluation-harness's, or local; without --text the paper's",
    )
    parser.add_argument("--limit", type=int, help="items of a task at most")
    parser.add_argument(
        "--quantize", choices=("int8", "int4", "float8"), help="quantise the weights; tasks run on the result"
    )
    parser.add_argument(
        "--gguf",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="score these files of scripts.export_gguf in llama.cpp as well, which llama-cpp-python brings",
    )
    parser.add_argument("--pattern", action="store_true", help="score with h cut to the run's pattern as well")
    parser.add_argument(
        "--length",
        type=int,
        help=f"tokens in a sequence; default: the run's training.seq_len, of an export what it takes, up to {LONGEST}",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the run computed in")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    options = parser.parse_args()
    for name in ("limit", "length", "batch_size"):
        check_bounds(options, name, 1)
    if options.length and options.pattern:
        raise ConfigError("--length: a pattern sees sequences of the run's training.seq_len: leave out one of the two")
    if options.gguf and options.pattern:
        raise ConfigError("--gguf: a GGUF file has no pattern: leave out one of --gguf and --pattern")
    for file in options.gguf or ():
        if not file.is_file():
            raise ConfigError(f"--gguf {file} is no file: write it with scripts.export_gguf")
    needing = [f"--{name}" for name in ("quantize", "gguf", "pattern", "length") if getattr(options, name)]
    if not options.text and (needing or "local" in (options.tasks or ())):
        raise ConfigError(f"{(needing or ['--tasks local'])[0]} needs a text: give --text FILE ...")
    if not options.text and not options.tasks:
        options.tasks = list(PAPER_TASKS)
    return options


def main() -> None:
    options = _arguments()
    device, source = choose_device(options.device), find_model(options.checkpoint)
    text = Text(options.text, source.tokenizer if isinstance(source, Checkpoint) else source) if options.text else None
    scores: dict[str, dict[str, float]] = {}
    tasks: dict[str, dict[str, float]] = {}
    packages = ["torch", "torchao"]
    experts = isinstance(source, Checkpoint) and bool(source.args.num_experts)  # a model that transformers lacks
    if isinstance(source, Checkpoint) and (options.quantize or options.gguf or options.tasks):
        refuse_experts(source)
    if experts and options.length:
        raise ConfigError(
            "--length: a mixture of experts is scored in sequences of the run's training.seq_len: leave it out"
        )
    if (options.pattern or experts) and text is not None:
        if not isinstance(source, Checkpoint):
            raise ConfigError(f"--pattern: {source} is an export, which has no pattern: name the run's checkpoint")
        scores |= score_patterns(source, text, device, options.dtype, options.pattern)
    if not (options.pattern or experts) or options.quantize or options.tasks:
        packages += ["transformers"]
        model, tokenizer = load_model(source, options.dtype, device)
        if text is not None:
            length = options.length or (
                source.config.training.seq_len
                if isinstance(source, Checkpoint)
                else min(LONGEST, model.config.max_position_embeddings)
            )
            scores |= score_export(model, text, length, options.batch_size, options.quantize)
            if options.gguf:
                packages += ["llama_cpp_python"]
                scores |= score_gguf(options.gguf, text, length)
    if text is not None:
        print(f"{len(text.ids):,} tokens, {text.bytes:,} bytes, {options.checkpoint} on {device}\n{_table(scores)}")
    stopped: BaseException | None = None
    if options.tasks:
        packages += ["lm_eval"]
        documents = text.documents if text is not None else []
        try:
            tasks = evaluate_tasks(model, tokenizer, options.tasks, documents, options.batch_size, options.limit)
        except (ConfigError, KeyboardInterrupt) as error:
            if not scores:
                raise
            stopped = error  # the text's scores are kept all the same
        else:
            print(_table(tasks))

    files = [str(file) for file in options.text or ()]
    row = {
        "checkpoint": str(source.folder if isinstance(source, Checkpoint) else source),
        "text": {"files": files, "tokens": len(text.ids), "bytes": text.bytes} if text is not None else None,
        "scores": scores,
        "tasks": tasks,
        "quantize": options.quantize,
        "dtype": options.dtype,
        "limit": options.limit,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": shlex.join(["python", "-m", "scripts.evaluate", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    file = (source.run if isinstance(source, Checkpoint) else source) / "evaluations.jsonl"
    try:
        with open(file, "a") as out:
            out.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}): make its folder writable") from None
    print(f"added to {file}")
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt("the tasks are not scored")
    if stopped is not None:
        raise stopped


if __name__ == "__main__":
    run_program(main)
