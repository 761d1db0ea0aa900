"""Make a Hugging Face folder the start of a run, to continue its pretraining, sparsely where its FFNs allow.

    python -m scripts.import_hf path/to/AFM outputs/afm --data path/to/corpus
    torchrun --nproc_per_node=1 train.py --config outputs/afm/continue.toml

reads a folder of architecture `ArceeForCausalLM` or `LlamaForCausalLM`, writes the model as checkpoint 0 of a run that
has taken no step, with its tokenizer and a configuration that continues it, and says what stays dense. A SwiGLU
(`LlamaForCausalLM`) is dense in every phase; `--relufy` makes squared-ReLU FFNs of it, which can be sparse
(models/relufication.py). A run whose [model] is another one is refused (recipes/restore.py).

The configuration warms up again to a tenth of the rate that a model of this width begins with, and decays to zero: from
the whole rate, a continuation loses more at first than it gains (Gupta et al. 2023, arXiv 2308.04014).
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import ConfigError, run_program
from configs.loader import load_config
from configs.schema import JobConfig
from models.hugging_face import StateDictAdapter, import_args
from models.llama import FLAVORS, Llama, LlamaArgs, llama_args
from models.relufication import relufy
from recipes.atomic import new_folder
from recipes.check import check_keys
from recipes.checkpoint import POINTER, write_manifest
from recipes.restore import copy_tokenizer, model_facts
from recipes.tokenizer import token_bytes
from scripts.options import Parser, out_folder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONTINUE = "continue.toml"
SPARSE = "columns_half"  # the recipe of a model that has layers enough for it


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, by their names there."""
    index = folder / INDEX
    try:
        names = _shards(index) if index.exists() else [SINGLE]
        return {name: value for file in names for name, value in load_file(folder / file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its safetensors cannot be read ({error}): fetch the folder again") from error


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, of files beside it."""
    values = json.loads(index.read_text())
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index.name} has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index.name} lists {json.dumps(file)}, which is no file beside it")
    return sorted(set(files.values()))


def import_weights(weights: dict[str, Tensor], args: LlamaArgs, folder: Path, tied: bool) -> dict[str, Tensor]:
    """The parameters as the trainer names and orders them, float32.

    Rows of the embedding and of the head past the vocabulary stand for no token (they fill it up to a round number) and
    are left out.

    Args:
        weights: all of the folder's, by their names there.
        args: of the model.
        folder: for messages.
        tied: whether config.json says that the head is the embedding, which then learns by itself from here on.

    Raises:
        ConfigError: weights that are not the model's, all of them and no others.
    """
    if HEAD not in weights and EMBEDDING in weights:
        if not tied:
            raise ConfigError(
                f"{folder}: {HEAD} is missing, and config.json does not set tie_word_embeddings: fetch the folder again"
            )
        weights[HEAD] = weights[EMBEDDING]
    adapter = StateDictAdapter(args)
    known = {name.format(layer) for name in adapter.from_hf_map for layer in range(args.n_layers)}
    unknown = sorted(weights.keys() - known)
    if unknown:
        raise ConfigError(f"{folder}: {unknown[0]} is no part of this model: give a folder of the plain architecture")
    try:
        state = {name: value.float().contiguous() for name, value in adapter.from_hf(weights).items()}
    except RuntimeError as error:  # heads that do not divide a projection's rows
        raise ConfigError(f"{folder}: its weights do not fit config.json ({error}): fetch the folder again") from error
    for name in ("tok_embeddings.weight", "output.weight"):
        if name in state:
            state[name] = state[name][: args.vocab_size].clone()
    with torch.device("meta"):
        model = Llama(args).state_dict()
    for name, value in model.items():
        shape = tuple(state[name].shape) if name in state else "missing"
        if shape != tuple(value.shape):
            raise ConfigError(f"{folder}: {name} is {shape}, but config.json makes it {tuple(value.shape)}")
    return state


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("out", type=out_folder, help="the folder to write")
    parser.add_argument("--relufy", action="store_true", help="make squared-ReLU FFNs of the SwiGLU, to be trained on")
    parser.add_argument(
        "--data", action="append", default=[], help="a file, folder or glob to train on; may be repeated"
    )
    parser.add_argument("--recipe", help=f"of the configuration; default: {SPARSE}; dense for a model it does not fit")
    parser.add_argument("--steps", type=int, default=1000, help="of the configuration")
    options = parser.parse_args()
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: give a number above 0")
    if not all(map(str.strip, options.data)):
        raise ConfigError('--data "" names nothing to train on: give a file, folder or glob, or leave it out')
    folder, out = options.folder, options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name another one, or remove it")
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read ({error}): give a Hugging Face folder") from None
    args = import_args(values, str(folder / "config.json"))
    vocab_size = len(token_bytes(str(folder)))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"reading {size / 1e9:.2f} GB of {folder}", flush=True)
    weights = read_weights(folder)
    if vocab_size > args.vocab_size:
        raise ConfigError(f"{folder}: its tokenizer has {vocab_size} tokens, its embedding only {args.vocab_size}")
    if vocab_size < args.vocab_size:
        print(f"leaving out {args.vocab_size - vocab_size} rows of the embedding that stand for no token")
    args.vocab_size = vocab_size
    state = import_weights(weights, args, folder, bool(values.get("tie_word_embeddings")))
    if options.relufy:
        if not args.swiglu:
            raise ConfigError(f"--relufy: the FFNs of {folder} are squared ReLU as they are: leave it out")
        state, args = relufy(state, args)

    dtypes = {value.dtype for value in weights.values()}
    dtype = "bfloat16" if dtypes == {torch.bfloat16} else "float32"
    config = {
        "model": model_facts(args) | {"max_position_embeddings": args.max_seq_len},
        "tokenizer": {"path": str(out / "tokenizer")},
        "training": {"seq_len": _sequence(args), "mixed_precision_param": dtype},
    }
    run = {"config": config, "vocabulary": vocab_size, "imported_from": str(folder)}
    recipe = options.recipe or default_recipe(args)
    text = continuation(args, folder, out, options.data, recipe, options.steps)
    print(f"writing {sum(value.nbytes for value in state.values()) / 1e9:.2f} GB, in float32, to {out}", flush=True)
    job = _write(out, folder, state, run, text)
    print(f"wrote {out}: checkpoint 0, its tokenizer, and a configuration that continues it")
    print("\n".join(describe(args, job, bool(options.data))))
    print(f"\n    torchrun --nproc_per_node=1 train.py --config {out / CONTINUE}")


def default_recipe(args: LlamaArgs) -> str:
    """The recipe of a model's configuration: SPARSE, or "dense" where that would leave no FFN sparse."""
    if args.swiglu:
        return "dense"
    config, _ = load_config(["--config", "debug", "--recipe", SPARSE])
    if args.n_layers > config.schedule.dense_layers:
        return SPARSE
    print(f"recipe: dense, since {SPARSE} leaves {config.schedule.dense_layers} layers dense, of {args.n_layers}")
    return "dense"


def continuation(args: LlamaArgs, folder: Path, out: Path, data: list[str], recipe: str, steps: int) -> str:
    """The configuration, in TOML, of a run that continues the imported model.

    Args:
        args: of the model.
        folder: the Hugging Face folder.
        out: where the import is written.
        data: paths of the corpora; empty: the embedded one.
        recipe: a recipe's file or name.
        steps: of the run.
    """
    seq_len, gpu, tenth = _sequence(args), torch.cuda.is_available(), max(1, steps // 10)
    tokens = 8192 if gpu else 2048  # in a micro-batch
    validated = min(64, max(8, 8 * tokens // seq_len))  # so that a CPU takes no longer for it than for the steps
    facts = _model_keys(args)
    scaling = facts.pop("rope_scaling", {"factor": 1.0})
    training = {"steps": steps, "seq_len": seq_len, "local_batch_size": max(1, tokens // seq_len)}
    start = str(out / "checkpoint" / "step-0")
    sections: list[tuple[str, dict[str, Any]]] = [
        ("", {"recipe": recipe}),
        ("job", {"description": f"{folder.name}, continued", "dump_folder": f"{out}_continued"}),
        ("model", facts | {"max_position_embeddings": args.max_seq_len}),
        *([("model.rope_scaling", scaling)] if scaling["factor"] != 1 else []),
        ("tokenizer", {"path": str(out / "tokenizer")}),
        *(("[data.sources]", {"path": path}) for path in data),
        *([] if data else [("[data.sources]", {"type": "stdlib"})]),
        ("training", training | {"global_batch_size": -1, "max_norm": 1.0}),
        ("optimizer", {"name": "AdamW", "lr": continued_rate(args.dim), "beta2": 0.95, "weight_decay": 0.1}),
        ("lr_scheduler", {"warmup_steps": tenth, "decay_ratio": 0.25, "decay_type": "linear", "min_lr_factor": 0.0}),
        ("compile", {"enable": gpu}),
        ("activation_checkpoint", {"mode": "none"}),
        ("validation", {"freq": tenth, "sequences": 64 if gpu else validated}),
        ("metrics", {"log_freq": 10}),
        ("checkpoint", {"initial_load_path": start, "interval": max(1, steps // 4), "keep_latest_k": 2}),
        ("debug", {"seed": 0}),
    ]
    head = (
        f"# Continues the pretraining of {json.dumps(str(folder))}, made by python -m scripts.import_hf.\n"
        "# Set global_batch_size, and local_batch_size to what fits the GPU: python -m scripts.estimate.\n"
    )
    return "\n".join([head, *(_table(name, values) for name, values in sections)])


def _sequence(args: LlamaArgs) -> int:
    """Tokens in a sequence of the run that continues the model: an even number, for which torchtitan asks."""
    return min(args.max_seq_len, 2048) // 2 * 2


def continued_rate(dim: int) -> float:
    """A tenth of the peak learning rate that configs/ have for a model of this width, about 0.8 / dim."""
    return float(f"{min(3e-3, 0.8 / dim) / 10:.1e}")


def describe(args: LlamaArgs, job: JobConfig, has_data: bool) -> list[str]:
    """What will be sparse in the run that continues the model, and what stays dense."""
    if args.swiglu:
        lines = [
            "dense: all of it. Its FFNs are SwiGLU, which has no sparse mode: recipes other than dense are refused. "
            "Import it with --relufy for squared-ReLU FFNs, which can be sparse"
        ]
    else:
        first = f", and the first {job.schedule.dense_layers} FFNs" if job.schedule.dense_layers else ""
        sparse = any(phase.mode == "sparse" for phase in job.schedule.phases)
        lines = [
            f"sparse: the FFNs, in the sparse phases of {job.recipe}"
            if sparse
            else f"sparse: nothing, by {job.recipe}",
            f"dense: attention, embedding, head{first}, and everything in dense phases",
        ]
    if not has_data:
        lines.append("data: the embedded corpus (Python's standard library); give your own by --data or data.sources")
    lines.append(f"learning rate: {job.optimizer.lr:g} after {job.lr_scheduler.warmup_steps} steps of warm-up")
    return lines


def _table(name: str, values: dict[str, Any]) -> str:
    """A section in TOML, which shares JSON's notation of strings, numbers and booleans."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join([f"[{name}]"] * bool(name) + lines) + "\n"


def _write(out: Path, folder: Path, state: dict[str, Tensor], run: dict[str, Any], text: str) -> JobConfig:
    """Write the run's folder.

    Returns:
        The configuration that `text` is, checked.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as unfinished:
        (unfinished / CONTINUE).write_text(text, encoding="utf-8")
        job, _ = load_config(["--config", str(unfinished / CONTINUE)])
        check_keys(job, 1)
        copy_tokenizer(folder, unfinished / "tokenizer")
        step = unfinished / "checkpoint" / "step-0"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, checkpoint_id=step, no_dist=True)
        write_manifest(str(step))
        (step.parent / POINTER).write_text(step.name)
        (unfinished / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    return job


def _model_keys(args: LlamaArgs) -> dict[str, Any]:
    """The section [model]: a flavor where one fits, else every key."""
    facts = model_facts(args)
    for flavor in FLAVORS:
        if model_facts(llama_args(flavor, swiglu=args.swiglu)) == facts:
            return {"name": facts["name"], "flavor": flavor}
    return facts


if __name__ == "__main__":
    run_program(main)
