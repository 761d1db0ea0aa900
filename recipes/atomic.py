"""Files and folders that are there as a whole or not at all, however a process ends: their names come last."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace a file atomically: after a crash of the process or machine it holds the old text or the new one."""
    unfinished = f"{os.fspath(path)}.tmp"
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(Path(path).parent)  # makes the new name durable


def sync(path: str | os.PathLike) -> None:
    """Make a file's bytes durable, or the names in a folder: they survive a crash of the machine."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` when the context ends; an error in it leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        unfinished = Path(temporary) / folder.name  # not the temporary one, which other users may not read
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, folder)
