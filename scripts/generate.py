"""Continue a prompt with a model straight from a training checkpoint, on a GPU if there is one.

    python -m scripts.generate outputs/debug --prompt "def main("
    python -m scripts.generate outputs/debug/checkpoint/step-100 --prompt "import" --temperature 0 --max-new-tokens 200

The checkpoint becomes transformers' model in memory (models/hugging_face.py), with its cache of keys and values; an
exported folder does as well as a checkpoint. The FFN is dense, as in any inference. A mixture of experts, which
transformers lacks, runs in the trainer's model: without a cache, each token reads the text so far, and of it at most
as many tokens as a sequence had in training.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError, run_program
from models.hugging_face import import_transformers
from recipes.restore import Checkpoint
from recipes.tokenizer import load_tokenizer
from scripts.options import LARGEST, Parser, check_bounds
from scripts.trained import choose_device, find_model, load_model

COLDEST = 1e-3  # logits over a lower temperature, but for 0, may overflow


@torch.no_grad()
def continue_ids(
    checkpoint: Checkpoint, ids: Tensor, count: int, temperature: float, top_k: int, dtype: str | None, end: int | None
) -> Tensor:
    """Continue token ids by the trainer's own model.

    Args:
        checkpoint: a run's.
        ids: `[S]` int64, on the device where the model is to run.
        count: tokens to add at most.
        temperature: 0 takes the likeliest token.
        top_k: tokens to draw among; 0: all.
        dtype: of products, "float32" or "bfloat16"; None: what the run computed in.
        end: the token that ends a text, the last one that is added; None: there is none.

    Returns:
        `[S + count]` int64 or fewer.
    """
    model, _ = checkpoint.model(ids.device)
    model.train()  # in evaluation the FFNs count their activations, which takes time
    for _ in range(count):
        with checkpoint.autocast(ids.device, dtype):
            logits = model(ids[None, -checkpoint.args.max_seq_len :])[0, -1].float()
        if temperature > 0:
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            token = (logits / temperature).softmax(0).multinomial(1)
        else:
            token = logits.argmax()[None]
        ids = torch.cat([ids, token])
        if token == end:
            break
    return ids


def _continue_experts(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """`main` for a mixture of experts."""
    tokenizer = load_tokenizer(str(checkpoint.tokenizer))
    prompt = tokenizer.encode(options.prompt, add_bos=True, add_eos=False)
    if not prompt:
        raise _empty_prompt()
    torch.manual_seed(options.seed)
    ids = continue_ids(
        checkpoint,
        torch.tensor(prompt, device=choose_device(options.device)),
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.dtype,
        tokenizer.eos_id,
    )
    special = {tokenizer.bos_id, tokenizer.eos_id}
    print(tokenizer.decode([index for index in ids.tolist() if index not in special]))


def _is_utf8(text: str) -> bool:
    """Whether a word of the command line is; bytes that are not arrive as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _empty_prompt() -> ConfigError:
    return ConfigError('--prompt "" is empty, and the tokenizer names no token to begin with: give a text')


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a run's folder (its newest checkpoint), a checkpoint in it, or an export")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the run computed in")
    parser.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    options = parser.parse_args()
    for name, low, high in (
        ("max_new_tokens", 1, LARGEST),
        ("temperature", 0, 1000),
        ("top_k", 0, LARGEST),
        ("seed", 0, 2**63 - 1),
    ):
        check_bounds(options, name, low, high)
    if 0 < options.temperature < COLDEST:
        raise ConfigError(f"--temperature {options.temperature} is out of bounds: give 0, or {COLDEST} to 1000")
    if not _is_utf8(options.prompt):
        raise ConfigError(f"--prompt {options.prompt!a} is no text in UTF-8: write it in UTF-8")
    source = find_model(options.checkpoint)
    if isinstance(source, Checkpoint) and source.args.num_experts:
        _continue_experts(source, options)
        return
    model, tokenizer = load_model(source, options.dtype, choose_device(options.device))
    transformers = import_transformers()
    prompt = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    if prompt.input_ids.shape[1] == 0:
        raise _empty_prompt()
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    torch.manual_seed(options.seed)
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**prompt, max_new_tokens=options.max_new_tokens, streamer=streamer, **sampling)


if __name__ == "__main__":
    run_program(main)
