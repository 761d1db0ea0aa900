"""Write a trained checkpoint as a Hugging Face folder that transformers, vLLM and SGLang load with no code of ours.

    python -m scripts.export_hf outputs/debug outputs/debug-hf             the newest checkpoint
    python -m scripts.export_hf outputs/debug/checkpoint/step-400 OUT --dtype float32

The folder has the architecture `ArceeForCausalLM` (a SwiGLU model `LlamaForCausalLM`), safetensors in shards of 5 GB at
most, the tokenizer and the generation config. What is converted and what need not be: models/hugging_face.py.
"""

import argparse
import json
import shutil
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, processors
from torch import Tensor

from configs.errors import ConfigError, exit_with
from configs.titan import TORCH_DTYPE_MAP
from models.hugging_face import StateDictAdapter, export_config
from recipes.restore import Checkpoint, copy_tokenizer, find_checkpoint
from recipes.tokenizer import load_tokenizer


def export_weights(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Tensor]:
    """The parameters as transformers names and orders them, on the CPU; dtype None is what the run computed in."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or a checkpoint/step-N folder")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: what the run computed in"
    )
    options = parser.parse_args()
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name another one, or remove it")
    checkpoint = find_checkpoint(options.checkpoint)
    print(f"reading {checkpoint.folder}", flush=True)
    weights = export_weights(checkpoint, options.dtype)
    print(f"writing {sum(value.nbytes for value in weights.values()) / 1e9:.2f} GB to {out}", flush=True)
    export_assets(checkpoint, out, weights)
    save_torch_state_dict(weights, out)
    for file in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", file)  # they are written for the owner alone
    print(f"{out}: {json.loads((out / 'config.json').read_text())['architectures'][0]}, step {checkpoint.step}")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with(error)
