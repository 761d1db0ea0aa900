"""Batches: row streams that pack documents into sequences, the same global batches on any number of GPUs.

A step trains on B = training.global_batch_size sequences, the rows of the global batch. Row b reads every B-th document
of the mixture (recipes/mixture.py), concatenates their tokens and cuts them:

    bos document b eos bos document b+B eos ...    cut every seq_len + 1 tokens

The first seq_len tokens of a piece are the input, the last seq_len the labels. Rank r of R data-parallel ranks owns the
rows r B/R, ..., (r+1) B/R - 1. In a step it takes one sequence from each of them, `training.local_batch_size` per
micro-batch. A row does not depend on the rank that reads it, so the global batch of every step is the same for any R
and any number of gradient accumulation steps, and losses of runs on 1 and on 8 GPUs can be compared step by step.

With training.dataloader.num_workers > 0 that many processes share the micro-batches of a step, and their rows, in turn.
For local files the batches are the same for any number of processes. For streamed mixtures they are not: `datasets`
draws the sources in another order in a worker process.

Exact resume. The state of a row is its position in its documents and the tokens that packing has left over: for local
documents their number, since they are the last tokens of the document before, and for streams the tokens themselves.
The state of a rank is the states of its rows, by row number, and which row is next. It resumes with exactly the next
sequence, also between two micro-batches and at the end of an epoch. After a whole step it resumes on any number of
ranks and data-loading processes: each loads the states of the rows that it owns now.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import datasets
import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

from configs.errors import STOPPING, ConfigError, LostProcessError, lost_data_process, refuse
from configs.safe_load import PlainUnpickler
from configs.schema import JobConfig
from configs.titan import BaseTokenizer, ParallelAwareDataloader
from recipes.mixture import Corpus, load_corpus, used_sources
from recipes.sources import Documents

logger = logging.getLogger("sparsetitan")


def data_parallel_ranks(config: JobConfig, world: int) -> int:
    """How many of `world` ranks, or groups of them that share a sequence or the model, read data of their own."""
    degrees = config.parallelism
    return world // (
        degrees.tensor_parallel_degree * degrees.pipeline_parallel_degree * degrees.context_parallel_degree
    )


def num_rows(config: JobConfig, dp_world_size: int) -> int:
    """B, the number of sequences in the global batch.

    Args:
        config: the job.
        dp_world_size: number of data-parallel ranks.

    Raises:
        ConfigError: B is no multiple of the sequences that all ranks take at once.
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


