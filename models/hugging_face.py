"""The same model in the names and conventions of Hugging Face transformers, both ways.

A Llama with an ungated squared-ReLU FFN is transformers' `ArceeForCausalLM`, one with SwiGLU its `LlamaForCausalLM`, so
nothing is approximated and no code travels with the weights. Names apart, one thing differs. RoPE turns pairs of a
head's entries by an angle a pair: torchtitan's pairs are neighbours (2i, 2i + 1), transformers' are half a head apart
(i, i + D/2). What a pair is called does not matter as long as queries and keys agree, so the rows of wq and wk
are permuted head by head; torchtitan's own adapter for Llama does that, and the FFN's names are all it lacks.

Clustering has left the neurons in another order than they began in. That needs no undoing: h is summed over the
neurons, W1's rows and W2's columns moved together, and no other tensor knows of them.
"""

import importlib.metadata
import json
import os
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

import kernels
from configs.errors import ConfigError, first_line
from configs.titan import Llama3StateDictAdapter, RoPEScalingArgs
from models.llama import LlamaArgs


class StateDictAdapter(Llama3StateDictAdapter):
    """`to_hf` and `from_hf`, between the two models' parameters by name."""

    def __init__(self, args: LlamaArgs) -> None:
        super().__init__(args, None)
        if not args.swiglu:
            del self.from_hf_map["model.layers.{}.mlp.gate_proj.weight"]
            self.from_hf_map["model.layers.{}.mlp.up_proj.weight"] = "layers.{}.feed_forward.w1.weight"


