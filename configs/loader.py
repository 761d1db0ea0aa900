"""From TOML files and the command line to a checked JobConfig.

Three layers, each over the one before it: the defaults (`configs/schema.py`), the configuration with its recipe, the
command line (`--section.key value`). Every layer is checked on its own against the schema, so that a message can say
where the value stands; what keys mean together is checked afterwards (`recipes/check.py`).
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import docstring_parser

from configs.errors import ConfigError
from configs.repository import ROOT
from configs.schema import BOUNDS, RECIPE_SECTIONS, REPLACED, WHOLE, JobConfig

USAGE = """usage: torchrun --nproc_per_node=GPUS train.py --config FILE [--recipe FILE] [--check] [--section.key value
...]

  --config FILE         the job, such as configs/debug.toml
  --recipe FILE         what is sparse and when, such as recipes/venom_2of16.toml, instead of the job's own
                        of both a name is enough: --config 160m --recipe columns_half
  --check               only check, and say what would run; --check json prints the resolved configuration as JSON
  --section.key value   any key below; a list or table as TOML: --schedule.phases '[{mode = "dense"}]'
                        docs/glossary.md says what the terms mean

python train.py ... runs the same as one process.
"""


def load_config(args: list[str]) -> tuple[JobConfig, str]:
    """Read the configuration that a command line names.

    Args:
        args: the command line without the program's name.

    Returns:
        The configuration, types and bounds checked, and what `--check` asks for: "text", "json", or "" without it.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of bounds, an unreadable file.
        SystemExit: `--help` was asked for and printed.
    """
    if "--help" in args or "-h" in args:
        print(USAGE + "\n" + "\n".join(_describe(JobConfig)))
        raise SystemExit(0)
    options = _split(args)
    check = (options.pop("check") or "text") if "check" in options else ""
    if check not in ("", "text", "json"):
        raise ConfigError(f"--check {check}: give no value, or json")
    if "config" not in options:
        raise ConfigError("--config is missing: name a job, such as --config configs/debug.toml")
    path = _named(options.pop("config") or "", "configs")

    config = _read_toml(path, "--config")
    for section in set(config) & set(RECIPE_SECTIONS):
        raise ConfigError(f"{path}: [{section}] belongs in a recipe: move it to the file that recipe = names")
    _check(JobConfig, config, "", str(path))

    recipe_path = _named(options.get("recipe", config.get("recipe", JobConfig.recipe)) or "", "recipes")
    recipe = _read_toml(recipe_path, "recipe")
    for section in set(recipe) - set(RECIPE_SECTIONS):
        known = section in {field.name for field in dataclasses.fields(JobConfig)}
        raise ConfigError(
            f"{recipe_path}: [{section}] belongs in a configuration: a recipe holds {', '.join(RECIPE_SECTIONS)}"
            if known
            else f"{recipe_path}: unknown section [{section}]{_nearest(section, RECIPE_SECTIONS)}"
        )
    _check(JobConfig, recipe, "", str(recipe_path))

    overrides: dict[str, Any] = {}
    for key, text in options.items():
        _put(overrides, key, _convert(text, _type_of(key), key, "the command line"))
    _check(JobConfig, overrides, "", "the command line")

    values = _merge(_merge(config, recipe), overrides) | {"recipe": recipe_path}
    if "lr_scheduler.decay_ratio" in options and values.get("schedule", {}).get("decay_with_tail"):
        raise ConfigError(
            f"--lr_scheduler.decay_ratio {options['lr_scheduler.decay_ratio']} goes against decay_with_tail = true of "
            f"{recipe_path}: leave it out, or add --schedule.decay_with_tail false"
        )
    config_built = _built(values, f"{path} or the command line")
    _expand_paths(config_built)
    return config_built, check


def _expand_paths(config: JobConfig) -> None:
    """Let `~` be the home folder and `$NAME` the variable, in every path, also where no shell has read it.

    Raises:
        ConfigError: a variable that is not set.
    """
    holders = [
        (config.job, "dump_folder", "job.dump_folder"),
        (config.tokenizer, "path", "tokenizer.path"),
        (config.tokenizer, "cache_folder", "tokenizer.cache_folder"),
        (config.checkpoint, "initial_load_path", "checkpoint.initial_load_path"),
        *((source, "path", f"data.sources[{i}].path") for i, source in enumerate(config.data.sources)),
    ]
    for holder, name, key in holders:
        path = getattr(holder, name)
        if path and ("~" in path or "$" in path):
            expanded = os.path.expandvars(os.path.expanduser(path))
            if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
                raise ConfigError(
                    f'{key} = "{path}": the variable {unset[0]} is not set: set it, or write the path out'
                )
            setattr(holder, name, expanded)


def _split(args: list[str]) -> dict[str, str | None]:
    """`--a.b c`, `--a.b=c` and the bare flag `--a.b` to {"a.b": "c" or None}."""
    options: dict[str, str | None] = {}
    key = None
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if key in options:
                raise ConfigError(f"--{key} is given twice on the command line: keep one")
            options[key] = value if equals else None
            if equals:
                key = None
        elif key is not None and options[key] is None:
            options[key] = arg
            key = None
        else:
            raise ConfigError(f"{arg!r} on the command line belongs to no option: write --section.key value")
    return options


def _named(path: str, folder: str) -> str:
    """The file that a path or the name of one of the repository's files stands for: debug for configs/debug.toml.

    Raises:
        ConfigError: a name that is none of theirs, nor a file.
    """
    name = path.removesuffix(".toml")
    if os.path.isfile(path) or not re.fullmatch(r"\w+", name):
        return path
    names = sorted(file.stem for file in (ROOT / folder).glob("*.toml"))
    if name in names:  # also where a folder has the name
        return f"{folder}/{name}.toml"
    if os.path.isdir(path):
        return path
    key = "recipe" if folder == "recipes" else "--config"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f'{key} = "{path}" is unknown: {hint}there are {", ".join(names)}')


def _read_toml(path: str, key: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_absolute() and not os.path.exists(file):
        file = ROOT / file
    if path and os.path.isdir(file):
        found = sorted(f"{path.rstrip('/')}/{other.name}" for other in file.glob("*.toml"))
        raise ConfigError(
            f'{key} = "{path}" is a folder: name a file, such as {", ".join(found) or "configs/debug.toml"}'
        )
    if not path or not os.path.isfile(file):
        folder = (
            file.parent if path and os.path.isdir(file.parent) else ROOT / ("recipes" if key == "recipe" else "configs")
        )
        found = sorted(f"{folder.name}/{other.name}" for other in folder.glob("*.toml"))
        raise ConfigError(f'{key} = "{path}": no such file; there are {", ".join(found) or "none beside it"}')
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): make it readable, or name another file") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _keys(cls: type, prefix: str = "") -> list[str]:
    """All dotted keys below a section, the sections themselves included."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{prefix}{name}"
        if name.startswith("_") or key in REPLACED:
            continue
        found.append(key)
        if dataclasses.is_dataclass(hint):
            found += _keys(typing.cast(type, hint), f"{key}.")
    return found


