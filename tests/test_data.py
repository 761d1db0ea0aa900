"""Sources, split, mixture, row streams and tokenizer: what a step trains on, also when it resumes."""

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import os
import pickle
import random
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from configs.errors import ConfigError
from configs.schema import JobConfig, Source
from configs.titan import HuggingFaceTokenizer
from recipes import data, files, mixture, progress, tokenizer
from recipes.sources import is_held_out


class Characters:
    """A tokenizer of one token a character, so that tests see what was packed."""

    bos_id, eos_id = 1, 2

    def encode(self, text, add_bos=False, add_eos=False):
        return [1] * add_bos + [ord(c) % 251 + 3 for c in text] + [2] * add_eos


def document(name: str, index: int) -> str:
    return f"{name}{index}:" + "abcdefghij"[index % 10] * (index * 7 % 61)


def make_config(*sources: Source, rows: int = 4, seq_len: int = 16, workers: int = 0, share: float = 0.1) -> JobConfig:
    config = JobConfig()
    config.data.sources = list(sources)
    config.data.validation_share = share
    config.training.seq_len = seq_len
    config.training.local_batch_size = 1
    config.training.global_batch_size = rows
    config.training.dataloader.num_workers = workers
    config.validation.sequences = 4
    return config


def write_files(folder: Path, count: int = 60, name: str = "doc") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index:03}.txt").write_text(document(name, index))
    return folder


def texts(config: JobConfig) -> list[str]:
    return [example["text"] for example in mixture.load_corpus(config).row(0, 1)]


def sequences(config: JobConfig, ranks: int = 1, rank: int = 0):
    """A rank's loader and its micro-batches, int64 [local_batch_size, seq_len + 1]."""
    loader = data.build_dataloader(dp_world_size=ranks, dp_rank=rank, tokenizer=Characters(), job_config=config)

    def batches():
        for batch, labels in loader:
            yield torch.cat([batch["input"], labels[:, -1:]], dim=1)

    return loader, batches()


