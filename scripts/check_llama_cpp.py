"""Serve an export's GGUF file with llama.cpp and hold it against transformers, as check_vllm.py does with vLLM.

    python -m scripts.export_gguf outputs/debug-hf outputs/debug.gguf --llama-cpp ../llama.cpp
    python -m scripts.check_llama_cpp outputs/debug-hf outputs/debug.gguf --out docs/serving/llama_cpp.json

llama.cpp's server runs in this process, on the CPU, through the package xllamacpp (`pip install xllamacpp`). Both read
the same token ids. Exit status 1: a log-probability differs from transformers', or a token is less likely than another,
by more than check_vllm.TOLERANCE.
"""

import importlib.metadata
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from configs.errors import ConfigError, run_program
from scripts.check_vllm import PROMPTS, TOKENS, compare, report
from scripts.options import Parser, add_out
from scripts.trained import load_model


def answers(server: Any, prompts: dict[str, list[int]]) -> list[Any]:
    """Greedy continuations of prompts' token ids, in the form of vLLM's outputs."""
    outputs = []
    for prompt, ids in prompts.items():
        choice = server.handle_completions(
            {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        )["choices"][0]
        at = choice["logprobs"]["content"]
        completion = SimpleNamespace(
            token_ids=[each["id"] for each in at],
            logprobs=[{each["id"]: SimpleNamespace(logprob=each["logprob"])} for each in at],
            text=choice["text"],
        )
        outputs.append(SimpleNamespace(prompt=prompt, prompt_token_ids=ids, outputs=[completion]))
    return outputs


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="a folder that scripts.export_hf wrote")
    parser.add_argument("gguf", type=Path, help="the same model, as scripts.export_gguf wrote it")
    add_out(parser, "FILE", "write what was found as JSON")
    options = parser.parse_args()
    for path in (options.export / "config.json", options.gguf):
        if not path.is_file():
            raise ConfigError(f"{path} is no file: write it with scripts.export_hf and scripts.export_gguf")
    try:
        import xllamacpp
    except ImportError:
        raise ConfigError("xllamacpp is not installed: pip install xllamacpp") from None
    model, tokenizer = load_model(options.export, "float32", torch.device("cpu"))
    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_gpu_layers = str(options.gguf), 256, 0
    outputs = answers(xllamacpp.Server(wanted), {prompt: tokenizer(prompt).input_ids for prompt in PROMPTS})
    about = {
        "command": shlex.join(["python", "-m", "scripts.check_llama_cpp", *sys.argv[1:]]),
        "architecture": type(model).__name__,
        "hardware": "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("xllamacpp", "transformers", "torch")},
    }
    return report(compare(outputs, model), "llama.cpp", about, options.out)


if __name__ == "__main__":
    run_program(main)
