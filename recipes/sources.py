"""Sources of documents: each becomes a Hugging Face data set with the one column `text`.

A document whose hash falls below `data.validation_share` is held out. This depends on its text alone, so copies of a
document never end up on both sides. Empty documents are left out.

Local files (stdlib, text, json, parquet) are memory-mapped (Arrow) and shuffled as a whole. Of a document that is there
several times, in one source or in two, only the first copy is read: to read a text more often, give it a weight. Data
sets on the hub are streamed, with copies, and only the order of their files (shards) is shuffled: a shuffle buffer
would be lost when a run resumes.
"""

import functools
import glob
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow.parquet

from configs.errors import ConfigError, refuse
from configs.schema import Source

TEXT = datasets.Features({"text": datasets.Value("string")})
SUFFIXES = {"json": (".jsonl", ".json", ".jsonl.gz", ".json.gz"), "parquet": (".parquet",), "text": ("",)}
Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class Part:
    """One source of a mixture, cut into what is trained on and what is held out."""

    weight: float
    train: Documents
    held_out: Documents | None
    files: tuple[tuple[str, int], ...]
    """Relative path and size of each local file: a cheap fingerprint."""

    copies: int = 0
    """Documents left out, since they are exact copies of others."""


def _digest(text: str) -> int:
    """64 bits of a document's hash: among ten million documents two would share one with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation set: a property of its text alone, on any machine."""
    return _digest(text) < share * 2**64


def _stdlib_files() -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return [file for file in files if os.path.isfile(file)]


def _find_files(key: str, source: Source) -> tuple[str, list[str]]:
    """The files of a local source, sorted by the path relative to the folder that comes first."""
    if source.type == "stdlib":
        root, files = sysconfig.get_path("stdlib"), _stdlib_files()
        return root, sorted(files, key=lambda file: os.path.relpath(file, root))
    remedy = "give an existing file, folder or glob"
    if not source.path:
        raise refuse(key, source.path, f'a source of type "{source.type}" needs a path', remedy)
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):
        return os.path.dirname(path) or ".", [path]
    if os.path.isdir(path):
        # As a glob does, this passes over hidden files and folders, such as .git.
        found = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
        files = [file for file in found if os.path.isfile(file) and file.endswith(SUFFIXES[source.type])]
        if not files:
            ends = " or ".join(SUFFIXES[source.type])
            problem = f"the folder holds no file{' that ends in ' + ends if ends else ''}"
            raise refuse(key, source.path, problem, remedy)
        return path, sorted(files)
    if not glob.has_magic(path):
        raise refuse(key, source.path, "no such file or folder", remedy)
    files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise refuse(key, source.path, "no file matches", remedy)
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]), files


