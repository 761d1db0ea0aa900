"""The parser, options, checks and a line of help that several scripts share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

TERMS = "What the terms mean: docs/glossary.md."  # for ArgumentParser(epilog=...)

LARGEST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse's, which does not take "--" for the value of an option: Python below 3.13 makes it an empty list."""

    def parse_known_args(  # type: ignore[override]  # the base's is overloaded
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("--") and word.partition("=")[2] == "--":
                self.error(f"{word}: -- is no value: give one")
        return super().parse_known_args(words, namespace)


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
    path = Path(text)
    try:
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!a} cannot be written ({error.strerror}): give another") from None
    if not text.strip() or (existing != path and not existing.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!a}: {existing} is no folder: give another path")
    return path


def _out_folder(text: str) -> Path:
    path = _out(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!a} is no folder: give another path")
    return path


def add_out(parser: argparse.ArgumentParser, metavar: str, help: str, former: str | None = None, **more: Any) -> None:
    """Add `-o`, `--out`: the file or folder that a script writes, by the same name in every script.

    Args:
        former: an earlier name of the option, which is refused with the new one.
        more: other arguments of `add_argument`.
    """
    parser.add_argument(
        "-o", "--out", metavar=metavar, type=_out_folder if metavar == "FOLDER" else _out, help=help, **more
    )
    if former:
        parser.add_argument(former, action=_Renamed, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """Refuses an option that has another name now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is called --out now")