def global_batches(config: JobConfig, ranks: int, steps: int) -> list[torch.Tensor]:
    """The rows of each step as a [B, seq_len + 1] tensor, gathered from all ranks and micro-batches."""
    micro = config.training.global_batch_size // (ranks * config.training.local_batch_size)
    streams = [sequences(config, ranks, rank)[1] for rank in range(ranks)]
    return [torch.cat([batch for stream in streams for batch in islice(stream, micro)]) for _ in range(steps)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    mixture._load_corpus.cache_clear()


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: names of data sets to their splits, streamed in shards."""
    splits = {}

    def load_dataset(path, name=None, split=None, streaming=False, **options):
        if not streaming:
            return load_local(path, name, split=split, **options)
        found = splits[path]
        if isinstance(found, Exception):
            raise found
        return found[split]

    load_local = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


def stream(name: str, count: int, shards: int) -> datasets.IterableDataset:
    rows = {"body": [document(name, index) for index in range(count)], "id": list(range(count))}
    return datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=shards)


def hub_source(name: str = "org/set", **options) -> Source:
    return Source(type="hub", path=name, column="body", **options)


# Sources


def test_stdlib():
    found = texts(make_config(Source(type="stdlib"), share=0.0))
    assert len(found) > 500
    assert (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8") in found


def test_text_file_folder_and_globs(tmp_path):
    folder = write_files(tmp_path / "corpus", 5)
    write_files(folder / "deeper", 3, "deep")
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    (folder / "other.md").write_bytes(b"kept\r\nas it is")
    top = {document("doc", index) for index in range(5)}
    deep = {document("deep", index) for index in range(3)}
    cases = {
        folder / "001.txt": {document("doc", 1)},
        folder: top | deep | {"kept\r\nas it is"},
        folder / "*.txt": top,
        folder / "**/*.txt": top | deep,
        folder / "00[12].txt": {document("doc", 1), document("doc", 2)},
    }
    for path, expected in cases.items():
        found = texts(make_config(Source(type="text", path=str(path)), share=0.0))
        assert sorted(found) == sorted(expected), path


def test_edited_files_are_read_again(tmp_path):
    folder = write_files(tmp_path / "corpus", 4)
    lines = tmp_path / "lines.jsonl"
    for word in ("first", "other"):
        (folder / "000.txt").write_text(word)
        lines.write_text(json.dumps({"text": word}) + "\n")
        for path in (folder, lines):
            os.utime(path / "000.txt" if path.is_dir() else path, ns=(0, len(word) * 10**9 + hash(word) % 10**9))
        mixture._load_corpus.cache_clear()
        assert word in texts(make_config(Source(type="text", path=str(folder)), share=0.0))
        assert word in texts(make_config(Source(type="json", path=str(lines)), share=0.0))


def test_json_and_parquet(tmp_path):
    rows = [{"body": document("row", index), "id": index} for index in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "json [1]").mkdir()
    (tmp_path / "json [1]" / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    expected = sorted(row["body"] for row in rows)
    for kind, path in (("json", "json [1]"), ("json", "*.gz"), ("parquet", "*.parquet"), ("parquet", "")):
        source = Source(type=kind, path=str(tmp_path / path), column="body")
        assert sorted(texts(make_config(source, share=0.0))) == expected, (kind, path)


def compress(file: Path, suffix: str, content: bytes) -> None:
    if suffix == ".zst":
        with pa.output_stream(f"{file}{suffix}", compression="zstd") as out:
            out.write(content)
    else:
        made = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)
        Path(f"{file}{suffix}").write_bytes(made)


def test_auto_reads_every_kind_by_its_suffix(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    expected = []

    def new() -> str:
        expected.append(document("café", len(expected)))
        return expected[-1]

    def lines(count: int = 2) -> bytes:
        return "".join(json.dumps({"id": 3, "text": new()}) + "\n" for _ in range(count)).encode()

    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        compress(folder / "lines.jsonl", suffix, lines())
        compress(folder / "notes.txt", suffix, new().encode())
    (folder / "UPPER.JSONL").write_bytes(lines())
    (folder / "more.ndjson").write_bytes(b"\xef\xbb\xbf" + lines())
    (folder / "array.json").write_text(json.dumps([{"text": new()}, {"text": new()}], indent=1))
    (folder / "lines.json").write_bytes(lines() + json.dumps({"text": None}).encode())
    datasets.Dataset.from_dict({"text": [new(), new()], "n": [1, 2]}).to_parquet(folder / "table.PARQUET")
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (folder / f"{encoding}.md").write_text(new(), encoding=encoding)
    (folder / "package.json").write_text('{\n "name": "no document"\n}')
    expected.append('{\n "name": "no document"\n}')
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    config = make_config(Source(path=str(folder)), share=0.0)
    assert sorted(texts(config)) == sorted(expected)
    (part,) = mixture.load_corpus(config).parts
    assert part.report.files == {"json": 8, "parquet": 1, "text": 9}
    assert part.report.documents == {"json": 17, "parquet": 2, "text": 9}
    read = sum(len(text.encode()) for text in expected)
    assert part.report.bytes.total() == read
    said = "\n".join(mixture.load_corpus(config).summary())
    assert "JSON lines: 8 files, 17 documents, 0.0 MB; Parquet: 1 files, 2 documents" in said
    assert re.search(r"not read: 1 files, neither UTF-8 nor marked as UTF-16.*first .*latin.txt", said)
    assert re.search(r"not read: 1 files, binary; first .*picture.png", said)
    assert re.search(r'1 files that end in .json and hold no objects with a column "text" .*package.json', said)
    mixture._load_corpus.cache_clear()  # the same is said of what the cache holds
    assert "\n".join(mixture.load_corpus(config).summary()) == said


def test_what_a_kind_does_not_read_is_said(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "first"}\n')
    (folder / "b.txt").write_text("second")
    for kind, expected, said in (
        ("json", {"first"}, r"not read: 1 files, no .jsonl, .ndjson or .json; first .*b.txt"),
        ("text", {'{"text": "first"}\n', "second"}, r'1 files of JSON lines were read as they stand.*"auto".*a.jsonl'),
        ("auto", {"first", "second"}, r"JSON lines: 1 files.* text: 1 files"),
    ):
        config = make_config(Source(type=kind, path=str(folder)), share=0.0)
        assert set(texts(config)) == expected
        assert re.search(said, "\n".join(mixture.load_corpus(config).summary())), kind


def test_only_the_named_column_of_json_lines_matters(tmp_path):
    """Files merged from several places agree in nothing else."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "meta": null, "id": 1}\n{"text": null}\n{"id": "x"}\n\n')
    (tmp_path / "b.jsonl").write_text('{"meta": {"x": [1]}, "text": "b\u2028\\ud83d", "id": "one"}\r\n')
    assert set(texts(make_config(Source(path=str(tmp_path)), share=0.0))) == {"a", "b\u2028\ufffd"}
    for line, message in (
        ('{"body": "c"}', r'column = "text": no such column; the columns are: body \(of .*c.jsonl\)'),
        ('{"text": "c"}\n{"text": 7}', r'"text": the column does not hold text but 7 \(line 2 of .*c.jsonl\)'),
        ('{"text": "c"}\n["c"]', r"c.jsonl: line 2 holds no object"),
        ('{"text": "c"}\n{"text": "d', r"c.jsonl: line 2: Unterminated string"),
        ("[" * 100_000, r"c.jsonl: maximum recursion"),
    ):
        (tmp_path / "c.jsonl").write_text(line)
        mixture._load_corpus.cache_clear()
        with pytest.raises(ConfigError, match=message):
            mixture.load_corpus(make_config(Source(path=str(tmp_path)), share=0.0))


def test_hostile_names_links_and_devices(tmp_path):
    folder = write_files(tmp_path / "a folder [1]*?", 4)
    names = ["new\nline.txt", "漢字 'quoted\".txt", os.fsdecode(b"no-utf8-\xff.txt"), "-rf", "*.txt", "~", "$HOME"]
    for index, name in enumerate(names):
        (folder / name).write_text(document("odd", index))
    (folder / "deep").mkdir()
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "deep" / "again").symlink_to(folder / "deep", target_is_directory=True)
    (folder / "deep" / "linked.txt").symlink_to(folder / "000.txt")
    (folder / "nowhere.txt").symlink_to(folder / "gone.txt")
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("hidden")
    config = make_config(Source(path=str(folder)), share=0.0)
    expected = [document("doc", index) for index in range(4)] + [document("odd", index) for index in range(len(names))]
    assert sorted(texts(config)) == sorted(expected)
    (part,) = mixture.load_corpus(config).parts
    assert part.report.left_out["no regular files"][0] == 2
    assert part.report.left_out["links that lead nowhere"][0] == 2
    for line in mixture.load_corpus(config).summary():
        line.encode("utf-8")  # can be printed
        assert "\n" not in line
    glob_config = make_config(Source(path=str(tmp_path / "**" / "00*.txt")), share=0.0)
    assert sorted(texts(glob_config)) == sorted(document("doc", index) for index in range(4))
    for path in (folder / "pipe.txt", "/dev/zero"):
        with pytest.raises(ConfigError, match="is no regular file"):
            mixture.load_corpus(make_config(Source(path=str(path))))


