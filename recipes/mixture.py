"""The corpus: all sources with a weight, mixed by weight, and the documents of it that each row of a batch reads.

Row b of B reads the documents b, b + B, b + 2B, ... of the mixture. A streamed source has no index to pick these by.
With at least B shards, row b reads the shards b, b + B, ...; with fewer, several rows read one shard and each takes its
turn of the documents, which costs each of them the download of the whole shard.
"""

import functools
import sys
from dataclasses import astuple
from typing import Any

import datasets
import numpy as np

from configs.errors import ConfigError, refuse
from configs.schema import JobConfig, Source
from recipes.sources import Documents, Part, load_hub, load_local
from recipes.tokens import TokenStore


def _row_of_part(part: Documents | datasets.IterableDataset, row: int, rows: int) -> datasets.IterableDataset:
    """A row's own documents of one source, as a stream."""
    if isinstance(part, Documents):
        # A source with fewer documents than there are rows is read whole by each of them.
        return (part.select(slice(row, None, rows)) if len(part) >= rows else part).to_stream()
    shards = min(part.num_shards, rows)
    stream = part.shard(shards, row % shards, contiguous=False)
    readers = len(range(row % shards, rows, shards))
    if readers > 1:
        stream = stream.filter(functools.partial(_is_turn, turn=row // shards, readers=readers), with_indices=True)
    return stream


def _is_turn(example: dict[str, Any], index: int, turn: int, readers: int) -> bool:
    return index % readers == turn


class Corpus:
    """The mixture of all sources with a weight."""

    def __init__(self, parts: list[Part], seed: int):
        self.parts = parts
        self.seed = seed
        self.streamed = any(isinstance(part.train, datasets.IterableDataset) for part in parts)

    def token_stores(self) -> list[TokenStore]:
        """The sources that are tokens already."""
        stores = [store for part in self.parts if isinstance(part.train, Documents) for store in part.train.stores]
        return [store for store in stores if isinstance(store, TokenStore)]

    def check_tokenizer(self, fingerprint: str | None, name: str) -> None:
        """Refuse tokens that another tokenizer has made: to this one the same ids are other text.

        Args:
            fingerprint: of the tokenizer (recipes/tokenizer.py).
            name: of the tokenizer, for the message.

        Raises:
            ConfigError: there are some.
        """
        for store in self.token_stores():
            if store.manifest["tokenizer"] != fingerprint:
                raise ConfigError(
                    f"data.sources: the tokens in {store.folder} were made with another tokenizer than {name}: leave "
                    "tokenizer.path empty, or run python -m scripts.make_tokens with it"
                )

    @functools.cached_property
    def documents(self) -> Documents:
        """The training documents of an epoch, in order, if no source is streamed.

        An epoch ends when every document has been drawn; those of sources that end sooner come again, so that the
        weights hold throughout. Shuffled sources in random order make a shuffled mixture.
        """
        return self._mix_local([(part.weight, part.train) for part in self.parts], "all_exhausted")

    def row(self, row: int, rows: int) -> Documents | datasets.IterableDataset:
        """The training documents of one row of the global batch.

        Args:
            row: the row's number b.
            rows: the number of rows B. Rows 0 to B - 1 of one B share out the mixture.
        """
        if not self.streamed:
            return self.documents.select(slice(row, None, rows))
        return self._mix([(part.weight, _row_of_part(part.train, row, rows)) for part in self.parts], "all_exhausted")

    def summary(self) -> list[str]:
        """What was read of the local sources and what was not, in lines for a person."""
        lines = []
        for index, part in enumerate(self.parts):
            if isinstance(part.train, Documents):
                name = f"source {index + 1} of {len(self.parts)}"
                held_out = len(part.held_out) if isinstance(part.held_out, Documents) else 0
                read, *rest = part.report.lines()
                lines.append(
                    f"{name}: {read}; {len(part.train):,} documents to train on, {held_out:,} held out, "
                    f"{part.copies:,} copies left out"
                )
                lines += [f"{name}: {line}" for line in rest]
        return lines

    def first_epoch(self, row: int, rows: int) -> int:
        """The number of a streamed row's first epoch.

        From an epoch's number alone `datasets` draws both the order of the shards and the sources of the documents. So
        rows start far apart: counting from 0, they would all draw the same source at the same time.
        """
        return 1 + ((self.seed * rows + row) % 2**40 << 16)

    def held_out(self) -> Documents | datasets.IterableDataset | None:
        """The documents for validation in their shuffled order, each of them once; None if nothing is held out."""
        parts = []
        for part in self.parts:
            documents = part.held_out
            if documents is None or (isinstance(documents, Documents) and len(documents) == 0):
                continue
            if self.streamed and isinstance(documents, Documents):
                documents = documents.to_stream()
            parts.append((part.weight, documents))
        if not parts:
            return None
        return (self._mix if self.streamed else self._mix_local)(parts, "all_exhausted_without_replacement")

    def _mix_local(self, parts: list[tuple[float, Any]], stopping_strategy: Any) -> Documents:
        """Local documents in the order in which `datasets` draws from the parts; it is asked with their numbers."""
        if len(parts) == 1:
            return parts[0][1]
        stops = np.cumsum([len(documents) for _, documents in parts])
        numbers = [
            (weight, datasets.Dataset.from_dict({"number": np.arange(stop - len(documents), stop)}))
            for (weight, documents), stop in zip(parts, stops, strict=True)
        ]
        order = self._mix(numbers, stopping_strategy).with_format("numpy")[:]["number"]
        owners = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(documents) for _, documents in parts])
        stores = tuple(documents.stores[0] for _, documents in parts)
        return Documents(stores, owners, np.concatenate([documents.places for _, documents in parts])).select(order)

    def _mix(self, parts: list[tuple[float, Any]], stopping_strategy: Any) -> Any:
        if len(parts) == 1:
            return parts[0][1]
        total = sum(weight for weight, _ in parts)
        probabilities = [weight / total for weight, _ in parts]
        return datasets.interleave_datasets(
            [documents for _, documents in parts],
            probabilities=probabilities,
            seed=self.seed,
            stopping_strategy=stopping_strategy,
        )