def export_config(
    args: LlamaArgs, hidden_dim: int, dtype: torch.dtype, bos: int | None, eos: int | None
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        args: the model's; `max_seq_len` is what it was trained at, unless `max_position_embeddings` is given.
        hidden_dim: rows of W1; of a SwiGLU two thirds of the arguments'.
        dtype: of the weights.
        bos, eos: ids of the tokens that begin and end a document; None if there is none.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    scaling = asdict(args.rope_scaling_args)
    if (factor := scaling.pop("scaling_factor")) != 1:
        rope = {"rope_type": "llama3", "factor": factor, **scaling}
    return {
        "architectures": ["LlamaForCausalLM" if args.swiglu else "ArceeForCausalLM"],
        "model_type": "llama" if args.swiglu else "arcee",
        "hidden_act": "silu" if args.swiglu else "relu2",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "max_position_embeddings": args.max_position_embeddings or args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        # transformers 5 reads rope_parameters, older releases and other engines rope_theta and rope_scaling.
        "rope_parameters": {**rope, "rope_theta": float(args.rope_theta)},
        "rope_theta": float(args.rope_theta),
        **({} if rope["rope_type"] == "default" else {"rope_scaling": rope}),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name before transformers 4.56
    }


def import_args(config: dict[str, Any], source: str) -> LlamaArgs:
    """The arguments of the model that a config.json describes.

    Raises:
        ConfigError: a model that the trainer does not have.
    """

    def refuse(key: str, value: Any, remedy: str) -> ConfigError:
        return ConfigError(f"{source}: {key} = {value} is no model of this trainer: {remedy}")

    def number(key: str, value: Any, kind: type[int] | type[float] = int) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < 2**31:
            raise ConfigError(f"{source}: {key} = {json.dumps(value)} is no number above 0: restore the model's own")
        return kind(value)

    if not isinstance(config, dict):
        raise ConfigError(f"{source} holds no object: give the config.json that the model was saved with")
    kind = config.get("model_type")
    if kind not in ("arcee", "llama"):
        raise refuse("model_type", kind, 'give a folder of "arcee" (squared ReLU) or "llama" (SwiGLU)')
    swiglu = kind == "llama"
    activation, wanted = config.get("hidden_act"), "silu" if swiglu else "relu2"
    if activation != wanted:
        raise refuse("hidden_act", activation, f"its FFN has {wanted}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise refuse(key, True, "its linear layers have no biases")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{source}: rope_parameters = {json.dumps(rope)} is no object: restore the model's own")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise refuse("rope_type", rope_type, 'its RoPE is not scaled, or scaled as "llama3" does')
    try:
        width, layers, heads, hidden_dim, vocab_size, length = (
            number(key, config[key])
            for key in (
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
                "max_position_embeddings",
            )
        )
        norm_eps = number("rms_norm_eps", config["rms_norm_eps"], float)
        theta = number("rope_theta", rope.get("rope_theta") or config["rope_theta"], float)
        scaling = RoPEScalingArgs(scaling_factor=1.0)
        if rope_type == "llama3":
            factor, low, high = (
                number(key, rope[key], float) for key in ("factor", "low_freq_factor", "high_freq_factor")
            )
            original = number("original_max_position_embeddings", rope["original_max_position_embeddings"])
            if high <= low:
                raise refuse("high_freq_factor", high, f"a number above low_freq_factor = {low} is needed")
            if factor < 1:
                raise refuse("factor", factor, "a factor of RoPE's wavelengths of at least 1 is needed")
            scaling = RoPEScalingArgs(factor, low, high, original)
    except KeyError as error:
        raise ConfigError(f"{source}: {error} is missing: give the config.json that the model was saved with") from None
    kv_heads = number("num_key_value_heads", config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads} is needed")
    head_dim = config.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise refuse("head_dim", head_dim, f"its {heads} heads make up the hidden_size = {width}")
    args = LlamaArgs(
        dim=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        hidden_dim=hidden_dim * 3 // 2 if swiglu else hidden_dim,
        swiglu=swiglu,
        vocab_size=vocab_size,
        max_seq_len=length,
        norm_eps=norm_eps,
        rope_theta=theta,
        rope_scaling_args=scaling,
    )
    if swiglu and hidden_dim % args.multiple_of:
        raise refuse("intermediate_size", hidden_dim, f"its SwiGLU's width is a multiple of {args.multiple_of}")
    return args


def load_export(folder: str | os.PathLike, dtype: torch.dtype | str = "auto") -> Any:
    """transformers' model of a Hugging Face folder: every one of its weights is the folder's, and no code is run.

    transformers itself fills a weight that a folder lacks with random numbers, passes over one that it has no use for,
    and unpickles a `.bin`.

    Raises:
        ConfigError: the folder cannot be loaded, or does not hold the model's weights, all and no others.
    """
    try:
        model, info = import_transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be loaded ({first_line(error)}): export it anew") from error
    for problem in ("missing", "unexpected", "mismatched"):
        if names := sorted(str(name) for name in info.get(f"{problem}_keys") or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(
                f"{folder}: {names[0]}{more}: {problem} among its weights by config.json's model: export it anew"
            )
    return model


def load_export_tokenizer(folder: str | os.PathLike) -> Any:
    """transformers' tokenizer of a Hugging Face folder.

    Raises:
        ConfigError: there is none.
    """
    try:
        return import_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what it raises depends on the file that is damaged
        raise ConfigError(f"{folder}: no tokenizer can be loaded ({first_line(error)}): export it anew") from error


def import_transformers() -> ModuleType:
    """transformers, kept from taking this repository's kernels/ for Hugging Face's package of that name.

    It asks whether a `kernels` can be imported, which ours can, and then how new it is: of the installed package where
    there is one, of ours otherwise. Both answers have to be ours, and it asks once.

    Raises:
        ConfigError: it is not installed.
    """
    version = importlib.metadata.version

    def answer(distribution_name: str) -> str:
        return kernels.__version__ if distribution_name == "kernels" else version(distribution_name)

    importlib.metadata.version = answer
    try:
        import transformers
        from transformers.utils.import_utils import is_kernels_available

        assert not is_kernels_available()
    except ImportError:
        raise ConfigError('transformers is not installed: pip install -e ".[serve]"') from None
    finally:
        importlib.metadata.version = version
    transformers.utils.logging.disable_progress_bar()
    return transformers