def _nearest(name: str, names) -> str:
    """ "; did you mean X?", or what there is to choose from."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(sorted(names))}"


def _unknown(key: str, cls: type, prefix: str, source: str) -> ConfigError:
    if key in REPLACED:
        return ConfigError(f"{source}: {key} has no meaning here: use {REPLACED[key]} instead")
    name = key.removeprefix(prefix)
    siblings = [other for other in typing.get_type_hints(cls) if f"{prefix}{other}" not in REPLACED and other[0] != "_"]
    close = [] if "." in name else difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    candidates = [f"{prefix}{other}" for other in close or siblings]
    elsewhere = [] if close else difflib.get_close_matches(key, _keys(JobConfig), n=1, cutoff=0.75)
    return ConfigError(f"{source}: unknown key {key}{_nearest(key, elsewhere or candidates)}")


def _type_of(key: str) -> Any:
    cls: Any = JobConfig
    prefix = ""
    for name in key.split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if name not in hints or f"{prefix}{name}" in REPLACED:
            if not hints or f"{prefix}{name}" not in REPLACED:
                raise _unknown(key, cls if hints else JobConfig, prefix if hints else "", "the command line")
            raise _unknown(f"{prefix}{name}", cls, prefix, "the command line")
        cls = hints[name]
        prefix += f"{name}."
    return cls


def _convert(text: str | None, hint: Any, key: str, source: str) -> Any:
    """A command-line word to the type of its key; what does not fit is left for `_check` to refuse."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if text is None:
        if bool not in members:
            raise ConfigError(f"{source}: --{key} needs a value: --{key} {_name_of(hint)}")
        return True
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    is_text = str in members or any(typing.get_origin(member) is Literal for member in members)
    if is_text and text[:1] not in "\"'":
        return text
    if list[str] in members and text[:1] != "[":
        return text.split(",") if text else []
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # not TOML, or a whole number of thousands of digits
        if float in members and re.fullmatch(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?", text):  # 1. and .5, which TOML lacks
            return float(text)
        return {"true": True, "false": False}.get(text.lower(), text)


def _name_of(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_name_of(member) for member in args if member is not type(None))
    if origin is list:
        return f"list of {_name_of(args[0])}"
    if dataclasses.is_dataclass(hint):
        return "table"
    plain = {bool: "true or false", int: "whole number", float: "number", str: "string"}
    return plain.get(hint, str(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        # The largest float is compared with, since math.isfinite does not take longer whole numbers.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check(cls: type, values: dict[str, Any], prefix: str, source: str) -> None:
    """Refuse keys that the schema does not have, values of another type, and values out of bounds."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints or key in REPLACED:
            raise _unknown(key, cls, prefix, source)
        hint = hints[name]
        if not _fits(value, hint):
            whole = isinstance(value, float) and value.is_integer() and _fits(int(value), hint)
            remedy = f", without point and exponent, and at most {WHOLE}" if whole else ""
            if whole and abs(value) <= WHOLE:
                remedy = f", without point and exponent: {int(value)}"
            raise ConfigError(f"{source}: {key} = {_show(value)} should be a {_name_of(hint)}{remedy}")
        if dataclasses.is_dataclass(hint):
            _check(typing.cast(type, hint), value, f"{key}.", source)
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            for index, item in enumerate(value):
                _check(typing.get_args(hint)[0], item, f"{key}[{index}].", source)
        metadata = fields[name].metadata
        low, high = BOUNDS.get(key, (metadata.get("low"), metadata.get("high")))
        if isinstance(value, int) and abs(value) > WHOLE:
            low, high = (-WHOLE if low is None else low), (WHOLE if high is None else high)
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            bounds = f"from {low} to {high}" if high is not None else f"at least {low}"
            raise ConfigError(
                f"{source}: {key} = {_show(value)} is out of bounds: {bounds if low is not None else high}"
            )


def _show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def _built(values: dict[str, Any], source: str) -> JobConfig:
    try:
        return _build(JobConfig, values)
    except ValueError as error:  # a check of torchtitan's, whose message names the key without its section
        raise ConfigError(f"{source}: {error}") from None


def _build(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from checked values; what is not given keeps its default."""
    built = {}
    for name, value in values.items():
        hint = typing.get_type_hints(cls)[name]
        if dataclasses.is_dataclass(hint):
            value = _build(typing.cast(type, hint), value)
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            value = [_build(typing.get_args(hint)[0], item) for item in value]
        elif hint is float:
            value = float(value)
        built[name] = value
    return cls(**built)


def resolved(config: JobConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries, without the keys that have no meaning here."""
    values = dataclasses.asdict(config)
    for key in REPLACED:
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder.get(section, {})
        holder.pop(name, None)
    return values


def as_word(value: Any, inside: bool = False) -> str:
    """A value as TOML text, such as the command line takes.

    Args:
        value: TOML's, or None for a key of a table that is not given.
        inside: of a list or table, or in a message: a string is in quotes.
    """
    match value:
        case dict():
            pairs = []
            for key, item in value.items():
                if item is not None:  # which TOML has not
                    name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else as_word(key, True)
                    pairs.append(f"{name} = {as_word(item, True)}")
            return "{" + ", ".join(pairs) + "}"
        case list():
            return "[" + ", ".join(as_word(item, True) for item in value) + "]"
        case str() if not inside:
            return value
        case str():  # TOML refuses JSON's surrogate pairs, and DEL, which JSON does not escape
            return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")
        case bool():
            return json.dumps(value)
    return str(value)


def restored(values: dict[str, Any], source: str) -> JobConfig:
    """The configuration that `resolved` made a run.json's of.

    Args:
        values: nested dictionaries; keys that they lack keep their defaults.
        source: the file, for messages.

    Raises:
        ConfigError: a key that the schema does not have any more, or a value that does not fit it.
    """
    kept = dict(values)
    for key in REPLACED:  # a run of an older release may still name them
        section, _, name = key.partition(".")
        if isinstance(kept.get(section), dict):
            kept[section] = {other: value for other, value in kept[section].items() if other != name}
    _check(JobConfig, kept, "", source)
    config = _built(kept, source)
    if config.training.mixed_precision_param == "auto":  # a run has settled it; this one is older than the choice
        config.training.mixed_precision_param = "bfloat16"
    return config


def _describe(cls: type, prefix: str = "") -> list[str]:
    """Two lines a key: its name, default and other choices, and the first sentence of what the schema says of it."""
    lines = []
    text = {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(cls).params}
    defaults = cls()
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{prefix}{name}"
        if name.startswith("_") or key in REPLACED:
            continue
        if dataclasses.is_dataclass(hint):
            lines += _describe(typing.cast(type, hint), f"{key}.")
        else:
            default = getattr(defaults, name)
            shown = (
                "[...]" if isinstance(default, list) and default and dataclasses.is_dataclass(default[0]) else default
            )
            sentence = " ".join(text.get(name, "").split()).split(". ")[0].rstrip(".")
            others = [_show(each) for each in typing.get_args(hint) if each != default]
            choices = f" (or {', '.join(others)})" if typing.get_origin(hint) is typing.Literal and others else ""
            lines.append(f"  --{key} {_show(shown)}{choices}\n        {sentence or _name_of(hint)}")
    return lines
