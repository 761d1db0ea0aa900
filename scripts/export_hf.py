"""Write a trained checkpoint as a Hugging Face folder that transformers, vLLM and SGLang load with no code of ours.

    python -m scripts.export_hf outputs/debug outputs/debug-hf             the newest checkpoint
    python -m scripts.export_hf outputs/debug/checkpoint/step-400 OUT --dtype float32

The folder has the architecture `ArceeForCausalLM` (a SwiGLU model `LlamaForCausalLM`), safetensors in shards of 5 GB at
most, the tokenizer and the generation config. What is converted and what need not be: models/hugging_face.py.
"""

import json
import shutil

from huggingface_hub import save_torch_state_dict

from configs.errors import ConfigError, run_program
from recipes.restore import find_checkpoint
from scripts.options import Parser, out_folder
from scripts.trained import export_assets, export_weights


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or a checkpoint/step-N folder")
    parser.add_argument("out", type=out_folder, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: what the run computed in"
    )
    options = parser.parse_args()
    out = options.out
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
    run_program(main)