def test_damaged_compression_and_unreadable_files_are_named(tmp_path, monkeypatch):
    whole = "".join(json.dumps({"text": document("doc", index)}) + "\n" for index in range(60)).encode()
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        folder = tmp_path / suffix
        folder.mkdir()
        compress(folder / "a.jsonl", suffix, whole)
        file = folder / f"a.jsonl{suffix}"
        kept = file.read_bytes()
        # A part that is all ones: an invalid block, which zlib has an error of its own for.
        contents = [b"", kept[: len(kept) // 2], b"\0" * 64, kept[:50] + b"\xff" * 40 + kept[90:]]
        contents.append(kept + b"no header" + kept[9:])  # a second stream that is damaged where it begins
        for content in contents:
            file.write_bytes(content)
            mixture._load_corpus.cache_clear()
            with pytest.raises(ConfigError, match=rf"a file cannot be read \(.*a.jsonl{suffix}: .*; repair it"):
                mixture.load_corpus(make_config(Source(path=str(folder))))
        file.write_bytes(kept + (b"\0" * 8 if suffix == ".xz" else b"") + kept)
        with files._open(str(file)) as stream:
            assert stream.read() == whole + whole

    def refuse(file, *args, **options):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"001.txt: Permission denied\); repair it, or leave it out"):
        mixture.load_corpus(make_config(Source(path=str(write_one(tmp_path / "locked" / "001.txt")))))


def test_a_document_too_long_for_arrow_is_named(tmp_path, monkeypatch):
    assert files.DOCUMENT_BYTES + 4 * files.BATCH_BYTES < 2**31 - 1  # of a batch; 4 bytes a character at most
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 100)
    file = write_one(tmp_path / "texts" / "long.txt")
    for text, accepted in (("é" * 50, True), ("é" * 51, False), ("e" * 101, False)):
        file.write_text(text)
        mixture._load_corpus.cache_clear()
        if accepted:
            assert mixture.load_corpus(make_config(Source(path=str(file)), share=0.0)).documents.text(0) == text
        else:
            with pytest.raises(ConfigError, match=r"long.txt: a document of 10\d bytes, of at most 100: split it"):
                mixture.load_corpus(make_config(Source(path=str(file))))


def write_one(file: Path) -> Path:
    file.parent.mkdir()
    file.touch()
    return file


def test_documents_shuffle_by_seed(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))))
    orders = []
    for seed in (0, 1, 0):
        mixture._load_corpus.cache_clear()
        config.data.seed = seed
        orders.append(texts(config))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


# Split and mixture


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_documents_are_not_trained_on(tmp_path, hub, streamed):
    hub["org/set"] = {"train": stream("hub", 300, 3)}
    sources = [Source(type="text", path=str(write_files(tmp_path / "a", 300)))] + [hub_source()] * streamed
    config = make_config(*sources, share=0.2)
    held_out = [example["text"] for example in mixture.load_corpus(config).held_out()]
    train = set(texts(config))
    everything = {document(name, index) for name in ("doc", "hub")[: 1 + streamed] for index in range(300)}
    assert train.isdisjoint(held_out)
    assert train | set(held_out) == everything
    assert len(set(held_out)) == len(held_out)
    assert 0.12 < len(held_out) / len(everything) < 0.28


def test_copies_are_left_out(tmp_path):
    folder, other = write_files(tmp_path / "a", 60), write_files(tmp_path / "b", 80)  # of b, 60 are a's
    for index in range(20):
        (folder / f"copy{index}.txt").write_text(document("doc", index))
    sources = [Source(type="text", path=str(path)) for path in (folder, other)]
    corpus = mixture.load_corpus(make_config(*sources, share=0.2))
    assert [part.copies for part in corpus.parts] == [20, 60]
    found = [one["text"] for part in corpus.parts for side in (part.train, part.held_out) for one in side]
    assert sorted(found) == sorted(document("doc", index) for index in range(80))
    assert all(is_held_out(text, 0.2) for part in corpus.parts for text in (one["text"] for one in part.held_out))


def test_a_source_of_copies_alone_is_refused(tmp_path):
    sources = [Source(type="text", path=str(write_files(tmp_path / name, 30))) for name in "ab"]
    with pytest.raises(ConfigError, match=r"data\.sources\[1\].*30 copies of others"):
        mixture.load_corpus(make_config(*sources))


def test_validation_split_of_the_hub(hub):
    hub["org/set"] = {"train": stream("train", 40, 2), "validation": stream("valid", 10, 1)}
    config = make_config(hub_source(validation_split="validation"))
    assert set(texts(config)) == {document("train", index) for index in range(40)}
    found = {example["text"] for example in mixture.load_corpus(config).held_out()}
    assert found == {document("valid", index) for index in range(10)}


@pytest.mark.parametrize("streamed", [False, True])
def test_mixture_weights(tmp_path, hub, streamed):
    hub["org/set"] = {"train": stream("b", 200, 3)}
    a = Source(type="text", path=str(write_files(tmp_path / "a", 200, "a")), weight=3.0)
    b = Source(type="text", path=str(write_files(tmp_path / "b", 200, "b")), weight=1.0)
    unread = Source(type="text", path="/nowhere", weight=0.0)
    config = make_config(a, unread, hub_source(weight=1.0) if streamed else b)
    found = texts(config)
    assert set(found) >= {text for text in map(lambda i: document("b", i), range(200)) if not is_held_out(text, 0.1)}
    assert 0.7 < sum(text.startswith("a") for text in found) / len(found) < 0.8


