"""Make a Hugging Face folder the start of a run, to continue its pretraining sparsely.

    python -m scripts.import_hf path/to/AFM outputs/afm

reads a folder of architecture `ArceeForCausalLM` (or, for dense runs, `LlamaForCausalLM`), writes the model as
checkpoint 0 of a run that has taken no step, with its tokenizer, and prints the keys of the configuration that
continues it. A run whose [model] is another one is refused (recipes/restore.py).
"""

import argparse
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import ConfigError, exit_with
from models.hugging_face import StateDictAdapter, import_args
from models.llama import FLAVORS, Llama, LlamaArgs, llama_args
from recipes.checkpoint import POINTER, write_manifest
from recipes.restore import copy_tokenizer, model_facts
from recipes.tokenizer import token_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    state = {name: value.float().contiguous() for name, value in adapter.from_hf(weights).items()}
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("out", help="the folder to write")
    options = parser.parse_args()
    folder, out = Path(options.folder), Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name another one, or remove it")
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read ({error}): give a Hugging Face folder") from None
    args = import_args(values, str(folder / "config.json"))
    vocab_size = len(token_bytes(str(folder)))
    weights = read_weights(folder)
    if vocab_size > args.vocab_size:
        raise ConfigError(f"{folder}: its tokenizer has {vocab_size} tokens, its embedding only {args.vocab_size}")
    if vocab_size < args.vocab_size:
        print(f"leaving out {args.vocab_size - vocab_size} rows of the embedding that stand for no token")
    args.vocab_size = vocab_size
    state = import_weights(weights, args, folder, bool(values.get("tie_word_embeddings")))

    dtypes = {value.dtype for value in weights.values()}
    dtype = "bfloat16" if dtypes == {torch.bfloat16} else "float32"
    step, tokenizer = out / "checkpoint" / "step-0", str(out / "tokenizer")
    config = {
        "model": model_facts(args),
        "tokenizer": {"path": tokenizer},
        "training": {"seq_len": args.max_seq_len, "mixed_precision_param": dtype},
    }
    run = {"config": config, "vocabulary": vocab_size, "imported_from": str(folder)}
    _write(out, folder, state, run)
    keys = {
        "model": _model_keys(args),
        "tokenizer": {"path": tokenizer},
        "checkpoint": {"initial_load_path": str(step)},
    }
    print(f"wrote {step}; a configuration that continues it says")
    for section, pairs in keys.items():
        print(f"\n[{section}]")
        for key, value in pairs.items():
            print(f"{key} = {json.dumps(value)}")


def _write(out: Path, folder: Path, state: dict[str, Tensor], run: dict[str, Any]) -> None:
    """Write the run's folder, which gets its name last: an import that fails leaves nothing behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=out.parent))
    try:
        copy_tokenizer(folder, unfinished / "tokenizer")
        step = unfinished / "checkpoint" / "step-0"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, checkpoint_id=step, no_dist=True)
        write_manifest(str(step))
        (step.parent / POINTER).write_text(step.name)
        (unfinished / "run.json").write_text(json.dumps(run, indent=2) + "\n")
        unfinished.chmod(0o755)  # mkdtemp's folders are private
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _model_keys(args: LlamaArgs) -> dict[str, Any]:
    """The section [model]: a flavor where one fits, else every key."""
    facts = model_facts(args)
    for flavor in FLAVORS:
        if model_facts(llama_args(flavor, swiglu=args.swiglu)) == facts:
            return {"name": facts["name"], "flavor": flavor}
    return facts


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with(error)
