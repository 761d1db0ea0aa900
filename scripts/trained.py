"""A trained model as transformers has it: from a checkpoint in memory, as the files of a folder, or from an export."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from configs.errors import ConfigError
from configs.titan import TORCH_DTYPE_MAP
from models.hugging_face import StateDictAdapter, export_config, import_transformers, load_export, load_export_tokenizer
from recipes.restore import Checkpoint, copy_tokenizer, find_checkpoint
from recipes.tokenizer import load_tokenizer


def find_model(path: str) -> Checkpoint | Path:
    """What a path names: a Hugging Face folder, or a checkpoint as `find_checkpoint` says."""
    return Path(path) if os.path.isfile(os.path.join(path, "config.json")) else find_checkpoint(path)


def load_model(source: Checkpoint | Path, dtype: str | None, device: torch.device) -> tuple[Any, Any]:
    """transformers' model, in evaluation mode, and tokenizer.

    Args:
        source: as `find_model` returns it.
        dtype: "float32" or "bfloat16"; None: what the run computed in, of a Hugging Face folder what it holds.
        device: where the model is to run.

    Raises:
        ConfigError: transformers is not installed, or the folder cannot be loaded.
    """
    transformers = import_transformers()
    if isinstance(source, Path):
        model, tokenizer = load_export(source, dtype or "auto"), load_export_tokenizer(source)
    else:
        weights = export_weights(source, dtype)
        with tempfile.TemporaryDirectory() as assets:
            export_assets(source, Path(assets), weights)
            tokenizer = load_export_tokenizer(assets)
            config = transformers.AutoConfig.from_pretrained(assets)
            cls = getattr(transformers, config.architectures[0])
            model = cls.from_pretrained(None, config=config, state_dict=weights, dtype=config.dtype)
            model.generation_config = transformers.GenerationConfig.from_pretrained(assets)
    return model.to(device).eval(), tokenizer


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} is not there ({str(error).splitlines()[0]}): use --device cpu") from None
    return device


def refuse_experts(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a mixture of experts, which transformers does not have."""
    if checkpoint.args.num_experts:
        raise ConfigError(
            f'{checkpoint.folder} is a mixture of squared-ReLU experts (model.name = "llama_moe_relu2"), and '
            "transformers has no such model: its experts have a gate or, as Nemotron-H's, go with attention that has "
            "no rotary embedding. From the checkpoint itself run scripts.generate, or scripts.evaluate with --text "
            "and without --tasks and --quantize"
        )


def export_weights(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Tensor]:
    """The parameters as transformers names and orders them, on the CPU; dtype None is what the run computed in.

    Raises:
        ConfigError: a model that transformers does not have.
    """
    refuse_experts(checkpoint)
    wanted = TORCH_DTYPE_MAP[dtype or checkpoint.config.training.mixed_precision_param]
    state = {name: value.to(wanted) for name, value in checkpoint.weights().items()}
    return {name: value.contiguous() for name, value in StateDictAdapter(checkpoint.args).to_hf(state).items()}


def export_assets(checkpoint: Checkpoint, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write all but the weights themselves: config.json, generation_config.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(checkpoint.tokenizer, folder)
    tokenizer = load_tokenizer(folder)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if (file := folder / "tokenizer.json").exists():
        _clean(file)
        if bos is not None and not tokenizer.hf_adds_bos:
            _begin_with(file, tokenizer.bos_token, bos)
    w1 = weights["model.layers.0.mlp.up_proj.weight"]
    config = export_config(checkpoint.args, w1.shape[0], w1.dtype, bos, eos)
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos, "do_sample": True}
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def _clean(file: Path) -> None:
    """Take truncation and padding out of a tokenizer.json, as the trainer did when it read documents."""
    spec = json.loads(file.read_text(encoding="utf-8"))
    if spec.get("truncation") or spec.get("padding"):
        file.write_text(json.dumps(spec | {"truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")


def _begin_with(file: Path, token: str, index: int) -> None:
    """Make a tokenizer begin every text with a token, as the trainer began every document."""
    tokenizer = Tokenizer.from_file(str(file))
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )
    given = tokenizer.post_processor
    tokenizer.post_processor = template if given is None else processors.Sequence([given, template])
    tokenizer.save(str(file))
