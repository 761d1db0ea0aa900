"""Tokens made once: a folder of memory-mapped shards that a run reads in the place of text.

    FOLDER/00000.tokens.npy    the documents' tokens with bos and eos, one after the other; uint16, or uint32 for
                               vocabularies above 65,536
    FOLDER/00000.ends.npy      int64: where each document ends among the shard's tokens
    FOLDER/00000.hashes.npy    uint64: 64 bits of the hash of each document's text
    FOLDER/00000.json          the shard's counts and checksums, written last
    FOLDER/plan.json           what is being tokenised with what, and how it is cut into shards
    FOLDER/manifest.json       the whole, written when every shard is there
    FOLDER/tokenizer/          the tokenizer

Documents keep the order of the text, and the hashes are those of the text. So the split into what is trained on and
what is held out, the copies that are left out, the shuffle and the batches are those of a run on the text itself, bit
for bit. Empty documents and copies within a source are not written.

A shard is complete once its .json is there, so work that was interrupted goes on with the next shard.
"""

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from configs.errors import ConfigError
from recipes.atomic import write_atomically

FORMAT = 1
ARRAYS = {"tokens": (np.uint16, np.uint32), "ends": (np.int64,), "hashes": (np.uint64,)}
"""The files of a shard, and the dtypes that they may have."""

SHARD_BYTES = 64 << 20  # of text, at most


class TokenStore:
    """The documents of a finished folder of tokens, by their numbers.

    Raises:
        ConfigError: the folder is not finished, or its files are not those that its manifest lists.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.manifest = read_manifest(Path(folder))
        self._shards = [_Shard.open(Path(folder), shard) for shard in self.manifest["shards"]]
        self._starts = np.cumsum([0, *(len(shard.ends) for shard in self._shards)]).tolist()

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return self._starts[-1]

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        hashes = [shard.hashes for shard in self._shards]
        return np.arange(len(self)), np.concatenate([np.zeros(0, np.uint64), *hashes])

    def tokens(self, place: int, tokenizer: Any = None) -> np.ndarray:
        """A document's tokens with bos and eos, a view of the file.

        Raises:
            ConfigError: a token that the vocabulary does not have.
        """
        shard = bisect.bisect_right(self._starts, place) - 1
        found = self._shards[shard].document(place - self._starts[shard])
        if len(found) and found.max() >= self.manifest["vocabulary"]:
            raise ConfigError(
                f"{self.folder} has token {found.max()} in document {place}, of a vocabulary of "
                f"{self.manifest['vocabulary']}: {_remedy(Path(self.folder))}"
            )
        return found

    def text(self, place: int) -> str:
        """A document's text, as far as its tokenizer keeps texts."""
        ids = self.tokens(place).tolist()
        first = self.manifest["bos"] is not None
        last = len(ids) - (self.manifest["eos"] is not None)
        return self._tokenizer.decode(ids[first:last], skip_special_tokens=False)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(os.path.join(self.folder, "tokenizer", "tokenizer.json"))

    def sizes(self) -> list[tuple[str, int]]:
        """Names and sizes of the files."""
        return [
            (name, os.path.getsize(os.path.join(self.folder, name)))
            for shard in self.manifest["shards"]
            for name in (f"{shard['name']}.{kind}.npy" for kind in ARRAYS)
        ]