def _read_whole_files(files: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for file in files:
        with open(file, "rb") as stream:
            content = stream.read()
        try:
            # Control bytes are legal UTF-8, but a zero byte is the mark of a binary file.
            if b"\0" not in content:
                yield {"text": content.decode("utf-8")}
        except UnicodeDecodeError:
            continue


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_column(key: str, column: str, features: datasets.Features) -> None:
    if column not in features:
        there = ", ".join(sorted(features))
        raise refuse(key, column, "no such column", f"the columns are: {there}")
    kind = features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise refuse(key, column, f"the column does not hold text but {kind}", "choose a column of strings")


def _load_files(key: str, source: Source, files: list[str]) -> datasets.Dataset:
    """Local files as a memory-mapped data set with the column `text`."""
    if source.type in ("stdlib", "text"):
        if next(_read_whole_files(tuple(files)), None) is None:
            raise refuse(f"{key}.path", source.path, "no file in it is UTF-8 text", "give other files")
        # The name of the cached Arrow file: edited files must not give yesterday's documents.
        stats = [(os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        fingerprint = hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()
        return datasets.Dataset.from_generator(
            _read_whole_files, features=TEXT, gen_kwargs={"files": tuple(files)}, fingerprint=fingerprint
        )
    options = {}
    if source.type == "parquet":  # only the column that is needed gets copied to the Arrow file
        for file in files:
            schema = pyarrow.parquet.read_schema(file)
            _check_column(f"{key}.column", source.column, datasets.Features.from_arrow_schema(schema))
        options["columns"] = [source.column]
    escaped = [glob.escape(file) for file in files]
    dataset = datasets.load_dataset(source.type, data_files=escaped, split="train", **options)
    _check_column(f"{key}.column", source.column, dataset.features)
    dataset = dataset.select_columns([source.column])
    if source.column != "text":
        dataset = dataset.rename_column(source.column, "text")
    return dataset if dataset.features == TEXT else dataset.cast(TEXT)


def load_local(index: int, source: Source, share: float, seed: int, seen: np.ndarray) -> tuple[Part, np.ndarray]:
    """The part of a local source, and the digests of its documents and those `seen` in the sources before it."""
    key = f"data.sources[{index}]"
    root, files = _find_files(f"{key}.path", source)
    # A broken file is reported once, by the error below, not by the library's log as well.
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        dataset = _load_files(key, source, files)
    except ConfigError:
        raise
    except Exception as error:
        problem = f"the files cannot be read as {source.type} ({_cause(error)})"
        remedy = "repair or leave out the broken file" if source.type in ("json", "parquet") else "check the files"
        raise refuse(f"{key}.path", source.path, problem, remedy) from error
    finally:
        datasets.logging.set_verbosity(verbosity)

    batches = (enumerate(dataset[start : start + 1000]["text"], start) for start in range(0, len(dataset), 1000))
    filled = np.array([(i, _digest(text)) for batch in batches for i, text in batch if text], dtype=np.uint64)
    places, digests = filled.reshape(-1, 2).T
    unique, first = np.unique(digests, return_index=True)
    new = np.sort(first[~np.isin(unique, seen)])
    held = digests[new] < np.uint64(math.ceil(share * 2**64))  # as `is_held_out`
    rng = np.random.default_rng((seed, index))
    train, held_out = (dataset.select(rng.permutation(places[new][side].astype(np.int64))) for side in (~held, held))
    copies = len(places) - len(new)
    if len(train) == 0:
        problem = (
            f"no training document ({len(dataset)} documents read, {len(held_out)} held out, {copies} copies of "
            "others, the rest empty)"
        )
        remedy = "add documents, lower data.validation_share, or give the source weight 0"
        raise refuse(f"{key}.path", source.path, problem, remedy)
    sizes = tuple((os.path.relpath(file, root), os.path.getsize(file)) for file in files)
    return Part(source.weight, train, held_out, sizes, copies), np.union1d(seen, unique)


def _hub_error(key: str, source: Source, split: str, split_key: str, error: Exception) -> ConfigError:
    """Say which key the hub's answer is about, and what helps."""
    cause = _cause(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        remedy = "check the name (and log in with `hf auth login` if it is private or gated), or use a local source"
        return refuse(f"{key}.path", source.path, "the hub has no such data set for you", remedy)
    if isinstance(error, ValueError) and "config" in cause.lower():
        names = " ".join(str(error).split())
        return refuse(f"{key}.name", source.name, names, "give one of the data set's configurations")
    if isinstance(error, ValueError) and "split" in cause.lower():
        return refuse(f"{key}.{split_key}", split, cause, "give one of the data set's splits")
    remedy = "check the network and the name, or use a local source (stdlib, text, json, parquet)"
    return refuse(f"{key}.path", source.path, f"the hub cannot be read ({cause})", remedy)


def _only_text(example: dict[str, Any], column: str) -> dict[str, str]:
    return {"text": example[column] or ""}


def _on_side(example: dict[str, Any], share: float, held_out: bool) -> bool:
    return bool(example["text"]) and is_held_out(example["text"], share) == held_out


def _load_stream(key: str, source: Source, split_key: str) -> datasets.IterableDataset:
    """A split of a data set on the hub as a stream with the column `text`."""
    split = getattr(source, split_key)
    try:
        stream = datasets.load_dataset(source.path, source.name or None, split=split, streaming=True)
        if stream.features is None:
            stream = stream._resolve_features()
        features = stream.features or datasets.Features()
    except Exception as error:
        raise _hub_error(key, source, split, split_key, error) from error
    _check_column(f"{key}.column", source.column, features)
    read = functools.partial(_only_text, column=source.column)
    return stream.map(read, remove_columns=list(features), features=TEXT)


def load_hub(index: int, source: Source, share: float) -> Part:
    key = f"data.sources[{index}]"
    if not source.path:
        raise refuse(f"{key}.path", "", 'a source of type "hub" needs a data set\'s name', 'such as "allenai/c4"')
    stream = _load_stream(key, source, "split")
    if source.validation_split:
        train = stream.filter(functools.partial(_on_side, share=0.0, held_out=False))
        whole = _load_stream(key, source, "validation_split")
        held_out = whole.filter(functools.partial(_on_side, share=1.0, held_out=True))
    else:
        train = stream.filter(functools.partial(_on_side, share=share, held_out=False))
        held_out = stream.filter(functools.partial(_on_side, share=share, held_out=True)) if share else None
    try:
        first = next(iter(train), None)
    except Exception as error:
        raise _hub_error(key, source, source.split, "split", error) from error
    if first is None:
        raise refuse(f"{key}.split", source.split, "no training document", "choose another split or data set")
    return Part(source.weight, train, held_out, ())
