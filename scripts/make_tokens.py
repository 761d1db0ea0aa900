"""Tokenise a configuration's sources once, so that runs read tokens in the place of text.

    python -m scripts.make_tokens outputs/tokens --config configs/160m.toml
    python -m scripts.make_tokens outputs/tokens --config configs/160m.toml --tokenizer.path path/to/tokenizer
    python -m scripts.make_tokens outputs/tokens --verify

writes a folder for each source, `source-0`, `source-1`, ... (recipes/tokens.py says what is in one), and prints the
sources of the configuration that reads them. The batches of such a run are those of the run on the text, bit for bit;
only a data set on the hub, which is streamed, is shuffled as a whole once it is here. The tokenizer is the
configuration's: a given one, or the BPE that a run would train. Every other key is train.py's.

Work that was interrupted goes on with the shards that are missing when the same command is run again. `--verify`
compares every file with its checksum.
"""

import contextlib
import fnmatch
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from configs.errors import ConfigError, refuse, run_program
from configs.loader import load_config
from configs.schema import JobConfig, Source
from recipes import tokens
from recipes.mixture import load_corpus
from recipes.restore import copy_tokenizer
from recipes.sources import Documents, TextStore, digest_of, stream_texts
from recipes.tokenizer import DocumentTokenizer, load_tokenizer, prepare_tokenizer, token_bytes
from scripts.options import Parser

INTERRUPTS = signal.SIGINT, signal.SIGTERM
Work = tuple[str, np.ndarray | list[str]]  # a shard's name; the places of its documents in the store, or their texts