def test_validation_sequences(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a", 200))))
    found = data.validation_sequences(Characters(), config)
    assert found.shape == (4, 17) and found.dtype == torch.int64
    # As many documents as sequences, whatever their length, and from them the sequences at equal distances.
    documents = [example["text"] for example in mixture.load_corpus(config).held_out()][:4]
    packed = [token for text in documents for token in Characters().encode(text, add_bos=True, add_eos=True)]
    whole = len(packed) // 17
    assert whole > 4
    starts = [17 * (number * whole // 4) for number in range(4)]
    assert found.tolist() == [packed[start : start + 17] for start in starts]
    config.validation.sequences = 10**6
    with pytest.raises(ConfigError, match=r"validation.sequences = 1000000: .* only \d+ sequences.*; lower it"):
        data.validation_sequences(Characters(), config)


# Row streams


def source_of(kind: str, tmp_path: Path, hub: dict) -> list[Source]:
    local = Source(type="text", path=str(write_files(tmp_path / "rows", 40)))
    hub["org/set"] = {"train": stream("hub", 90, {"few shards": 3, "many shards": 10, "mixture": 3}.get(kind, 1))}
    return {"local": [local], "mixture": [local, hub_source(weight=2.0)]}.get(kind, [hub_source()])


KINDS = ["local", "few shards", "many shards", "mixture"]


def test_a_row_packs_every_bth_document(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))), rows=3)
    order = texts(config)
    batches = global_batches(config, ranks=1, steps=12)
    for row in range(3):
        packed = []
        for text in order[row::3] * 3:
            packed += Characters().encode(text, add_bos=True, add_eos=True)
        assert torch.cat([batch[row] for batch in batches]).tolist() == packed[: 12 * 17]


@pytest.mark.parametrize("kind", KINDS)
def test_global_batch_does_not_depend_on_ranks(tmp_path, hub, kind):
    config = make_config(*source_of(kind, tmp_path, hub), rows=8, seq_len=32)
    expected = global_batches(config, ranks=1, steps=25)  # several epochs, 8 micro-batches
    assert len({tuple(row.tolist()) for batch in expected[:2] for row in batch}) == 16
    for ranks, local_batch_size in ((2, 1), (4, 2), (1, 4)):
        config.training.local_batch_size = local_batch_size
        for one, other in zip(expected, global_batches(config, ranks, 25), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_processes_share_the_micro_batches(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))), rows=8)
    config.training.local_batch_size = 2
    expected = global_batches(config, ranks=1, steps=25)
    for workers in (2, 4):
        config.training.dataloader.num_workers = workers
        data.check_data(config)
        for one, other in zip(expected, global_batches(config, ranks=1, steps=25), strict=True):
            assert torch.equal(one, other)


def test_processes_that_cannot_share_are_refused(tmp_path, hub):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))), rows=8, workers=3)
    with pytest.raises(ConfigError, match=r"num_workers = 3: .* a rank has 8; give a divisor of 8, or lower"):
        data.check_data(config)
    with pytest.raises(ConfigError, match=r"num_workers = 2: streamed sources are read by one process; give 0 or 1"):
        data.check_data(make_config(*source_of("many shards", tmp_path, hub), workers=2))


@pytest.mark.parametrize(("kind", "workers"), [*itertools.product(KINDS, (0, 1)), ("local", 2)])
def test_resume_is_exact(tmp_path, hub, kind, workers):
    config = make_config(*source_of(kind, tmp_path, hub), rows=4, workers=workers)
    total = 220
    loader, batches = sequences(config, ranks=2, rank=1)
    states, expected = [], []
    for batch in islice(batches, total):
        expected.append(batch)
        states.append(loader.state_dict())
    epochs = data.RowStreams(mixture.load_corpus(config), Characters(), 16, range(2, 4), 4)
    list(islice(epochs, total - 20))
    assert (
        min(row.epoch for row in epochs.rows) >= 2
    )  # so some of the resumptions below come before, some after its start
    # Every point without workers; with a worker a process is started for each.
    for taken in range(1, total - 20, 1 if workers == 0 and kind == "local" else 5 if workers == 0 else 60):
        loader, batches = sequences(config, ranks=2, rank=1)
        loader.load_state_dict(states[taken - 1])
        found = list(islice(batches, 20))
        assert torch.equal(torch.cat(found), torch.cat(expected[taken : taken + 20])), taken


