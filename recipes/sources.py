"""Sources of documents: files, tokens made of them, and data sets on the hub.

A document whose hash falls below `data.validation_share` is held out. This depends on its text alone, so copies of a
document never end up on both sides. Empty documents are left out.

Local sources (stdlib, files of text, JSON lines and Parquet, tokens) are memory-mapped and shuffled as a whole. Of a
document that is there several times, in one source or in two, only the first copy is read: to read a text more often,
give it a weight. Data sets on the hub are streamed, with copies, and only the order of their files (shards) is
shuffled: a shuffle buffer would be lost when a run resumes.
"""

import bisect
import functools
import glob
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import datasets
import numpy as np

from configs.errors import ConfigError, first_line, refuse
from configs.schema import Source
from recipes.files import (
    ColumnError,
    DamagedError,
    Report,
    choose_kinds,
    find_files,
    kind_of,
    load_documents,
)
from recipes.tokens import TokenStore

LOCAL = "auto", "text", "json", "parquet", "stdlib"  # types of sources whose files are read here
TEXT = datasets.Features({"text": datasets.Value("string")})
NAMES = {"text": "text", "json": ".jsonl, .ndjson or .json", "parquet": ".parquet"}


class Tokenizer(Protocol):
    """What turns a document into tokens."""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]: ...


class Store(Protocol):
    """The documents of a local source, by their places in it."""

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of the documents that are not empty, int64 [N], and 64 bits of their texts' hashes, uint64 [N]."""

    def text(self, place: int) -> str: ...

    def tokens(self, place: int, tokenizer: Tokenizer) -> np.ndarray:
        """The document's tokens with bos and eos, integers [T]."""