@dataclass(frozen=True)
class _Shard:
    values: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> "_Shard":
        """The arrays of a shard, memory-mapped; nothing in them is unpickled."""
        arrays = []
        for kind, length in zip(ARRAYS, (about["tokens"], about["documents"], about["documents"]), strict=True):
            file = folder / f"{about['name']}.{kind}.npy"
            try:
                # numpy maps no empty file.
                array = np.load(file, mmap_mode="r" if length else None, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ConfigError(f"{file} cannot be read ({error}): {_remedy(folder)}") from error
            if array.shape != (length,):
                raise ConfigError(f"{file} has {array.shape} entries instead of {length}: {_remedy(folder)}")
            if array.dtype not in ARRAYS[kind]:
                names = " or ".join(np.dtype(each).name for each in ARRAYS[kind])
                raise ConfigError(f"{file} holds {array.dtype} instead of {names}: {_remedy(folder)}")
            arrays.append(array)
        values, ends, hashes = arrays
        starts = np.concatenate([[0], ends])
        if (np.diff(starts) < 0).any() or starts[-1] != len(values):
            file = folder / f"{about['name']}.ends.npy"
            raise ConfigError(f"{file} does not cut {len(values)} tokens into documents: {_remedy(folder)}")
        # The base class: a view of np.memmap costs microseconds for each document.
        return cls(values.view(np.ndarray), np.asarray(ends), np.asarray(hashes))

    def document(self, place: int) -> np.ndarray:
        return self.values[self.ends[place - 1] if place else 0 : self.ends[place]]


def _remedy(folder: Path) -> str:
    return f"remove {folder} and run python -m scripts.make_tokens again"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished folder says of itself.

    Raises:
        ConfigError: it is not finished, or says something else.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        unfinished = (folder / "plan.json").is_file()
        done = "is not finished: run the same python -m scripts.make_tokens again"
        raise ConfigError(
            f"{folder} {done if unfinished else 'holds no tokens: python -m scripts.make_tokens writes them'}"
        )
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        for key in ("tokenizer", "documents", "tokens"):
            manifest[key]
        for key in ("vocabulary", "bos", "eos"):
            if not _is_count(manifest[key]) and (key == "vocabulary" or manifest[key] is not None):
                raise ValueError(f"{key} = {json.dumps(manifest[key])}")
        for shard in manifest["shards"]:
            if Path(shard["name"]).name != shard["name"]:
                raise ValueError(f"a shard named {shard['name']}")
            if not (_is_count(shard["tokens"]) and _is_count(shard["documents"])):
                raise ValueError(f"the counts of shard {shard['name']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}: {error}): {_remedy(folder)}") from None
    return manifest


def verify(folder: Path) -> None:
    """Compare every file of a folder with its checksum.

    Raises:
        ConfigError: the first that differs.
    """
    for shard in read_manifest(folder)["shards"]:
        sums = shard.get("checksums")
        if not isinstance(sums, dict) or sums.keys() != ARRAYS.keys():
            raise ConfigError(f"{folder}/manifest.json lacks checksums of shard {shard['name']}: {_remedy(folder)}")
        for kind, expected in sums.items():
            file = folder / f"{shard['name']}.{kind}.npy"
            try:
                found = _checksum(file)
            except OSError as error:
                raise ConfigError(f"{file} cannot be read ({error}): {_remedy(folder)}") from error
            if found != expected:
                raise ConfigError(f"{file} is damaged (its checksum differs): {_remedy(folder)}")


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_shard(folder: Path, name: str, documents: Iterable[tuple[int, list[int]]], vocabulary: int) -> None:
    """Write a shard.

    Args:
        folder: where to.
        name: of the shard.
        documents: the hash of each text, and its tokens with bos and eos.
        vocabulary: number of tokens that there are, which settles the dtype.
    """
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    parts, lengths, hashes = [np.zeros(0, dtype)], [], []
    for digest, ids in documents:
        parts.append(np.array(ids, dtype))
        lengths.append(len(ids))
        hashes.append(digest)
    ends = np.cumsum(lengths, dtype=np.int64)
    arrays = dict(zip(ARRAYS, (np.concatenate(parts), ends, np.array(hashes, np.uint64)), strict=True))
    checksums = {}
    for kind, array in arrays.items():
        unfinished = folder / f".{name}.{kind}.unfinished"
        with open(unfinished, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        checksums[kind] = _checksum(unfinished)
        os.replace(unfinished, folder / f"{name}.{kind}.npy")
    about = {"name": name, "documents": len(lengths), "tokens": sum(lengths), "checksums": checksums}
    write_json(folder / f"{name}.json", about)


def write_json(file: Path, values: Any) -> None:
    write_atomically(file, json.dumps(values, indent=1) + "\n")