@functools.cache
def _load_corpus(sources: tuple[tuple, ...], share: float, seed: int) -> Corpus:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    parts = []
    seen = np.array([], dtype=np.uint64)
    for index, fields in enumerate(sources):
        source = Source(*fields)
        if source.weight > 0 and source.type == "hub":
            parts.append(load_hub(index, source, share))
        elif source.weight > 0:
            part, seen = load_local(index, source, share, seed, seen)
            parts.append(part)
    return Corpus(parts, seed)


def used_sources(config: JobConfig) -> list[tuple[int, Source]]:
    """The sources with a weight above 0, by their index in data.sources; none of them is looked at.

    Raises:
        ConfigError: there is none, or they cannot be mixed.
    """
    if not config.data.sources:
        raise refuse("data.sources", [], "nothing to train on", "give at least one [[data.sources]] table")
    used = [(index, source) for index, source in enumerate(config.data.sources) if source.weight > 0]
    if not used:
        raise refuse("data.sources[0].weight", 0.0, "the weights of all sources are 0", "raise one above 0")
    for index, source in used:
        if source.type == "hub" and not source.path:
            problem, remedy = 'a source of type "hub" needs a data set\'s name', 'such as "allenai/c4"'
            raise refuse(f"data.sources[{index}].path", "", problem, remedy)
    tokens = [source.path for _, source in used if source.type == "tokens"]
    if tokens and any(source.type == "hub" for _, source in used):
        raise ConfigError(
            f'data.sources: "{tokens[0]}" holds tokens, which are not mixed with a streamed source: run '
            "python -m scripts.make_tokens on that one as well"
        )
    return used


def load_corpus(config: JobConfig) -> Corpus:
    """The corpus of a configuration, read once in a process.

    Raises:
        ConfigError: a source is missing, unreadable or empty.
    """
    used_sources(config)
    sources = tuple(astuple(source) for source in config.data.sources)
    return _load_corpus(sources, config.data.validation_share, config.data.seed)
