"""Documents in, global batches out, the same ones on any number of GPUs.

A corpus is a mixture of sources. Each source becomes a Hugging Face data set with the one column `text`; a document
whose hash falls below `data.validation_share` is held out, whatever its place, so copies of a document never end up on
both sides; the sources are mixed by weight and shuffled. Local files are memory-mapped (Arrow) and shuffled as a
whole, and of a document that is there several times, in one source or in two, the first copy alone is read: whoever
wants a text more often gives it a weight. Data sets on the hub are streamed, with copies, and only the order of their
files (shards) is shuffled: a shuffle buffer would be lost when a run resumes.

**Row streams.** A step trains on B = training.global_batch_size sequences, the rows of the global batch. Row b reads
the documents b, b + B, b + 2B, ... of the mixture and packs them on its own, as

    bos document b eos bos document b+B eos ...    cut every seq_len + 1 tokens

into input = the first seq_len tokens and label = the last seq_len. A row thus never asks which rank it lives on:
data-parallel rank r of R owns the rows r B/R, ..., (r+1) B/R - 1 and takes one sequence from each of them in a step,
`training.local_batch_size` to a micro-batch. The global batch of every step is the same for any R and any number of
gradient accumulation steps, which makes runs on 1 and on 8 GPUs comparable loss by loss.

Where one data-loading process encodes too slowly for a GPU, training.dataloader.num_workers of them share the
micro-batches of a step, and the rows with them, in turn. For local files the micro-batches are the same for any number
of processes; a run resumes with its own number.

A row is a HuggingFaceTextDataset of torchtitan, and its state is what that keeps: its place in its documents and the
tokens left over from packing. The state of a rank is the state of its rows and which row is next, so a run resumes with
exactly the next sequence, also from between two micro-batches and across the end of an epoch.

A streamed source has no index to pick documents b, b + B, ... by. With at least B shards, row b reads the shards b,
b + B, ...; with fewer, several rows read one shard and each keeps its turn of the documents, which costs each of them
the download of the whole shard. `datasets` draws the sources of a streamed mixture differently in a worker process, so
there training.dataloader.num_workers changes the order; nothing else depends on it.
"""

import functools
import glob
import hashlib
import json
import logging
import math
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow.parquet
import torch
from torch.distributed.checkpoint.stateful import Stateful

from configs.errors import ConfigError
from configs.schema import JobConfig, Source
from configs.titan import DATASETS, BaseTokenizer, DatasetConfig, HuggingFaceTextDataset, ParallelAwareDataloader

logger = logging.getLogger("sparsetitan")

DATASET = "sparsetitan"  # the rows' name in torchtitan's registry of data sets
TEXT = datasets.Features({"text": datasets.Value("string")})
SUFFIXES = {"json": (".jsonl", ".json", ".jsonl.gz", ".json.gz"), "parquet": (".parquet",), "text": ("",)}
Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset


def refuse(key: str, value: Any, problem: str, remedy: str) -> ConfigError:
    """The error for a key's value, in the one form that all of them have."""
    return ConfigError(f"{key} = {json.dumps(value)}: {problem}; {remedy}")


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


def _load_local(index: int, source: Source, share: float, seed: int, seen: np.ndarray) -> tuple[Part, np.ndarray]:
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


def _load_hub(index: int, source: Source, share: float) -> Part:
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