@pytest.mark.parametrize(
    ("kind", "layouts"), [("local", [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0)]), ("many shards", [(1, 0), (4, 1)])]
)
def test_resume_on_other_ranks_and_processes_reads_each_document_once(tmp_path, hub, kind, layouts):
    config = make_config(*source_of(kind, tmp_path, hub), rows=4)
    steps, taken = 60, 25
    expected = global_batches(config, ranks=1, steps=steps)
    for workers in (0, 2) if kind == "local" else (0,):
        config.training.dataloader.num_workers = workers
        state: dict = {}
        for rank in range(2):
            loader, batches = sequences(config, ranks=2, rank=rank)
            list(islice(batches, 2 * taken))
            state |= loader.state_dict()
        for ranks, other in layouts:
            config.training.dataloader.num_workers = other
            found = []
            for rank in range(ranks):
                loader, batches = sequences(config, ranks=ranks, rank=rank)
                loader.expect(2)
                assert set(loader.state_dict()) == set(state)
                loader.load_state_dict(state)
                found.append(
                    torch.cat(list(islice(batches, (steps - taken) * 4 // ranks))).view(steps - taken, 4 // ranks, -1)
                )
            assert torch.equal(torch.cat(found, 1), torch.stack(expected[taken:])), (workers, ranks, other)


def test_resume_on_other_ranks_is_refused_where_rows_are_missing_or_not_numbered(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))))
    loader, batches = sequences(config)
    next(batches)
    state = loader.state_dict()
    other, _ = sequences(config, ranks=2)
    with pytest.raises(ConfigError, match="saved between two micro-batches of a step: resume it with"):
        other.load_state_dict(state)
    list(islice(batches, 3))
    state = loader.state_dict()
    config.training.global_batch_size = 8
    other, _ = sequences(config, ranks=2)
    with pytest.raises(ConfigError, match=r"has 4 rows and this run 8; resume with training.global_batch_size = 4"):
        other.load_state_dict(state)
    config.training.global_batch_size = 4
    plain = pickle.loads(state["dp_rank_0"])
    del plain["dataset_state"]["numbers"]
    older = state | {"dp_rank_0": pickle.dumps(plain)}
    other, _ = sequences(config, ranks=2)
    with pytest.raises(ConfigError, match="of an older release, which did not number rows: resume it with"):
        other.load_state_dict(older)
    same, again = sequences(config)
    same.load_state_dict(older)
    assert torch.equal(next(again), next(batches))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_twice_between_micro_batches(tmp_path, hub, kind):
    """A state taken after one sequence keeps the places of the rows that have not moved since they were loaded."""
    config = make_config(*source_of(kind, tmp_path, hub), rows=4)

    def streams():
        return data.RowStreams(mixture.load_corpus(config), Characters(), 16, range(4), 4)

    straight = streams()
    expected = list(islice(straight, 120))
    state, found = streams().state_dict(), []
    for _ in range(0, 120, 3):
        rows = streams()
        rows.load_state_dict(state)
        assert rows.state_dict() == state
        found += list(islice(rows, 3))
        state = rows.state_dict()
    assert [row["epoch"] for row in state["rows"]] == [row["epoch"] for row in straight.state_dict()["rows"]]
    for (one, _), (other, _) in zip(expected, found, strict=True):
        assert torch.equal(one["input"], other["input"])


def test_resume_with_another_batch_size_is_refused(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a"))))
    state = data.RowStreams(mixture.load_corpus(config), Characters(), 16, range(4), 4).state_dict()
    rows = data.RowStreams(mixture.load_corpus(config), Characters(), 16, range(8), 8)
    with pytest.raises(ConfigError, match=r"global_batch_size: the checkpoint has 4 rows a data-loading process"):
        rows.load_state_dict(state)


def test_a_row_without_documents_is_refused(hub):
    hub["org/set"] = {"train": stream("hub", 3, 1)}
    with pytest.raises(ConfigError, match=r"data.sources: a row .* finds no document .*; add a source"):
        list(islice(sequences(make_config(hub_source(), rows=8))[1], 8))


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_resume_of_streamed_files(tmp_path, monkeypatch, kind):
    """The readers of JSON and Parquet streams, as the hub's data sets have them, resume as exactly."""
    for shard in range(3):
        rows = datasets.Dataset.from_dict({"body": [document(f"s{shard}-", index) for index in range(40)]})
        rows.to_parquet(tmp_path / f"{shard}.parquet", batch_size=7)
        rows.to_json(tmp_path / f"{shard}.json")
    files = [str(tmp_path / f"{shard}.{kind}") for shard in range(3)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: load(kind, data_files=files, split="train", streaming=True)
    )
    config = make_config(hub_source())

    def streams():
        return data.RowStreams(mixture.load_corpus(config), Characters(), 16, range(4), 4)

    rows = streams()
    expected, states = [], []
    for sequence in islice(rows, 520):
        expected.append(sequence[0]["input"])
        states.append(rows.state_dict())
    assert min(row["epoch"] for row in states[480]["rows"]) >= 2
    for taken in range(1, 500, 31):
        rows = streams()
        rows.load_state_dict(states[taken - 1])
        found = [sequence[0]["input"] for sequence in islice(rows, 20)]
        assert torch.equal(torch.stack(found), torch.stack(expected[taken : taken + 20])), taken


def test_epochs_are_logged_once(tmp_path, caplog):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a", 40))))
    with caplog.at_level("INFO"):
        list(islice(sequences(config)[1], 200))
    messages = [record.getMessage() for record in caplog.records]
    assert not any("re-looped" in message for message in messages)
    assert sum("epoch 2 begins" in message for message in messages) == 1


# Errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(type="text"), r'data.sources\[0\].path = "": .*needs a path'),
        (Source(type="text", path="none.txt"), r'data.sources\[0\].path = "none.txt": no such file or folder; give an'),
        (
            Source(type="text", path="none/*.txt"),
            r'path = "none/\*.txt": no file matches; give an existing file, folder',
        ),
        (Source(type="text", path="empty"), r'path = "empty": the folder holds no file; give'),
        (Source(type="json", path="empty"), r'path = "empty": the folder holds no file that ends in .jsonl, .nd'),
        (
            Source(type="text", path="binary"),
            r'path = "binary": no file in it holds text \(not read: 1 files, binary; first binary\); give',
        ),
        (
            Source(type="json", path="bad.jsonl"),
            r'path = "bad.jsonl": a file cannot be read \(bad.jsonl: line 2: .*; repair',
        ),
        (
            Source(type="parquet", path="bad.jsonl"),
            r'path = "bad.jsonl": a file cannot be read \(bad.jsonl: Parquet magic .*; repair',
        ),
        (Source(type="json", path="ok.jsonl"), r'column = "text": no such column; the columns are: body, id'),
        (Source(type="parquet", path="ok.parquet"), r'column = "text": no such column; the columns are: body, id'),
        (Source(type="json", path="ok.jsonl", column="id"), r'column = "id": the column does not hold text'),
        (Source(type="hub"), r'data.sources\[0\].path = "": a source of type "hub" needs a data set'),
        (
            Source(type="stdlib", weight=0.0),
            r"data.sources\[0\].weight = 0.0: the weights of all sources are 0; raise one",
        ),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    rows = datasets.Dataset.from_dict({"body": ["a", "b"], "id": [1, 2]})
    rows.to_json(tmp_path / "ok.jsonl")
    rows.to_parquet(tmp_path / "ok.parquet")
    with pytest.raises(ConfigError, match=message):
        data.check_data(make_config(source))


def test_no_sources():
    with pytest.raises(ConfigError, match=r"data\.sources = "):
        data.check_data(make_config())


def test_fewer_documents_than_rows(tmp_path, monkeypatch):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a", 5))), rows=8, share=0.0)
    with pytest.raises(ConfigError, match=r"5 training documents for a global batch of 8 rows.*; add documents"):
        data.check_data(config)
    config.training.global_batch_size = 4
    data.check_data(config)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"training.global_batch_size = 4: not a multiple .* 8; give a multiple of 8"):
        data.check_data(config)
    config.training.global_batch_size = -1
    config.parallelism.tensor_parallel_degree = 2
    data.check_data(config)  # 4 ranks of data, 1 sequence each
    assert data.num_rows(config, 4) == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/set' doesn't exist"), r'path = "org/set": .*; check'),
        (
            ConnectionError("Couldn't reach 'org/set' on the Hub"),
            r'path = "org/set": the hub cannot be read .*; check the net',
        ),
        (ValueError("Config name is missing.\nPlease pick one: ['en']"), r"name = \"\": .*\['en'\]; give one"),
        (ValueError('Bad split: train. Available splits: ["test"]'), r'split = "train": Bad split.*; give one'),
    ],
)
def test_bad_answers_of_the_hub(hub, error, message):
    hub["org/set"] = error
    with pytest.raises(ConfigError, match=r"data.sources\[0\]\." + message):
        data.check_data(make_config(hub_source()))


