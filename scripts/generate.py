"""Continue a prompt with a model straight from a training checkpoint, on a GPU if there is one.

    python -m scripts.generate outputs/debug --prompt "def main("
    python -m scripts.generate outputs/debug/checkpoint/step-100 --prompt "import" --temperature 0 --max-new-tokens 200

The checkpoint becomes transformers' model in memory (models/hugging_face.py), with its cache of keys and values; an
exported folder does as well as a checkpoint. The FFN is dense, as in any inference.
"""

import argparse
from typing import Any

import torch

from configs.errors import ConfigError, exit_with
from models.hugging_face import import_transformers
from scripts.trained import choose_device, find_model, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder (its newest checkpoint), a checkpoint in it, or an export")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the run computed in")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    options = parser.parse_args()
    for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if (value := getattr(options, name)) < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of bounds: at least {low}")
    model, tokenizer = load_model(find_model(options.checkpoint), options.dtype, choose_device(options.device))
    transformers = import_transformers()
    prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    if prompt.input_ids.shape[1] == 0:
        raise ConfigError('--prompt "" is empty, and the tokenizer names no token to begin with: give a text')
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    torch.manual_seed(options.seed)
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**prompt, max_new_tokens=options.max_new_tokens, streamer=streamer, **sampling)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with(error)
