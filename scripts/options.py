"""The parser, options, checks and a line of help that several scripts share."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

TERMS = "What the terms mean: docs/glossary.md."  # for ArgumentParser(epilog=...)

LARGEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse's, with refusals that it lacks.

    "--" is no value of an option: Python below 3.13 makes it an empty list. A path, as `type=Path` makes it, must not
    have a name that is too long or lie in a folder that may not be read. One to read must not be a device: some, such
    as /dev/zero, have no end.
    """

    def parse_known_args(  # type: ignore[override]  # the base's is overloaded
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if re.fullmatch("--[^=]*=--|-[^-]=?--", word):
                self.error(f"{word}: -- is no value: give one")
        options, others = super().parse_known_args(words, namespace)
        for name, value in vars(options).items():
            for path in value if isinstance(value, list) else [value]:
                try:
                    if isinstance(path, Path) and path.is_char_device() and name != "out":
                        self.error(f"{path} is a device: give another path")
                except OSError as error:
                    self.error(f"{str(path)[:80]!a}: {error.strerror}: give another path")
        return options, others


def check_bounds(options: argparse.Namespace, name: str, low: float, high: float = LARGEST) -> None:
    """Check the number that an option was given, if it was.

    Args:
        name: the option's attribute, such as "top_k".

    Raises:
        ConfigError: it is not between the bounds, or no number.
    """
    value = getattr(options, name)
    if value is not None and not low <= value <= high:  # NaN as well
        raise ConfigError(f"--{name.replace('_', '-')} {value} is out of bounds: give {low} to {high}")


def _out(text: str) -> Path:
    """A path that can be written to, as far as can be told before it is written to."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!a} names nothing: give a path")
    path = Path(text)
    for each in (path, *path.parents):  # the folder above one that is not there yet has no name to be made by
        if each.name == ".." and not os.path.exists(each):
            raise argparse.ArgumentTypeError(f"{text!a}: there is no folder {each}: give another path")
    existing = next(each for each in (path, *path.absolute().parents) if os.path.exists(each))
    if existing != path and not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{text!a}: {existing} is no folder: give another path")
    if not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!a}: {existing} may not be written to: give another path")
    return path


def out_folder(text: str) -> Path:
    """The type of an option or argument: a folder that can be written to, which need not be there yet."""
    path = _out(text)
    if os.path.exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!a} is no folder: give another path")
    return path


def out_file(text: str) -> Path:
    """The type of an option or argument: a file that can be written, which need not be there yet."""
    path = _out(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!a} is a folder: name the file to write")
    return path


def add_out(parser: argparse.ArgumentParser, metavar: str, help: str, former: str | None = None, **more: Any) -> None:
    """Add `-o`, `--out`: the file or folder that a script writes, by the same name in every script.

    Args:
        former: an earlier name of the option, which is refused with the new one.
        more: other arguments of `add_argument`.
    """
    kind = out_folder if metavar == "FOLDER" else out_file
    parser.add_argument("-o", "--out", metavar=metavar, type=kind, help=help, **more)
    if former:
        parser.add_argument(former, action=_Renamed, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """Refuses an option that has another name now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is called --out now")
