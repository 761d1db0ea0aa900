"""Write an export as a GGUF file for llama.cpp, by llama.cpp's own converter.

    python -m scripts.export_hf outputs/debug outputs/debug-hf
    python -m scripts.export_gguf outputs/debug-hf outputs/debug.gguf --llama-cpp ../llama.cpp

`--llama-cpp` is a checkout of llama.cpp, whose `convert_hf_to_gguf.py` and `gguf-py` do the work; they need
`pip install sentencepiece`. The converter knows a tokenizer by a hash of what it makes of a text, so it refuses every
tokenizer that was trained for one model. llama.cpp has to know only one thing about such a tokenizer: the rule that
splits a text into words before any pair is merged. The byte-level BPE of recipes/tokenizer.py splits as GPT-2 does, and
this script says so to the converter. A tokenizer of another kind is left to the converter, which may refuse it.

q4_0, which the converter does not write, is made of its f32 by llama.cpp itself: `pip install llama-cpp-python`, which
compiles it.
"""

import ctypes
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from configs.errors import ConfigError, first_line, run_program
from models.hugging_face import import_transformers
from scripts.options import Parser, out_file

CONVERTER = "convert_hf_to_gguf.py"


def splits_as_gpt2(folder: Path) -> bool:
    """Whether a folder's tokenizer.json is a byte-level BPE that splits a text into words as GPT-2 does."""
    try:
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'tokenizer.json'} cannot be read ({error}): export the run anew") from None
    rule, model = spec.get("pre_tokenizer") or {}, spec.get("model") or {}
    return (
        model.get("type") == "BPE"
        and spec.get("normalizer") is None
        and rule.get("type") == "ByteLevel"
        and rule.get("use_regex", True)
        and not rule.get("add_prefix_space")
    )


def load_converter(checkout: Path) -> tuple[ModuleType, Any]:
    """llama.cpp's converter as a module, and its class `TextModel`.

    Raises:
        ConfigError: it is not there or of an older release, or a package that it needs is not installed.
    """
    file = checkout / CONVERTER
    if not file.is_file():
        raise ConfigError(f"--llama-cpp {checkout} holds no {CONVERTER}: name a checkout of ggml-org/llama.cpp")
    import_transformers()  # before the converter imports it, which would take our kernels/ for another package
    sys.path[:0] = [str(checkout / "gguf-py"), str(checkout)]
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        import sentencepiece  # noqa: F401, the converter imports it late, and fails

        spec.loader.exec_module(module)
        from conversion.base import TextModel  # type: ignore[import-not-found]
    except ImportError as error:
        if str(error.name).startswith("conversion"):
            raise ConfigError(f"--llama-cpp {checkout} is too old, without {error.name}: update it") from None
        raise ConfigError(f"{file} needs the package {error.name}: pip install {error.name}") from None
    return module, TextModel


def convert(export: Path, out: Path, checkout: Path, outtype: str) -> None:
    """Run the converter on an export.

    Raises:
        ConfigError: the converter cannot be loaded or refuses the export, or a file cannot be read or written.
    """
    module, text_model = load_converter(checkout)
    known = text_model.get_vocab_base_pre

    def name_of_rule(self: Any, tokenizer: Any) -> str:
        return "gpt-2" if splits_as_gpt2(export) else known(self, tokenizer)

    arguments = sys.argv
    sys.argv = [CONVERTER, str(export), "--outfile", str(out), "--outtype", outtype]
    text_model.get_vocab_base_pre = name_of_rule
    try:
        module.main()
    except OSError as error:
        raise ConfigError(f"{export} cannot be converted ({error}): free space, or repair that file") from error
    except (NotImplementedError, SystemExit, ValueError) as error:
        raise ConfigError(f"{export}: llama.cpp's converter refuses it ({first_line(error)})") from error
    finally:
        text_model.get_vocab_base_pre = known
        sys.argv = arguments


def import_llama_cpp(option: str) -> ModuleType:
    """The package llama-cpp-python.

    Raises:
        ConfigError: it is not installed; `option` needs it.
    """
    try:
        import llama_cpp
    except ImportError:
        raise ConfigError(f"{option} needs llama.cpp as a package: pip install llama-cpp-python") from None
    return llama_cpp


def quantise(source: Path, out: Path) -> None:
    """Write a GGUF file of f32 as one of q4_0.

    Raises:
        ConfigError: llama-cpp-python is not installed, or llama.cpp refuses the file.
    """
    llama_cpp = import_llama_cpp("--outtype q4_0")
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(wanted)):
        raise ConfigError(f"{source} cannot be quantised: its lines above say why")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="a folder that scripts.export_hf wrote")
    parser.add_argument("out", type=out_file, help="the file to write")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", required=True, help="a checkout of llama.cpp")
    parser.add_argument(
        "--outtype", choices=("f32", "f16", "bf16", "q8_0", "q4_0"), default="f32", help="of the matrices; default: f32"
    )
    options = parser.parse_args()
    if not (options.export / "config.json").is_file():
        raise ConfigError(f"{options.export} is no export: python -m scripts.export_hf RUN {options.export}")
    if options.out.exists():
        raise ConfigError(f"{options.out} exists: name another file, or remove it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.outtype == "q4_0":
        import_llama_cpp("--outtype q4_0")  # before the conversion
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:  # a conversion that fails leaves no part of it
        made = Path(folder) / "made.gguf"
        if options.outtype == "q4_0":
            whole = Path(folder) / "f32.gguf"
            convert(options.export, whole, options.llama_cpp, "f32")
            quantise(whole, made)
        else:
            convert(options.export, made, options.llama_cpp, options.outtype)
        os.replace(made, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