class TextStore:
    """Documents as text, in the column `text` of a memory-mapped data set."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self._chunks = dataset.data.table.column("text").chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)]).tolist()

    def __reduce__(self) -> tuple:
        return TextStore, (self.dataset,)

    def __len__(self) -> int:
        return len(self.dataset)

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        # As bytes, without a copy of each text.
        values = (value.as_buffer() for chunk in self._chunks for value in chunk)
        filled = [(place, _digest(value)) for place, value in enumerate(values) if value is not None and value.size]
        places, digests = np.array(filled, dtype=np.uint64).reshape(-1, 2).T
        return places.astype(np.int64), digests

    def text(self, place: int) -> str:
        chunk = bisect.bisect_right(self._starts, place) - 1
        return self._chunks[chunk][place - self._starts[chunk]].as_py()

    def size(self, place: int) -> int:
        """Bytes of a document, in UTF-8."""
        chunk = bisect.bisect_right(self._starts, place) - 1
        return self._chunks[chunk][place - self._starts[chunk]].as_buffer().size

    def tokens(self, place: int, tokenizer: Tokenizer) -> np.ndarray:
        return np.array(tokenizer.encode(self.text(place), add_bos=True, add_eos=True), np.int32)


@dataclass(frozen=True)
class Documents:
    """Documents of one local source or several, in an order."""

    stores: tuple[Store, ...]
    owners: np.ndarray
    """uint16 [N]: which store has the document."""

    places: np.ndarray
    """int64 [N]: where it is in there."""

    @classmethod
    def of(cls, store: Store, places: np.ndarray) -> "Documents":
        """Documents of one store, by their places."""
        return cls((store,), np.zeros(len(places), np.uint16), places)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": self.text(index)} for index in range(len(self)))

    def text(self, index: int) -> str:
        return self.stores[self.owners[index]].text(int(self.places[index]))

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """The tokens of a document with bos and eos, integers [T]."""
        return self.stores[self.owners[index]].tokens(int(self.places[index]), tokenizer)

    def select(self, indices: np.ndarray | slice) -> "Documents":
        return Documents(self.stores, self.owners[indices], self.places[indices])

    def to_stream(self) -> datasets.IterableDataset:
        """As a stream, to be mixed with others; of one store of text."""
        (store,) = self.stores
        assert isinstance(store, TextStore)
        return store.dataset.select(self.places).to_iterable_dataset()


@dataclass(frozen=True)
class Part:
    """One source of a mixture, cut into what is trained on and what is held out."""

    weight: float
    train: Documents | datasets.IterableDataset
    held_out: Documents | datasets.IterableDataset | None
    files: tuple[tuple[str, int], ...]
    """Relative path and size of each local file: a cheap fingerprint."""

    copies: int = 0
    """Documents left out, since they are exact copies of others."""

    report: Report = field(default_factory=Report)
    """What was read of a local source, and what was not."""


def digest_of(text: str) -> int:
    """64 bits of the hash of a document."""
    return _digest(text.encode("utf-8", "surrogatepass"))


def _digest(text: Any) -> int:
    """64 bits of the hash of UTF-8 bytes: of ten million documents two would share one with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation set: a property of its text alone, on any machine."""
    return digest_of(text) < share * 2**64


def _stdlib_files() -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return [file for file in files if os.path.isfile(file)]


def find_source(key: str, source: Source, report: Report) -> tuple[str, list[str]]:
    """The files of a local source, sorted, and the folder that their names are relative to."""
    if source.type == "stdlib":
        root, files = sysconfig.get_path("stdlib"), _stdlib_files()
        return root, sorted(files, key=lambda file: os.path.relpath(file, root))
    remedy = "give an existing file, folder or glob"
    if not source.path:
        raise refuse(key, source.path, f'a source of type "{source.type}" needs a path', remedy)
    path = source.path
    try:
        root, files = find_files(path, report)
    except OSError as error:
        raise refuse(key, source.path, f"{error.filename} cannot be read ({error.strerror})", remedy) from error
    if os.path.isdir(path) and source.type in ("json", "parquet"):
        for file in files:
            if kind_of(file) != source.type:
                report.leave_out(f"no {NAMES[source.type]}", file)
        files = [file for file in files if kind_of(file) == source.type]
    if not files:
        ends = f" that ends in {NAMES[source.type]}" if source.type in ("json", "parquet") else ""
        problem = "no file matches" if glob.has_magic(path) else "no such file or folder"
        if os.path.lexists(path):
            problem = f"the folder holds no file{ends}" if os.path.isdir(path) else "it is no regular file"
        raise refuse(key, source.path, problem, remedy)
    return root, files


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _check_column(key: str, column: str, features: datasets.Features) -> None:
    if column not in features:
        there = ", ".join(sorted(features))
        raise refuse(key, column, "no such column", f"the columns are: {there}")
    kind = features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise refuse(key, column, f"the column does not hold text but {kind}", "choose a column of strings")


def _load_files(key: str, source: Source, files: list[str], report: Report) -> TextStore:
    """The documents of local files."""
    try:
        asked = "text" if source.type == "stdlib" else source.type
        kinds = choose_kinds(files, asked, source.column, report)
        dataset = load_documents(kinds, source.column, report)
    except ColumnError as error:
        raise refuse(f"{key}.column", source.column, error.problem, error.remedy) from None
    except DamagedError as error:
        remedy = "repair it, or leave it out"
        raise refuse(f"{key}.path", source.path, f"a file cannot be read ({error})", remedy) from error
    except OSError as error:
        problem = f"the documents cannot be kept in {datasets.config.HF_DATASETS_CACHE} ({first_line(error)})"
        remedy = "make room there, or set HF_DATASETS_CACHE to another folder"
        raise refuse(f"{key}.path", source.path, problem, remedy) from error
    if not report.documents.total():
        reasons = "; ".join(report.lines()[1:]) or "they are empty"
        raise refuse(f"{key}.path", source.path, f"no file in it holds text ({reasons})", "give other files")
    return TextStore(dataset)


def load_tokens(key: str, source: Source, report: Report) -> TokenStore:
    """The documents of a folder that scripts.make_tokens wrote."""
    path = source.path
    if not os.path.isdir(path):
        problem = "no such folder" if source.path else 'a source of type "tokens" needs a path'
        raise refuse(key, source.path, problem, "give a folder that python -m scripts.make_tokens wrote")
    try:
        store = TokenStore(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    report.files["tokens"] = len(store.manifest["shards"])
    report.documents["tokens"] = len(store)
    report.bytes["tokens"] = report.file_bytes = sum(size for _, size in store.sizes())
    return store


def load_local(index: int, source: Source, share: float, seed: int, seen: np.ndarray) -> tuple[Part, np.ndarray]:
    """The part of a local source, and the digests of its documents and those `seen` in the sources before it."""
    key, report = f"data.sources[{index}]", Report()
    store: TextStore | TokenStore
    if source.type == "tokens":
        store = load_tokens(f"{key}.path", source, report)
        sizes = tuple(store.sizes())
    else:
        root, files = find_source(f"{key}.path", source, report)
        store = _load_files(key, source, files, report)
        sizes = tuple((os.path.relpath(file, root), os.path.getsize(file)) for file in files)
    places, digests = store.digests()
    unique, first = np.unique(digests, return_index=True)
    new = np.sort(first[~np.isin(unique, seen)])
    held = digests[new] < np.uint64(math.ceil(share * 2**64))  # as `is_held_out`
    rng = np.random.default_rng((seed, index))
    train, held_out = (Documents.of(store, rng.permutation(places[new][side])) for side in (~held, held))
    copies = len(places) - len(new)
    if len(train) == 0:
        problem = (
            f"no training document ({len(store)} documents read, {len(held_out)} held out, {copies} copies of "
            "others, the rest empty)"
        )
        remedy = "add documents, lower data.validation_share, or give the source weight 0"
        raise refuse(f"{key}.path", source.path, problem, remedy)
    return Part(source.weight, train, held_out, sizes, copies, report), np.union1d(seen, unique)


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


def stream_texts(index: int, source: Source) -> datasets.IterableDataset:
    """All documents of a data set on the hub that are not empty, with the one column `text`."""
    return _load_stream(f"data.sources[{index}]", source, "split").filter(_is_filled)


def _is_filled(example: dict[str, Any]) -> bool:
    return bool(example["text"])


def load_hub(index: int, source: Source, share: float) -> Part:
    key = f"data.sources[{index}]"
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