def _row_of_part(part: Documents, row: int, rows: int) -> datasets.IterableDataset:
    """A row's own documents of one source, as a stream."""
    if isinstance(part, datasets.Dataset):
        # A source with fewer documents than there are rows is read whole by each of them.
        own = part.shard(rows, row, contiguous=False) if len(part) >= rows else part
        return own.to_iterable_dataset()
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

    @functools.cached_property
    def documents(self) -> datasets.Dataset:
        """The training documents of an epoch, in order, if no source is streamed.

        An epoch ends when every document has been drawn; those of sources that end sooner come again, so that the
        weights hold throughout. Shuffled sources in random order make a shuffled mixture.
        """
        return self._mix([(part.weight, part.train) for part in self.parts], "all_exhausted")

    def row(self, row: int, rows: int) -> Documents:
        """The training documents of one row of the global batch.

        Args:
            row: the row's number b.
            rows: the number of rows B. Rows 0 to B - 1 of one B share out the mixture.
        """
        if not self.streamed:
            return self.documents.shard(rows, row, contiguous=False)
        return self._mix([(part.weight, _row_of_part(part.train, row, rows)) for part in self.parts], "all_exhausted")

    def first_epoch(self, row: int, rows: int) -> int:
        """The number of a streamed row's first epoch.

        From an epoch's number alone `datasets` draws both the order of the shards and the sources of the documents. So
        rows start far apart: counting from 0, they would all draw the same source at the same time.
        """
        return 1 + ((self.seed * rows + row) % 2**40 << 16)

    def held_out(self) -> Documents | None:
        """The documents for validation in their shuffled order, each of them once; None if nothing is held out."""
        parts = []
        for part in self.parts:
            documents = part.held_out
            if isinstance(documents, datasets.Dataset):
                if len(documents) == 0:
                    continue
                documents = documents.to_iterable_dataset() if self.streamed else documents
            if documents is not None:
                parts.append((part.weight, documents))
        return self._mix(parts, "all_exhausted_without_replacement") if parts else None

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
            parts.append(_load_hub(index, source, share))
        elif source.weight > 0:
            part, seen = _load_local(index, source, share, seed, seen)
            parts.append(part)
    return Corpus(parts, seed)


def load_corpus(config: JobConfig) -> Corpus:
    """The corpus of a configuration, read once in a process.

    Raises:
        ConfigError: a source is missing, unreadable or empty.
    """
    if not config.data.sources:
        raise refuse("data.sources", [], "nothing to train on", "give at least one [[data.sources]] table")
    weights = [source.weight for source in config.data.sources]
    if sum(weights) <= 0:
        raise refuse("data.sources[0].weight", weights[0], "the weights of all sources are 0", "raise one above 0")
    sources = tuple(astuple(source) for source in config.data.sources)
    return _load_corpus(sources, config.data.validation_share, config.data.seed)


def num_rows(config: JobConfig, dp_world_size: int) -> int:
    """B, the number of rows of the global batch.

    Raises:
        ConfigError: they cannot be shared out evenly among the ranks and their micro-batches.
    """
    training = config.training
    together = training.local_batch_size * dp_world_size
    if training.global_batch_size < 0:
        return together
    if training.global_batch_size == 0 or training.global_batch_size % together:
        problem = (
            f"not a multiple of training.local_batch_size = {training.local_batch_size} times the data-parallel degree "
            f"{dp_world_size}"
        )
        remedy = f"give a multiple of {together}"
        raise refuse("training.global_batch_size", training.global_batch_size, problem, remedy)
    return training.global_batch_size