def test_missing_column_of_the_hub(hub):
    hub["org/set"] = {"train": stream("hub", 5, 1)}
    with pytest.raises(ConfigError, match=r'column = "text": no such column; the columns are: body, id'):
        data.check_data(make_config(Source(type="hub", path="org/set")))


# Tokenizer

WEIRD = [
    "",
    " leading and trailing \n\t ",
    "naïve façade, Ελληνικά, 漢字, हिन्दी",
    "👩‍👩‍👧‍👦 e\u0301 \u200b\u202e\ufeff \x00\x07\x7f \r\n",
    "\U0010ffff\ue000\ufffd",
    "don't   stop   [...]   ?!",
]


@pytest.fixture
def bpe_config(tmp_path):
    config = make_config(Source(type="text", path=str(write_files(tmp_path / "a", 200))))
    config.tokenizer.vocab_size = 300
    config.tokenizer.cache_folder = str(tmp_path / "tokenizers")
    return config


def test_bpe_round_trip_and_bytes(bpe_config):
    folder = tokenizer.prepare_tokenizer(bpe_config)
    bpe = HuggingFaceTokenizer(folder)
    assert (bpe.get_vocab_size(), bpe.bos_id, bpe.eos_id) == (300, 0, 1)
    sizes = tokenizer.token_bytes(folder)
    assert sizes.dtype == torch.int64 and sizes.shape == (300,) and sizes[:2].tolist() == [0, 0]
    for text in WEIRD:
        tokens = bpe.encode(text, add_bos=True, add_eos=True)
        assert tokens[0] == 0 and tokens[-1] == 1 and not {0, 1} & set(tokens[1:-1])
        assert bpe.decode(tokens) == text
        assert sizes[tokens].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("sample_bytes", [1 << 16, 1 << 20])  # less than the corpus has, and more
def test_bpe_training_says_how_far_it_is(bpe_config, monkeypatch, caplog, sample_bytes):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    for index in range(200):
        (Path(bpe_config.data.sources[0].path) / f"long{index}.txt").write_text(f"{index} " * 300)
    bpe_config.tokenizer.sample_bytes = sample_bytes
    with caplog.at_level("INFO", "sparsetitan"):
        tokenizer.prepare_tokenizer(bpe_config)
    lines = [line.removeprefix("BPE: reading and counting words: ") for line in caplog.messages if "left" in line]
    shares = [int(line.split("%")[0]) for line in lines]
    assert len(shares) > 20 and shares == sorted(shares) and shares[0] < 5 and 90 <= shares[-1] <= 100
    assert lines[-1].endswith("about 0m00s left")


