"""Options and a line of help that several scripts share."""

import argparse
from pathlib import Path
from typing import Any

TERMS = "What the terms mean: docs/glossary.md."  # for ArgumentParser(epilog=...)


def add_out(parser: argparse.ArgumentParser, metavar: str, help: str, former: str | None = None, **more: Any) -> None:
    """Add `-o`, `--out`: the file or folder that a script writes, by the same name in every script.

    Args:
        former: an earlier name of the option, which is refused with the new one.
        more: other arguments of `add_argument`.
    """
    parser.add_argument("-o", "--out", metavar=metavar, type=Path, help=help, **more)
    if former:
        parser.add_argument(former, action=_Renamed, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """Refuses an option that has another name now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is called --out now")