def check_data(config: JobConfig) -> None:
    """Read the sources, so that whatever is wrong with them is said before processes, models and GPUs are set up.

    Raises:
        ConfigError: a source is missing, unreadable or empty, there are fewer documents than rows of the batch, or the
            micro-batches cannot be shared out among the data-loading processes.
    """
    corpus = load_corpus(config)
    degrees = config.parallelism
    other = degrees.tensor_parallel_degree * degrees.pipeline_parallel_degree * degrees.context_parallel_degree
    ranks = max(1, int(os.environ.get("WORLD_SIZE", "1")) // other)
    rows = num_rows(config, ranks)
    workers, key = config.training.dataloader.num_workers, "training.dataloader.num_workers"
    if workers > 1 and corpus.streamed:
        raise refuse(key, workers, "streamed sources are read by one process", "give 0 or 1")
    if workers > 1 and (micro := rows // ranks // config.training.local_batch_size) % workers:
        problem = f"the processes share the micro-batches of a step, and a rank has {micro}"
        raise refuse(key, workers, problem, f"give a divisor of {micro}, or lower training.local_batch_size")
    if not corpus.streamed and len(corpus.documents) < rows:
        problem = f"{len(corpus.documents)} training documents for a global batch of {rows} rows, which each need one"
        remedy = "add documents or lower training.global_batch_size or training.local_batch_size"
        raise refuse("data.sources", [source.path or source.type for source in config.data.sources], problem, remedy)


def _text_of(example: dict[str, Any]) -> str:
    return example["text"]


def _is_not_reloop(record: logging.LogRecord) -> bool:
    return record.msg != f"Dataset {DATASET} is being re-looped"


class Row(HuggingFaceTextDataset):
    """torchtitan's packing of a stream of documents, which here counts its epochs and does not loop over nothing."""

    epoch = 0
    _found_nothing = False

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        self.epoch += 1
        documents = 0
        for documents, sample in enumerate(super()._get_data_iter(), 1):  # noqa: B007
            yield sample
        # A resumed epoch may have been at its end; one more without a document is one of many.
        if documents == 0 and self._found_nothing:
            raise ConfigError(
                "data.sources: a row of the global batch finds no document in its part of the stream; "
                "add a source, or lower training.global_batch_size or training.local_batch_size"
            )
        self._found_nothing = documents == 0


class RowStreams(torch.utils.data.IterableDataset, Stateful):
    """One sequence from each row of a rank in turn: the rank's part of step 1, of step 2, ...

    Yields ({"input": int64 [seq_len]}, label int64 [seq_len]).

    Args:
        corpus: what to read.
        tokenizer: encodes a document with bos and eos.
        seq_len: tokens in a sequence.
        rows: numbers of the rows that this rank owns.
        num_rows: rows of the global batch, B.
        micro_batch: rows of a micro-batch. Of several data-loading processes each owns whole ones.
        infinite: start a row over when it has read its documents. Else the stream ends with the first row that ends.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: BaseTokenizer,
        seq_len: int,
        rows: range,
        num_rows: int,
        micro_batch: int = 1,
        infinite: bool = True,
    ):
        self._micro_batch = micro_batch
        # torchtitan finds a row's documents by the registered name and a path, here "row/rows".
        DATASETS[DATASET] = DatasetConfig(
            path="0/1", loader=lambda path: corpus.row(*map(int, path.split("/"))), sample_processor=_text_of
        )
        self.rows = [Row(DATASET, f"{row}/{num_rows}", tokenizer, seq_len, infinite=infinite) for row in rows]
        if corpus.streamed:
            for number, row in zip(rows, self.rows, strict=True):
                row._data.set_epoch(corpus.first_epoch(number, num_rows))
        # torchtitan warns whenever a row starts over; one line an epoch, below, says as much.
        logging.getLogger().addFilter(_is_not_reloop)
        self._next_row = 0
        self._epoch = 1
        # States that have been loaded into rows that have not moved since. A stream that has not moved does not know
        # its state.
        self._loaded: list[dict[str, Any] | None] = [None] * len(self.rows)
        self._shared = False

    def _share(self) -> None:
        """Keep the rows of this data-loading process's micro-batches; the others have theirs."""
        worker = torch.utils.data.get_worker_info()
        if worker is None or self._shared:
            return
        self._shared = True
        mine = [i for i in range(len(self.rows)) if i // self._micro_batch % worker.num_workers == worker.id]
        self.rows = [self.rows[i] for i in mine]
        self._loaded = [None] * len(mine)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._share()
        iterators = [iter(row) for row in self.rows]
        while True:
            i = self._next_row
            sequence = next(iterators[i], None)
            if sequence is None:
                return
            self._loaded[i] = None
            self._next_row = (i + 1) % len(self.rows)
            if self.rows[i].epoch > self._epoch:
                self._epoch = self.rows[i].epoch
                logger.info("a row of the batch has read all of its documents, epoch %d begins", self._epoch)
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        """Where every row is, as of the last sequence that was taken; a copy."""
        self._share()
        return {
            "next_row": self._next_row,
            "epoch": self._epoch,
            "rows": [loaded or self._row_state(row) for loaded, row in zip(self._loaded, self.rows, strict=True)],
        }

    @staticmethod
    def _row_state(row: Row) -> dict[str, Any]:
        state = row.state_dict()
        state["epoch"] = row.epoch
        # With each micro-batch a process sends the state that it left. The tokens left over can be hundreds of
        # thousands: as a list of numbers they would keep the trainer's process busy where it should launch kernels.
        state["token_buffer"] = np.array(state["token_buffer"], np.int32).tobytes()
        if isinstance(row._data, datasets.IterableDataset):
            state["stream_epoch"] = row._data.epoch
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Call it before iterating.

        Raises:
            ConfigError: the state is of another number of rows.
        """
        self._share()
        if len(state_dict["rows"]) != len(self.rows):
            problem = f"the checkpoint has {len(state_dict['rows'])} rows a data-loading process and this run "
            raise ConfigError(
                f"training.global_batch_size: {problem}{len(self.rows)}; resume with the batch size, the ranks and the "
                "training.dataloader.num_workers of the run"
            )
        self._next_row = state_dict["next_row"]
        self._epoch = state_dict["epoch"]
        self._loaded = list(state_dict["rows"])
        for row, state in zip(self.rows, state_dict["rows"], strict=True):
            row.load_state_dict({**state, "token_buffer": np.frombuffer(state["token_buffer"], np.int32).tolist()})
            row.epoch = max(state["epoch"] - 1, 0)  # it counts again when it starts to read
            if isinstance(row._data, datasets.IterableDataset):
                # A stream heeds a loaded state only in the epoch that the state is of.
                row._data.set_epoch(state["stream_epoch"])


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> ParallelAwareDataloader:
    """The rank's training data; the `build_dataloader_fn` of torchtitan's TrainSpec.

    Args:
        dp_world_size: data-parallel degree R.
        dp_rank: this rank's number r among them.
        tokenizer: encodes a document with bos and eos.
        job_config: configuration.
        infinite: start over at the end of an epoch.

    Returns:
        A loader of micro-batches ({"input": tokens}, labels), both int64 [local_batch_size, seq_len].

    Raises:
        ConfigError: the data cannot be read, or the global batch cannot be shared out.
    """
    # A row encodes one document at a time, and the tokenizer's threads do not survive a fork into a worker process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    training = job_config.training
    rows = num_rows(job_config, dp_world_size)
    own = rows // dp_world_size
    streams = RowStreams(
        load_corpus(job_config),
        tokenizer,
        training.seq_len,
        range(dp_rank * own, (dp_rank + 1) * own),
        rows,
        training.local_batch_size,
        infinite,
    )
    return ParallelAwareDataloader(
        streams,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        batch_size=training.local_batch_size,
        **asdict(training.dataloader),
    )


def validation_sequences(tokenizer: BaseTokenizer, config: JobConfig) -> torch.Tensor:
    """The sequences to validate on: from held-out documents packed as in training; the same on every rank.

    One long document must not stand for all text. So at least as many documents are read as sequences are asked for,
    if there are so many, and the sequences are taken from all of their tokens at equal distances.

    Returns:
        int64 [validation.sequences, seq_len + 1].

    Raises:
        ConfigError: there are not enough held-out documents.
    """
    length, sequences = config.training.seq_len + 1, config.validation.sequences
    tokens: list[int] = []
    for count, document in enumerate(load_corpus(config).held_out() or [], 1):
        tokens += tokenizer.encode(document["text"], add_bos=True, add_eos=True)
        if count >= sequences and len(tokens) >= sequences * length:
            break
    if (packed := len(tokens) // length) >= sequences:
        chosen = torch.arange(sequences) * packed // sequences
        return torch.tensor(tokens[: packed * length], dtype=torch.int64).view(packed, length)[chosen]
    problem = f"the held-out documents give only {len(tokens) // length} sequences of {length - 1} tokens"
    remedy = "lower it, raise data.validation_share, or add documents"
    raise refuse("validation.sequences", sequences, problem, remedy)