def test_progress_is_said_now_and_then(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    work = progress.Progress("work", 400, said.append)
    for _ in range(8):
        now[0] += 4
        work.advance(50)
    assert said == ["work: 38%, about 0m20s left", "work: 75%, about 0m08s left"]
    now[0] += 5000
    work.wait("waiting")
    work.wait("waiting")
    assert said[2:] == ["work: waiting, 1h23m so far"]


def test_bpe_is_trained_once(bpe_config, monkeypatch):
    folder = tokenizer.prepare_tokenizer(bpe_config)
    train = tokenizer._train
    monkeypatch.setattr(tokenizer, "_train", lambda *_: pytest.fail("trained again"))
    mixture._load_corpus.cache_clear()
    assert tokenizer.prepare_tokenizer(bpe_config) == folder
    monkeypatch.setattr(tokenizer, "_train", train)
    bpe_config.tokenizer.vocab_size = 290
    assert tokenizer.prepare_tokenizer(bpe_config) != folder
    bpe_config.tokenizer.vocab_size = 300
    Path(bpe_config.data.sources[0].path, "new.txt").write_text("one more document")
    mixture._load_corpus.cache_clear()
    assert tokenizer.prepare_tokenizer(bpe_config) != folder


def test_killed_training_leaves_no_tokenizer(bpe_config, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    mixture.load_corpus(bpe_config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        tokenizer.prepare_tokenizer(bpe_config)
    assert not [path for path in Path(bpe_config.tokenizer.cache_folder).iterdir() if path.is_dir()]
    assert HuggingFaceTokenizer(tokenizer.prepare_tokenizer(bpe_config)).get_vocab_size() == 300


def test_bpe_of_a_tiny_corpus_is_smaller(tmp_path, bpe_config, caplog):
    bpe_config.data.sources = [Source(type="text", path=str(write_files(tmp_path / "tiny", 2)))]
    bpe_config.data.validation_share = 0.0
    bpe_config.tokenizer.vocab_size = 5000
    with caplog.at_level("INFO", logger="sparsetitan"):
        folder = tokenizer.prepare_tokenizer(bpe_config)
    assert 258 <= HuggingFaceTokenizer(folder).get_vocab_size() < 5000
    assert "tokens only" in caplog.text


def test_sample_bytes_bounds_the_sample(bpe_config):
    bpe_config.tokenizer.sample_bytes = 500
    sample = list(tokenizer._sample(bpe_config))
    assert 500 <= sum(map(len, sample)) < 600
    assert sample == texts(bpe_config)[: len(sample)]


def test_given_tokenizer(tmp_path, bpe_config):
    folder = tokenizer.prepare_tokenizer(bpe_config)
    bpe_config.tokenizer.path = folder
    assert tokenizer.prepare_tokenizer(bpe_config) == folder
    (tmp_path / "none").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "tokenizer.json").write_text('{"model": ')
    for name, problem in (
        ("missing", "no such folder"),
        ("none", "no tokenizer can be"),
        ("corrupt", "no tokenizer can be"),
    ):
        bpe_config.tokenizer.path = str(tmp_path / name)
        with pytest.raises(ConfigError, match=rf'tokenizer.path = ".*{name}": {problem}.*; give a folder'):
            tokenizer.prepare_tokenizer(bpe_config)


def test_unwritable_tokenizer_cache(tmp_path, bpe_config):
    (tmp_path / "file").write_text("")
    bpe_config.tokenizer.cache_folder = str(tmp_path / "file" / "tokenizers")
    with pytest.raises(ConfigError, match=r"tokenizer.cache_folder = .*; give another folder"):
        tokenizer.prepare_tokenizer(bpe_config)


def test_token_bytes_of_sentencepiece(tmp_path):
    words = ["<unk>", "<s>", "▁a", "bc", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: index for index, word in enumerate(words)}
    piece = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    piece.add_special_tokens(["<unk>", "<s>"])
    piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    piece.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    piece.save(str(tmp_path / "tokenizer.json"))
    sizes = tokenizer.token_bytes(str(tmp_path))
    assert sizes[:7].tolist() == [0, 0, 2, 2, 1, 2, 1]
    for text in (" é", "漢 é"):
        assert sizes[piece.encode(text).ids].sum() == len(text.encode("utf-8"))


def test_special_tokens_spelt_out_in_a_document_are_text(tmp_path):
    config = make_config(Source("text", str(write_files(tmp_path / "docs"))))
    config.tokenizer.vocab_size = 300
    config.tokenizer.cache_folder = str(tmp_path / "cache")
    config.model.hf_assets_path = tokenizer.prepare_tokenizer(config)
    built = tokenizer.build_tokenizer(config)
    ids = built.encode("a<|end_of_text|>b", add_bos=True, add_eos=True)
    assert ids.count(built.bos_id) == ids.count(built.eos_id) == 1
    assert built.tokenizer.decode(ids) == "a<|end_of_text|>b"


@pytest.fixture
def bpe_folder(bpe_config) -> Path:
    return Path(tokenizer.prepare_tokenizer(bpe_config))


def saved(folder: Path, to: Path, change, **settings) -> Path:
    """A copy of a tokenizer's folder, changed as who saved it may have, and its tokenizer_config.json's settings."""
    shutil.copytree(folder, to)
    changed = Tokenizer.from_file(str(to / "tokenizer.json"))
    change(changed)
    changed.save(str(to / "tokenizer.json"))
    if settings:
        (to / "tokenizer_config.json").write_text(json.dumps(settings))
    return to


def test_settings_of_a_foreign_tokenizer_do_not_change_what_is_read(tmp_path, bpe_folder):
    text = "doc17: abcabcabc doc18: " * 40

    def template(tokens: str):
        special = [("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
        return processors.TemplateProcessing(single=tokens, special_tokens=special)

    def drop(changed):
        changed.model.dropout = 0.5

    changes = {
        "truncation": lambda changed: changed.enable_truncation(16),
        "left": lambda changed: changed.enable_truncation(16, stride=4, direction="left"),
        "padding": lambda changed: changed.enable_padding(length=4000, pad_id=0, pad_token="<|begin_of_text|>"),
        "dropout": drop,
        "template": lambda changed: setattr(changed, "post_processor", template("<|end_of_text|> $A <|end_of_text|>")),
    }
    own = tokenizer.load_tokenizer(bpe_folder)
    for name, change in changes.items():
        other = tokenizer.load_tokenizer(saved(bpe_folder, tmp_path / name, change))
        for markers in ({}, {"add_bos": True, "add_eos": True}, {"add_bos": True}):
            assert other.encode(text, **markers) == own.encode(text, **markers), (name, markers)
        assert (other.bos_id, other.eos_id) == (0, 1)
    assert len(own.encode(text)) > 16
    # Where tokenizer_config.json names no markers, the template does.
    both = saved(
        bpe_folder,
        tmp_path / "unnamed",
        lambda changed: setattr(changed, "post_processor", template("<|begin_of_text|> $A <|end_of_text|>")),
        model_max_length=16,
    )
    assert tokenizer.load_tokenizer(both).encode(text, add_bos=True, add_eos=True) == [0, *own.encode(text), 1]


def test_a_tokenizer_that_changes_text_is_said(tmp_path, bpe_config, bpe_folder, caplog):
    folder = saved(
        bpe_folder, tmp_path / "lower", lambda changed: setattr(changed, "normalizer", normalizers.Lowercase())
    )
    for path, said in ((bpe_folder, False), (folder, True)):
        caplog.clear()
        bpe_config.tokenizer.path = str(path)
        tokenizer.prepare_tokenizer(bpe_config)
        assert ("does not keep every text" in caplog.text) == said


def test_long_documents_are_encoded_in_pieces(tmp_path, bpe_folder, monkeypatch):
    text = "".join(f"word{index}, naïve and old  {index % 7}\n\tif (x == {index}) {{ }}  \r\n" for index in range(400))
    metaspace = Tokenizer(models.BPE(byte_fallback=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    (tmp_path / "metaspace").mkdir()
    metaspace.save(str(tmp_path / "metaspace" / "tokenizer.json"))
    for folder in (bpe_folder, tmp_path / "metaspace"):
        own = tokenizer.load_tokenizer(folder)
        whole = own.tokenizer.encode(text, add_special_tokens=False).ids
        for size in (200, 333, 1000):
            assert "".join(tokenizer.pieces(text, size)) == text
            assert max(map(len, tokenizer.pieces(text, size))) <= size
            monkeypatch.setattr(tokenizer.pieces, "__defaults__", (size,))
            assert own.encode(text) == whole, (folder, size)
    assert list(map(len, tokenizer.pieces("a" * 250, 100))) == [100, 100, 50]


def test_long_words_do_not_hold_up_the_training_of_the_bpe(bpe_config):
    """Without a bound the time grows with the square of a word's length: these would take minutes."""
    random.seed(0)
    genome, blanks = "".join(random.choices("ACGT", k=400_000)), " " * 400_000
    for name, text in (("genome", genome), ("blanks", "x" + blanks), ("dashes", "x" + "-=" * 200_000)):
        Path(bpe_config.data.sources[0].path, f"{name}.txt").write_text(text)
    bpe_config.data.validation_share = 0.0
    bpe_config.tokenizer.vocab_size = 1024
    sample = list(tokenizer._sample(bpe_config))
    assert not any(re.search(r"\w{2000}|\s{2000}|[^\w\s]{2000}", piece) for piece in sample)
    assert sum(map(len, sample)) > 1_200_000
    began = time.monotonic()
    folder = tokenizer.prepare_tokenizer(bpe_config)
    assert time.monotonic() - began < 30
    own = tokenizer.load_tokenizer(folder)
    assert own.decode(own.encode(genome)) == genome


def test_a_signal_is_heeded_while_the_bpe_is_trained():
    released = threading.Event()
    # Not SIGALRM, which is the timeout's of the test itself.
    previous = signal.signal(signal.SIGUSR2, signal.default_int_handler)
    alarm = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
    alarm.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenizer._in_thread(lambda: released.wait(60), lambda: None)
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR2, previous)
        released.set()
    with pytest.raises(ValueError, match="from the thread"):
        tokenizer._in_thread(lambda: (_ for _ in ()).throw(ValueError("from the thread")), lambda: None)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_from_a_loader_state_a_tokenizer_or_a_corpus(tmp_path, bpe_config, bpe_folder, monkeypatch):
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')"
    pickled = pickle.dumps({"text": Bomb(mark)})

    loader, batches = sequences(bpe_config)
    next(batches)
    state = loader.state_dict()
    # A checkpoint can bring a bytearray as well as bytes: torch.load with weights_only makes both.
    hostile = [(pickled, "it names pathlib"), (bytearray(pickled), "it names pathlib"), ("text", "bytes-like")]
    for content, message in (*hostile, (state["dp_rank_0"][:-20], "damaged")):
        again, _ = sequences(bpe_config)
        with pytest.raises(ConfigError, match=f"state of the data loader cannot be read .*{message}"):
            again.load_state_dict({**state, "dp_rank_0": content})

    settings = json.loads((bpe_folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "tokenizer_class": "T", "trust_remote_code": True}
    (bpe_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (bpe_folder / "code.py").write_text(code)
    (bpe_folder / "vocab.json").write_bytes(pickled)
    assert tokenizer.load_tokenizer(bpe_folder).encode("doc1:", add_bos=True)[0] == 0

    folder = write_files(tmp_path / "corpus", 40)
    (folder / "corpus.py").write_text(code)
    (folder / "__init__.py").write_text(code)
    for name in ("data.pkl", "weights.bin", "array.npy", "text.pt"):
        (folder / name).write_bytes(pickled + b"\0")
    corpus = mixture.load_corpus(make_config(Source(path=str(folder)), share=0.0))
    assert len(corpus.documents) == 41  # the source text of one of the two programs, which are copies
    assert corpus.parts[0].report.left_out["binary"][0] == 4
    # A data set with a loading script, as a folder in the place of a name on the hub.
    monkeypatch.chdir(tmp_path)
    mixture._load_corpus.cache_clear()
    with contextlib.suppress(ConfigError):
        mixture.load_corpus(make_config(Source(type="hub", path="corpus")))
    assert not mark.exists()


def test_a_data_process_is_quiet_where_the_trainer_has_ended(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(kind))
    loader, _ = sequences(make_config(Source("text", f"{write_files(tmp_path)}/*.txt")))
    assert loader.worker_init_fn is data.end_quietly
    loader.worker_init_fn(0)
    for error in (BrokenPipeError(), ConnectionResetError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert seen == [ValueError]