class _Worker:
    """What a worker process has; set before it is forked, so that nothing is copied."""

    store: TextStore | None
    tokenizer: DocumentTokenizer
    folder: Path
    vocabulary: int
    done: Any  # bytes of text, a counter that all processes share


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM until the end, in a process that is forked until `_begin`: neither dies half-forked."""
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _tokenize(name: str, work: np.ndarray | list[str]) -> None:
    """Write one shard."""

    def encoded() -> Iterator[tuple[int, list[int]]]:
        for each in work:
            text = each if isinstance(each, str) else _Worker.store.text(int(each))  # type: ignore[union-attr]
            yield digest_of(text), _Worker.tokenizer.encode(text, add_bos=True, add_eos=True)
            with _Worker.done.get_lock():
                _Worker.done.value += len(text.encode("utf-8", "surrogatepass"))

    tokens.write_shard(_Worker.folder, name, encoded(), _Worker.vocabulary)


def _local_work(store: TextStore) -> tuple[dict[str, Any], list[Work], list[int]]:
    """What identifies a local source's text, its shards, and their bytes."""
    places, digests = store.digests()
    _, first = np.unique(digests, return_index=True)
    kept = np.sort(first)  # of copies the first
    sizes = np.array([store.size(place) for place in places[kept]], np.int64)
    # So small that a small corpus has a shard for every process, and loses little when it is interrupted.
    shard_bytes = min(tokens.SHARD_BYTES, max(tokens.SHARD_BYTES // 16, int(sizes.sum()) // 64))
    shard = (np.cumsum(sizes) - sizes) // shard_bytes
    bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1), len(kept)]
    work: list[Work] = [
        (f"{number:05}", places[kept][start:stop]) for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    text = hashlib.blake2b(digests[kept].tobytes(), digest_size=16).hexdigest()
    about = {"text": text, "documents": len(kept), "shard_bytes": shard_bytes}
    return about, work, [int(size) for size in np.add.reduceat(sizes, bounds[:-1])]


def _streamed_work(index: int, source: Source, folder: Path) -> Iterator[Work]:
    """The shards of a streamed source, beginning with the first that is missing.

    Raises:
        ConfigError: the texts of the shards before it are not those that the source now begins with.
    """
    number, hashes = 0, [np.zeros(0, np.uint64)]
    while (file := folder / f"{number:05}.json").is_file():
        _read_json(file, "documents")
        hashes.append(np.load(folder / f"{number:05}.hashes.npy", allow_pickle=False))
        number += 1
    for file in folder.glob("[0-9]*.json"):  # written again, or of a longer data set
        if int(file.stem) > number:
            file.unlink()
    stream = iter(stream_texts(index, source))
    for place, expected in enumerate(np.concatenate(hashes)):  # to skip them would read them as well
        example = next(stream, None)
        if example is None or digest_of(example["text"]) != expected:
            raise ConfigError(
                f'{folder} was begun with another state of the data set "{source.path}" (document {place + 1} is not '
                "the same): remove the folder, or name another one, to begin anew"
            )
    texts: list[str] = []
    size = 0
    for example in stream:
        texts.append(example["text"])
        size += len(example["text"])
        if size >= tokens.SHARD_BYTES:
            yield f"{number:05}", texts
            number, texts, size = number + 1, [], 0
    if texts:
        yield f"{number:05}", texts


def _read_json(file: Path, *keys: str) -> dict[str, Any]:
    """An object that this script wrote, with the given keys among its own.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict) or not all(isinstance(values.get(key), int) for key in keys):
            raise ValueError("entries are missing")
    except ValueError as error:
        again = "remove its folder" if file.name == "plan.json" else "remove it"
        raise ConfigError(f"{file} is damaged ({error}): {again} and run the same command again") from None
    return values


def _make_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Begin a folder, or see that it was begun with the same plan."""
    file = folder / "plan.json"
    if file.is_file():
        found = _read_json(file)
        if different := [key for key in plan if found.get(key) != plan[key]]:
            raise ConfigError(
                f"{folder} was begun with another {different[0]}: name another folder, or remove it to begin anew"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not an empty folder: name another one, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    tokens.write_json(file, plan)


def _run(work: Iterator[Work], total: int | None, workers: int, name: str) -> None:
    """Write the shards in parallel, and show what is done and how long the rest will take."""
    context = multiprocessing.get_context("fork")
    _Worker.done = context.Value("q", 0)
    bar = tqdm(
        total=total,
        desc=name,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    executor = ProcessPoolExecutor(workers, context, _begin, (os.getpid(),))
    waiting: set[Future] = set()
    try:
        left = iter(work)
        while True:
            while len(waiting) < 2 * workers and (each := next(left, None)) is not None:
                with _interrupts_later():  # the first call forks the workers
                    waiting.add(executor.submit(_tokenize, *each))
            if not waiting:
                break
            finished, waiting = wait(waiting, 0.5, FIRST_COMPLETED)
            for future in finished:
                future.result()
            bar.update(_Worker.done.value - bar.n)
    except BaseException:
        for process in (executor._processes or {}).values():
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()


def _make(index: int, source: Source, config: JobConfig, out: Path, tokenizer: Path, workers: int) -> Path:
    """The tokens of one source; the folder."""
    folder = out / f"source-{index}"
    _Worker.tokenizer, _Worker.folder = load_tokenizer(tokenizer), folder
    _Worker.vocabulary, _Worker.store = len(token_bytes(str(tokenizer))), None
    plan: dict[str, Any] = {"format": tokens.FORMAT, "tokenizer": _Worker.tokenizer.fingerprint}
    if source.type == "hub":
        plan |= {"source": list(astuple(source)[:-1]), "shard_bytes": tokens.SHARD_BYTES}  # whatever its weight
    else:
        part = [part for part, each in zip(load_corpus(config).parts, _weighted(config), strict=True) if each is source]
        assert isinstance(part[0].train, Documents)
        (store,) = part[0].train.stores
        assert isinstance(store, TextStore)
        about, shards, sizes = _local_work(store)
        plan |= about
        _Worker.store = store
    _make_plan(folder, plan)
    with contextlib.suppress(ConfigError):  # a manifest that is missing or damaged is written from the shards
        tokens.read_manifest(folder)
        print(f"{folder} is complete")
        return folder
    copy_tokenizer(tokenizer, folder / "tokenizer")
    if source.type == "hub":
        _run(_streamed_work(index, source, folder), None, workers, folder.name)
    else:
        missing = [place for place, (name, _) in enumerate(shards) if not (folder / f"{name}.json").is_file()]
        if len(missing) < len(shards):
            print(f"{folder}: {len(shards) - len(missing)} of {len(shards)} shards are there already")
        workers = min(workers, max(1, len(missing)))  # all of them are forked at once
        _run((shards[place] for place in missing), sum(sizes[place] for place in missing), workers, folder.name)
    manifest = {
        **{key: plan[key] for key in ("format", "tokenizer")},
        "vocabulary": _Worker.vocabulary,
        "bos": _Worker.tokenizer.bos_id,
        "eos": _Worker.tokenizer.eos_id,
        "source": source.path or source.type,
        "shards": [_read_json(file, "documents", "tokens") for file in sorted(folder.glob("[0-9]*.json"))],
    }
    for key in ("documents", "tokens"):
        manifest[key] = sum(shard[key] for shard in manifest["shards"])
    tokens.write_json(folder / "manifest.json", manifest)
    print(f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    return folder


def _weighted(config: JobConfig) -> list[Source]:
    return [source for source in config.data.sources if source.weight > 0]


def _reads(path: str, file: Path) -> bool:
    """Whether a local source's path, a folder, a file or a pattern, takes in a file."""
    pattern = os.path.abspath(os.path.expanduser(path))
    return fnmatch.fnmatch(str(file.resolve()), pattern) or file.resolve().is_relative_to(Path(pattern).resolve())


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m scripts.make_tokens", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("out", help="the folder to write; it comes before the keys of train.py")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    parser.add_argument("--verify", action="store_true", help="compare the files that are there with their checksums")
    options, words = parser.parse_known_args(arguments)
    before = arguments[max(0, arguments.index(options.out) - 1)]
    if before in words:  # argparse takes the value of a key that it does not know for the folder
        raise ConfigError(f"{before} {options.out}: name the folder to write first, before the keys of train.py")
    if not options.out.strip():
        raise ConfigError('"" names no folder: name the one to write, such as outputs/tokens')
    options.out = Path(options.out)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is out of bounds: at least 1")
    if options.verify:
        folders = sorted(file.parent for file in options.out.glob("source-*/plan.json"))
        if not folders:
            raise ConfigError(f"{options.out} holds no source-0: name the folder that this script wrote")
        for folder in folders:
            tokens.verify(folder)
            print(f"{folder}: every file is as it was written")
        return
    # A worker encodes one document at a time, and the tokenizer's threads do not survive the fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config, _ = load_config(words)
    for index, source in enumerate(config.data.sources):
        key = f"data.sources[{index}]"
        if source.type == "tokens":
            raise refuse(f"{key}.type", "tokens", "these are tokens already", "leave the source out")
        if source.type == "hub" and source.validation_split:
            remedy = "leave it empty: a share of the documents is held out by their hashes"
            raise refuse(f"{key}.validation_split", source.validation_split, "tokens have one split", remedy)
        if source.type != "hub" and source.path and _reads(source.path, options.out / "source-0" / "00000.json"):
            problem = f"it takes in {options.out}, whose files would be read as documents the next time"
            raise refuse(f"{key}.path", source.path, problem, "name a folder outside of it to write")
    tokenizer = Path(prepare_tokenizer(config))
    if not (tokenizer / "tokenizer.json").is_file():
        raise refuse("tokenizer.path", str(tokenizer), "it has no tokenizer.json", "save it as such with transformers")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with FileLock(options.out / ".lock", timeout=0):  # two would write the same files
            made = [
                (source, _make(index, source, config, options.out, tokenizer, options.workers))
                for index, source in enumerate(config.data.sources)
                if source.weight > 0
            ]
    except Timeout:
        raise ConfigError(f"{options.out} is being written by another process: wait for it to end") from None
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process was killed, perhaps for lack of memory: the same command goes on; lower --workers"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{options.out} cannot be written ({error.strerror or error}): free space, make it writable or name "
            "another folder; the same command goes on"
        ) from error
    print("\na configuration that reads them says")
    for source, folder in made:
        print(f'\n[[data.sources]]\ntype = "tokens"\npath = {json.dumps(str(folder))}\nweight = {source.weight}')


def run(arguments: list[str]) -> None:
    """`main`, which a signal ends at any time.

    Raises:
        KeyboardInterrupt: a signal came; its message says how to go on.
    """
    for number in INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        main(arguments)
    except KeyboardInterrupt:
        for number in INTERRUPTS:  # a second one would not end it sooner
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt("the same command goes on with the shards that are missing") from None


if __name__ == "__main__":
    run_program(lambda: run(sys.argv[1:]))