def check_loading(config: JobConfig) -> int:
    """Check the keys of batches and data-loading processes, without opening a source.

    Returns:
        The number of rows of the global batch.

    Raises:
        ConfigError: there is no source, or the number of data-loading processes does not divide the micro-batches.
    """
    streamed = any(source.type == "hub" for _, source in used_sources(config))
    ranks = max(1, data_parallel_ranks(config, int(os.environ.get("WORLD_SIZE", "1"))))
    rows = num_rows(config, ranks)
    workers, key = config.training.dataloader.num_workers, "training.dataloader.num_workers"
    if workers > 1 and streamed:
        raise refuse(key, workers, "streamed sources are read by one process", "give 0 or 1")
    if workers > 1 and (micro := rows // ranks // config.training.local_batch_size) % workers:
        problem = f"the processes share the micro-batches of a step, and a rank has {micro}"
        raise refuse(key, workers, problem, f"give a divisor of {micro}, or lower training.local_batch_size")
    return rows


def check_data(config: JobConfig) -> None:
    """Read the sources, so that their faults are reported before process groups, models and GPUs are set up.

    Raises:
        ConfigError: as `check_loading`; or a source is missing, unreadable or empty, or there are fewer documents than
            rows of the global batch.
    """
    rows = check_loading(config)
    corpus = load_corpus(config)
    if not corpus.streamed and len(corpus.documents) < rows:
        problem = f"{len(corpus.documents)} training documents for a global batch of {rows} rows, which each need one"
        remedy = "add documents or lower training.global_batch_size or training.local_batch_size"
        raise refuse("data.sources", [source.path or source.type for source in config.data.sources], problem, remedy)


class Row:
    """A row of the global batch: an endless iterator of sequences, int64 `[seq_len + 1]`, packed from its documents.

    Args:
        documents: the row's documents in order.
        tokenizer: encodes a document with bos and eos.
        seq_len: tokens in a sequence.
    """

    def __init__(self, documents: Documents | datasets.IterableDataset, tokenizer: BaseTokenizer, seq_len: int) -> None:
        self.documents, self.epoch = documents, 0
        self._is_counted = False  # whether `epoch` includes the epoch that is read next, as after a resume
        self._tokenizer, self._length = tokenizer, seq_len + 1
        self._next = 0  # number of the next local document
        self._left = np.zeros(0, np.int32)
        self._found_nothing = False
        self._loaded: dict[str, Any] | None = None  # of a stream, which reports its state only after it has been read

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self._cut(self._left)  # the rest of a long document, in which a checkpoint was saved
        waiting, count = [self._left], len(self._left)
        while True:
            for tokens in self._read_epoch():
                waiting.append(tokens)
                count += len(tokens)
                if count >= self._length:
                    yield from self._cut(np.concatenate(waiting))
                    waiting, count = [self._left], len(self._left)
            self._next = 0
            if isinstance(self.documents, datasets.IterableDataset):
                self.documents.set_epoch(self.documents.epoch + 1)

    def _cut(self, tokens: np.ndarray) -> Iterator[torch.Tensor]:
        """Cut tokens into whole sequences, and keep the rest, which is part of the last document alone."""
        for stop in range(self._length, len(tokens) + 1, self._length):
            self._left = tokens[stop:]
            yield torch.from_numpy(tokens[stop - self._length : stop].astype(np.int64))

    def _read_epoch(self) -> Iterator[np.ndarray]:
        """The tokens, int32 or uint16 or uint32 `[n]`, of each document that is left in this epoch.

        Raises:
            ConfigError: two epochs in a row have no document.
        """
        self.epoch += not self._is_counted
        self._is_counted = found = False
        if isinstance(self.documents, Documents):
            while self._next < len(self.documents):
                found = True
                self._next += 1
                yield self.documents.tokens(self._next - 1, self._tokenizer)
        else:
            for example in self.documents:
                found, self._loaded = True, None
                yield np.array(self._tokenizer.encode(example["text"], add_bos=True, add_eos=True), np.int32)
        # One epoch without a document may be a resumed one that was at its end.
        if not found and self._found_nothing:
            raise ConfigError(
                "data.sources: a row of the global batch finds no document in its part of the stream; "
                "add a source, or lower training.global_batch_size or training.local_batch_size"
            )
        self._found_nothing = not found

    def state_dict(self) -> dict[str, Any]:
        """The row's position after the last sequence that was taken; a copy."""
        if isinstance(self.documents, Documents):
            return {"epoch": self.epoch, "sample_idx": self._next, "left": len(self._left)}
        return {
            "epoch": self.epoch,
            "stream_epoch": self.documents.epoch,
            "data": self._loaded or self.documents.state_dict(),
            "token_buffer": self._left.astype(np.int32).tobytes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the row's position to that of a `state_dict`. Call it before iterating.

        Raises:
            ConfigError: the documents are not those of the state: the tokens that were left over are not there.
        """
        self.epoch, self._is_counted = state["epoch"], state["epoch"] > 0
        if isinstance(self.documents, Documents):
            self._next = state["sample_idx"]
            # Checkpoints of older releases hold the tokens themselves instead of their number.
            left = state["left"] if "left" in state else len(state["token_buffer"]) // 4
            if left:
                there = 0 < self._next <= len(self.documents)
                tokens = self.documents.tokens(self._next - 1, self._tokenizer) if there else self._left
                if len(tokens) < left:
                    raise ConfigError(
                        "data.sources: the documents are not those that the checkpoint was trained on: give those, or "
                        "start another run from it with checkpoint.initial_load_path"
                    )
                self._left = tokens[len(tokens) - left :]
        else:
            self._left = np.frombuffer(state["token_buffer"], np.int32)
            self._loaded = state["data"]
            self.documents.load_state_dict(state["data"])
            # A stream uses a loaded state only if its epoch is that of the state.
            self.documents.set_epoch(state["stream_epoch"])


class RowStreams(torch.utils.data.IterableDataset, Stateful):
    """The sequences of a rank: one from each of its rows in turn, for step 1, for step 2, ...

    Yields ({"input": int64 `[seq_len]`}, labels int64 `[seq_len]`).

    Args:
        corpus: the documents.
        tokenizer: encodes a document with bos and eos.
        seq_len: tokens in a sequence.
        rows: numbers of the rows that this rank owns.
        num_rows: rows of the global batch, B.
        micro_batch: rows of a micro-batch. Each data-loading process owns the rows of whole micro-batches.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: BaseTokenizer,
        seq_len: int,
        rows: range,
        num_rows: int,
        micro_batch: int = 1,
    ):
        self._micro_batch, self._num_rows = micro_batch, num_rows
        self.numbers = list(rows)
        self.rows = [Row(corpus.row(row, num_rows), tokenizer, seq_len) for row in rows]
        for number, row in zip(rows, self.rows, strict=True):
            if isinstance(row.documents, datasets.IterableDataset):
                row.documents.set_epoch(corpus.first_epoch(number, num_rows))
        self._next_row = 0
        self._epoch = 1
        # The loaded states of rows that have not been read since: a stream does not report its state before that.
        self._loaded: list[dict[str, Any] | None] = [None] * len(self.rows)
        self._shared = False

    def _share(self) -> None:
        """In a data-loading process, keep only the rows of its own micro-batches."""
        worker = torch.utils.data.get_worker_info()
        if worker is None or self._shared:
            return
        self._shared = True
        # torchrun and terminals signal this process too, but only the trainer reacts, and ends this process itself.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        own = self.shares(worker.num_workers)[worker.id]
        mine = [i for i, number in enumerate(self.numbers) if number in own]
        self.rows, self._loaded = [self.rows[i] for i in mine], [self._loaded[i] for i in mine]
        self.numbers = own

    def shares(self, processes: int) -> list[list[int]]:
        """The numbers of the rows that each of `processes` data-loading processes owns."""
        shares: list[list[int]] = [[] for _ in range(processes)]
        for index, number in enumerate(self.numbers):
            shares[index // self._micro_batch % processes].append(number)
        return shares

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._share()
        iterators = [iter(row) for row in self.rows]
        while True:
            i = self._next_row
            sequence = next(iterators[i])
            self._loaded[i] = None
            self._next_row = (i + 1) % len(self.rows)
            if self.rows[i].epoch > self._epoch:
                self._epoch = self.rows[i].epoch
                logger.info("a row of the batch has read all of its documents, epoch %d begins", self._epoch)
            yield {"input": sequence[:-1]}, sequence[1:]

    def state_dict(self) -> dict[str, Any]:
        """The positions of all rows after the last sequence that was taken, and which row is next; a copy."""
        self._share()
        return {
            "next_row": self._next_row,
            "epoch": self._epoch,
            "numbers": self.numbers,
            "rows": [loaded or row.state_dict() for loaded, row in zip(self._loaded, self.rows, strict=True)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the rows' positions to those of a `state_dict` of the same rows. Call it before iterating.

        Raises:
            ConfigError: the state has another number of rows.
        """
        self._share()
        if len(state_dict["rows"]) != len(self.rows):
            problem = f"the checkpoint has {len(state_dict['rows'])} rows a data-loading process and this run "
            raise ConfigError(
                f"training.global_batch_size: {problem}{len(self.rows)}; resume with the batch size, the ranks and the "
                "training.dataloader.num_workers of the run"
            )
        self._load(state_dict["rows"], state_dict["epoch"])
        self._next_row = state_dict["next_row"]

    def load_from(self, states: list[dict[str, Any]]) -> None:
        """Set the rows' positions after a whole step of a run with other ranks or data-loading processes.

        Args:
            states: the `state_dict` of every process of that run.

        Raises:
            ConfigError: the global batch has another number of rows, or the states were taken within a step.
        """
        rows = {number: row for state in states for number, row in zip(state["numbers"], state["rows"], strict=True)}
        if len(rows) != self._num_rows:
            raise ConfigError(
                f"training.global_batch_size: the checkpoint has {len(rows)} rows and this run {self._num_rows}; "
                f"resume with training.global_batch_size = {len(rows)}"
            )
        if any(state["next_row"] for state in states):
            raise ConfigError(
                "the checkpoint was saved between two micro-batches of a step: resume it with the data-parallel ranks, "
                "the training.local_batch_size and the training.dataloader.num_workers of the run"
            )
        self._load([rows[number] for number in self.numbers], max(state["epoch"] for state in states))

    def _load(self, states: list[dict[str, Any]], epoch: int) -> None:
        self._epoch, self._loaded = epoch, list(states)
        for row, state in zip(self.rows, states, strict=True):
            row.load_state_dict(state)


class Loader(ParallelAwareDataloader):
    """torchtitan's loader, extended to resume on another number of ranks and data-loading processes.

    Loaded states may hold plain values only, since a pickle can call any function that it names.
    """

    dataset: RowStreams
    _saved_ranks = 0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._processes: set[BaseProcess] = set()

    def expect(self, ranks: int) -> None:
        """Make `state_dict` have the keys of a checkpoint of `ranks` data-parallel ranks until it is loaded."""
        self._saved_ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """The positions of the rank's rows, under the rank's key."""
        if self._saved_ranks:
            return {f"dp_rank_{rank}": b"" for rank in range(self._saved_ranks)} | {"world_size": 0}
        return super().state_dict()

    def __iter__(self) -> Iterator:
        before = set(multiprocessing.active_children())
        try:
            return super().__iter__()
        finally:
            self._processes |= set(multiprocessing.active_children()) - before

    def lost_process(self) -> LostProcessError | None:
        """The error to report if a data-loading process was killed, which PyTorch raises in several ways; else None."""
        with _unreported_deaths():
            for process in self._processes:
                process.join(0.1)  # it may be ending
        for process in self._processes:
            if process.exitcode is not None and process.exitcode < 0:
                error = lost_data_process(signal.Signals(-process.exitcode).name)
                error.alone = True
                return error
        return None

    def close(self) -> None:
        """End the data-loading processes. They ignore SIGTERM, so Python would wait for them at its exit."""
        if self._iterator is not None and self.num_workers:
            self._iterator._shutdown_workers()  # asks them to end, and waits for 5 s
        with _unreported_deaths():  # processes that are stuck, or whose iterator could not be constructed
            for process in self._processes:
                process.kill()
                process.join()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the rows' positions to those of a `state_dict` of any ranks. Call it before iterating.

        Raises:
            ConfigError: the state is damaged, or names a function or a class; or it does not fit the global batch.
        """
        self._saved_ranks = 0
        states: dict[str, list[dict[str, Any]]] = {}
        for key, value in state_dict.items():
            if not isinstance(value, int):  # the number of ranks; what is pickled need not be `bytes`
                try:
                    loaded = PlainUnpickler(io.BytesIO(value)).load()
                    states[key] = _streams_states(loaded)
                except Exception as error:  # a damaged pickle may raise anything
                    raise ConfigError(
                        f"the checkpoint's state of the data loader cannot be read ({error}): it is damaged, or not of "
                        "this program; resume from another checkpoint"
                    ) from error
        in_process = "_snapshot" not in loaded  # as all ranks' were
        same = state_dict["world_size"] == self.dp_world_size and in_process == (self.num_workers == 0)
        if same and self._has_rows_of(states[f"dp_rank_{self.dp_rank}"]):
            super().load_state_dict(state_dict)  # also from between two micro-batches
            return
        everything = [state for rank in states.values() for state in rank]
        if any("numbers" not in state for state in everything):
            raise ConfigError(
                "the checkpoint is of an older release, which did not number rows: resume it with the data-parallel "
                "ranks, the training.local_batch_size and the training.dataloader.num_workers of the run"
            )
        self.dataset.load_from(everything)

    def _has_rows_of(self, states: list[dict[str, Any]]) -> bool:
        """Whether this rank's data-loading processes own the rows of `states`, one state per process."""
        shares = self.dataset.shares(max(1, self.num_workers))
        if any("numbers" not in state for state in states):  # of an older release
            return [len(state["rows"]) for state in states] == [len(share) for share in shares]
        return [state["numbers"] for state in states] == shares


def end_quietly(_number: int) -> None:
    """In a data-loading process: print no traceback where the trainer has ended while a batch was sent to it."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError):
            shown(kind, error, trace)

    sys.excepthook = show  # which the thread calls that sends batches


@contextlib.contextmanager
def _unreported_deaths() -> Iterator[None]:
    """Disable PyTorch's handler of SIGCHLD, which raises an error as soon as a data-loading process dies."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def refused_in_process(error: ConfigError) -> ConfigError:
    """The error without the traceback that PyTorch adds to the message of one from a data-loading process."""
    said = str(error)
    return ConfigError(said.rpartition("ConfigError: ")[2].strip()) if "in DataLoader worker process" in said else error


def _streams_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of `RowStreams` in the state of torchdata's loader: one for each data-loading process."""
    if "_snapshot" not in state:
        return [state["dataset_state"]]
    workers = state["_snapshot"]["_worker_snapshots"]
    return [workers[f"worker_{index}"]["dataset_state"] for index in range(len(workers))]


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig) -> Loader:
    """The rank's training data; the `build_dataloader_fn` of torchtitan's TrainSpec.

    Args:
        dp_world_size: data-parallel degree R.
        dp_rank: this rank's number r among them.
        tokenizer: encodes a document with bos and eos.
        job_config: configuration.

    Returns:
        A loader of micro-batches ({"input": tokens}, labels), both int64 [local_batch_size, seq_len].

    Raises:
        ConfigError: the data cannot be read, or the ranks cannot share the global batch evenly.
    """
    # A row encodes one document at a time, and the tokenizer's threads would not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    training = job_config.training
    rows = num_rows(job_config, dp_world_size)
    own = rows // dp_world_size
    corpus = load_corpus(job_config)
    corpus.check_tokenizer(getattr(tokenizer, "fingerprint", None), "the run's")
    mine = range(dp_rank * own, (dp_rank + 1) * own)
    streams = RowStreams(corpus, tokenizer, training.seq_len, mine, rows, training.local_batch_size)
    return Loader(
        streams,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        batch_size=training.local_batch_size,
        worker_init_fn=end_quietly,
        **asdict(training.dataloader),
    )


def validation_sequences(tokenizer: BaseTokenizer, config: JobConfig) -> torch.Tensor:
    """The sequences of a validation, from held-out documents packed as in training; the same on every rank.

    So that no long document dominates, at least as many documents are read as there are to be sequences, if there are
    so many, and the sequences are taken at equal distances from all of their tokens.

    Args:
        tokenizer: encodes a document with bos and eos.
        config: the job.

    Returns:
        int64 [validation.sequences, seq_len + 1].

    Raises:
        ConfigError: there are not enough held-out documents.
    """
    length, sequences = config.training.seq_len + 1, config.validation.sequences
    corpus = load_corpus(config)
    corpus.check_tokenizer(getattr(tokenizer, "fingerprint", None), "the run's")
    documents = corpus.held_out()
    if documents is None:
        encoded: Iterator[Any] = iter(())
    elif isinstance(documents, Documents):
        encoded = (documents.tokens(index, tokenizer) for index in range(len(documents)))
    else:
        encoded = (tokenizer.encode(document["text"], add_bos=True, add_eos=True) for document in documents)
    found: list[np.ndarray] = []
    count = 0
    for tokens in encoded:
        found.append(np.asarray(tokens, np.int64))
        count += len(tokens)
        if len(found) >= sequences and count >= sequences * length:
            break
    if (packed := count // length) >= sequences:
        chosen = np.arange(sequences) * packed // sequences
        return torch.from_numpy(np.concatenate(found)[: packed * length].reshape(packed, length)[chosen])
    problem = f"the held-out documents give only {packed} sequences of {length - 1} tokens"
    remedy = "lower it, raise data.validation_share, or add documents"
    raise refuse("validation.sequences", sequences, problem, remedy)
