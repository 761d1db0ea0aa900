"""Tokens made once: the same batches as from text, bit for bit, in every way in which a run reads them."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import PROCESSES, ROOT, losses, merge
from filelock import FileLock

from configs.errors import ConfigError, show_error
from configs.schema import JobConfig, Source
from recipes import data, mixture, tokenizer, tokens
from scripts import make_tokens, probe

SHARE = 0.2


def document(index: int) -> str:
    return f"naïve document {index}: " + f"word{index % 7} " * (index * 7 % 61)


def make_config(*sources: Source, rows: int = 4, workers: int = 0) -> JobConfig:
    config = JobConfig()
    config.data.sources = list(sources)
    config.data.validation_share = SHARE
    config.training.seq_len, config.training.local_batch_size, config.training.global_batch_size = 16, 1, rows
    config.training.dataloader.num_workers = workers
    config.validation.sequences = 4
    return config


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(tokens, "SHARD_BYTES", 2000)
    mixture._load_corpus.cache_clear()


@pytest.fixture
def text_sources(tmp_path) -> list[Source]:
    """Text with copies, empty documents and one that is longer than a shard; and JSON lines that repeat some of it."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(80):
        (folder / f"{index:03}.txt").write_text(document(index % 70))
    (folder / "empty.txt").write_text("")
    (folder / "long.txt").write_text(" ".join(map(document, range(100, 130))))
    lines = [json.dumps({"text": document(index)}) + "\n" for index in range(60, 160)]
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    return [Source(path=str(folder), weight=3.0), Source(path=str(tmp_path / "lines.jsonl"), weight=1.0)]


@pytest.fixture
def command(tmp_path, text_sources) -> list[str]:
    sources = ", ".join(f'{{path = "{source.path}", weight = {source.weight}}}' for source in text_sources)
    keys = {
        "config": "configs/debug.toml",
        "data.sources": f"[{sources}]",
        "data.validation_share": str(SHARE),
        "tokenizer.vocab_size": "300",
        "tokenizer.cache_folder": str(tmp_path / "cache"),
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return [str(tmp_path / "tokens"), "--workers", "2", *words]


def instead(command: list[str], *words: str) -> list[str]:
    return [command[0], *merge(command[1:], list(words))]


@pytest.fixture
def token_sources(tmp_path, text_sources, command) -> list[Source]:
    make_tokens.main(command)
    return [
        Source(type="tokens", path=str(tmp_path / "tokens" / f"source-{index}"), weight=source.weight)
        for index, source in enumerate(text_sources)
    ]


def loader_of(config: JobConfig, ranks: int = 1, rank: int = 0):
    folder = tokenizer.prepare_tokenizer(config)
    loader = data.build_dataloader(ranks, rank, tokenizer.load_tokenizer(folder), config)

    def found():
        for batch, labels in loader:
            yield torch.cat([batch["input"], labels[:, -1:]], 1)

    return loader, found()


def batches(config: JobConfig, count: int, **ranks: int) -> torch.Tensor:
    return torch.stack(list(islice(loader_of(config, **ranks)[1], count)))


@pytest.mark.parametrize("number", [1, 2])
def test_the_batches_are_those_of_the_text(text_sources, token_sources, number):
    """Of one source and of a mixture; on one rank and two, with processes of their own, and in several epochs."""
    text, made = (make_config(*sources[:number], rows=8) for sources in (text_sources, token_sources))
    text.tokenizer.path = str(Path(token_sources[0].path, "tokenizer"))
    expected = batches(text, 3200)
    streams = data.RowStreams(mixture.load_corpus(text), tokenizer.load_tokenizer(text.tokenizer.path), 16, range(8), 8)
    list(islice(streams, 3200))
    assert min(row.epoch for row in streams.rows) >= 2
    assert torch.equal(batches(made, 3200), expected)
    halves = [batches(made, 100, ranks=2, rank=rank).view(25, 4, 1, 17) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, 1).flatten(0, 1), expected[:200])
    if number == 2:  # text beside tokens, with the tokens' tokenizer
        assert torch.equal(batches(make_config(text_sources[0], token_sources[1], rows=8), 400), expected[:400])
    made.training.dataloader.num_workers = 2
    assert torch.equal(batches(made, 100), expected[:100])

    own = tokenizer.load_tokenizer(text.tokenizer.path)
    assert torch.equal(data.validation_sequences(own, made), data.validation_sequences(own, text))
    one, other = (mixture.load_corpus(config) for config in (text, made))
    assert [each["text"] for each in other.held_out()] == [each["text"] for each in one.held_out()]
    assert [each["text"] for each in other.row(0, 1)] == [each["text"] for each in one.row(0, 1)]
    items = [list(probe.cloze_items(config, 10)) for config in (text, made)]
    assert items[0] == items[1]
    assert "tokens: " in other.summary()[0]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_resume_is_exact(text_sources, token_sources, kind):
    """Also from the middle of a document of many sequences, of which the state keeps a number and no tokens."""
    config = make_config(*(text_sources if kind == "text" else token_sources))
    config.tokenizer.path = str(Path(token_sources[0].path, "tokenizer"))
    loader, found = loader_of(config, ranks=2, rank=1)
    expected, states = [], []
    for batch in islice(found, 900):
        expected.append(batch)
        states.append(loader.state_dict())
    lefts = [row["left"] for state in states for row in read_state(state)]
    assert max(lefts) > 100 * 17
    assert max(len(state["dp_rank_1"]) for state in states) < 2000
    for taken in (*range(1, 60), *range(60, 880, 13)):
        again, found = loader_of(config, ranks=2, rank=1)
        again.load_state_dict(states[taken - 1])
        assert torch.equal(torch.cat(list(islice(found, 20))), torch.cat(expected[taken : taken + 20])), taken


def read_state(state: dict) -> list[dict]:
    found: list[dict] = []

    def walk(value):
        if isinstance(value, dict):
            if "sample_idx" in value:
                found.append(value)
            else:
                list(map(walk, value.values()))
        elif isinstance(value, list):
            list(map(walk, value))

    walk(pickle.loads(state["dp_rank_1"]))
    return found


def test_a_checkpoint_of_an_older_release_resumes(text_sources, token_sources):
    """It kept the tokens that were left over, which are the last ones of the document before."""
    config = make_config(*text_sources)
    own = tokenizer.load_tokenizer(Path(token_sources[0].path, "tokenizer"))

    def rows() -> data.RowStreams:
        return data.RowStreams(mixture.load_corpus(config), own, 16, range(4), 4)

    streams = rows()
    list(islice(streams, 401))
    state = streams.state_dict()
    old = [
        {"epoch": row["epoch"], "sample_idx": row["sample_idx"], "token_buffer": each._left.astype(np.int32).tobytes()}
        for row, each in zip(state["rows"], streams.rows, strict=True)
    ]
    again = rows()
    again.load_state_dict({**state, "rows": old})
    for (one, _), (other, _) in zip(islice(streams, 100), islice(again, 100), strict=True):
        assert torch.equal(one["input"], other["input"])


def test_a_run_on_tokens_is_the_run_on_text(train, tiny, corpus, tmp_path):
    make_tokens.main([str(tmp_path / "tokens"), "--config", "configs/debug.toml", *tiny])
    sources = f'[{{type = "tokens", path = "{tmp_path}/tokens/source-0"}}]'
    text, made = train(tmp_path / "a"), train(tmp_path / "b", "--data.sources", sources)
    assert losses(made) == losses(text)
    assert [row["val_loss"] for row in made.values() if "val_loss" in row]
    assert [row.get("val_loss") for row in made.values()] == [row.get("val_loss") for row in text.values()]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def handlers():
    """The signals' handlers are as before a test."""
    before = {number: signal.getsignal(number) for number in make_tokens.INTERRUPTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_interrupted_work_goes_on(tmp_path, text_sources, command, monkeypatch, capsys):
    folder = tmp_path / "tokens" / "source-0"
    write = tokens.write_shard

    def die(folder, name, *rest):
        if name == "00004":
            os._exit(9)  # as for lack of memory
        write(folder, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="a worker process was killed"):
        patch.setattr(tokens, "write_shard", die)
        make_tokens.main(command)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        patch.setattr(make_tokens, "wait", interrupt)
        make_tokens.run(command)
    with pytest.raises(ConfigError, match=r"source-0 is not finished: run the same"):
        mixture.load_corpus(make_config(Source(type="tokens", path=str(folder))))
    done = {file.name: file.stat().st_mtime_ns for file in folder.glob("0*.json")}
    assert "00004.json" not in done
    make_tokens.main(command)
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    assert f"{len(done)} of " in capsys.readouterr().out or not done

    again = [str(tmp_path / "again"), *command[1:]]
    make_tokens.main(again)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    assert len(names) > 3 * 4
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / "source-0" / name).read_bytes(), name
    make_tokens.main([str(tmp_path / "tokens"), "--verify"])
    make_tokens.main(command)
    assert "source-0 is complete" in capsys.readouterr().out

    Path(text_sources[0].path, "new.txt").write_text("one more")
    mixture._load_corpus.cache_clear()
    with pytest.raises(ConfigError, match=r"source-0 was begun with another (tokenizer|text)"):
        make_tokens.main(command)


def test_a_stream_becomes_tokens(tmp_path, command, monkeypatch):
    rows = datasets.Dataset.from_dict({"body": [document(index) for index in range(50)] + [""]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset(num_shards=3))
    words = instead(command, "--data.sources", '[{type = "hub", path = "org/set", column = "body"}]')
    make_tokens.main(words)
    folder = tmp_path / "tokens" / "source-0"
    store = tokens.TokenStore(str(folder))
    assert [store.text(place) for place in range(len(store))] == [document(index) for index in range(50)]
    assert len(store.manifest["shards"]) > 3
    kept = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    (folder / "00001.json").unlink()
    (folder / "manifest.json").unlink()
    make_tokens.main(words)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == kept
    (folder / "manifest.json").write_text('{"format":')  # damaged: the shards are all there
    make_tokens.main(words)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == kept


def test_a_folder_that_cannot_be_written_or_stands_at_the_end_is_refused(tmp_path, command):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file cannot be written \(File exists\): .* name another folder"):
        make_tokens.main([str(tmp_path / "file"), *command[1:]])
    with pytest.raises(ConfigError, match="--config debug: name the folder to write first"):
        make_tokens.main(["--config", "debug", str(tmp_path / "tokens")])


def test_a_stream_that_changed_since_an_interruption_is_refused(tmp_path, command, monkeypatch):
    """Whatever is there already must be what the data set begins with; shards after a missing one are written anew."""
    folder = tmp_path / "tokens" / "source-0"
    words = instead(command, "--data.sources", '[{type = "hub", path = "org/set", column = "body"}]')

    def use(texts: list[str]) -> None:
        rows = datasets.Dataset.from_dict({"body": texts})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())

    texts = [document(index) for index in range(50)]
    use(texts)
    make_tokens.main(words)
    shards = sorted(folder.glob("0*.json"))
    assert len(shards) > 4
    (folder / "manifest.json").unlink()
    shards[2].unlink()
    first = sum(json.loads(shard.read_text())["documents"] for shard in shards[:2])
    for changed, place in (([*texts[:3], "other", *texts[4:]], 4), (["new", *texts], 1), (texts[: first - 1], first)):
        use(changed)
        said = rf"begun with another state of the data set \"org/set\" \(document {place} is not the same\): remove"
        with pytest.raises(ConfigError, match=said):
            make_tokens.main(words)
        assert not (folder / "manifest.json").exists()
    use(texts[: first + 1])
    make_tokens.main(words)
    store = tokens.TokenStore(str(folder))
    assert [store.text(place) for place in range(len(store))] == texts[: first + 1]


@pytest.mark.usefixtures("handlers")
def test_an_early_interruption_leaves_no_traceback(tmp_path, command, monkeypatch):
    """While modules are imported, before the work, and as the workers start, which a terminal signals as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background deaf to it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    script = [sys.executable, "-v", "-m", "scripts.make_tokens", *command]
    process = subprocess.Popen(script, cwd=ROOT, **pipes)  # type: ignore[call-overload]
    assert any("import 'numpy'" in line for line in process.stdout), "no module was imported"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert "interrupted" in said.splitlines() and "Traceback" not in said and process.returncode == 130

    one = instead(command, "--workers", "1")
    process = PROCESSES.Process(target=interrupt_as_workers_start, args=(one, tmp_path / "output"))
    process.start()
    process.join(60)
    assert process.exitcode == 130, (tmp_path / "output").read_text()
    assert (tmp_path / "output").read_text().count("interrupted: the same command goes on") == 1
    assert "Traceback" not in (tmp_path / "output").read_text()

    monkeypatch.setattr(make_tokens, "load_config", interrupt)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        make_tokens.run(command)


def interrupt_as_workers_start(command: list[str], output: Path) -> None:
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    begin = make_tokens._begin

    def interrupted(parent: int) -> None:
        os.killpg(0, signal.SIGINT)
        time.sleep(0.2)
        begin(parent)
        time.sleep(60)

    make_tokens._begin = interrupted
    try:
        make_tokens.run(command)
    except KeyboardInterrupt:
        show_error(*sys.exc_info())


def test_no_more_processes_than_shards(command, monkeypatch):
    def run(work, total, workers, name):
        raise KeyboardInterrupt(f"{workers} for {len(list(work))}")

    monkeypatch.setattr(make_tokens, "_run", run)
    with pytest.raises(KeyboardInterrupt) as stopped:
        make_tokens.main(instead(command, "--workers", "100000"))
    workers, shards = map(int, str(stopped.value).split(" for "))
    assert workers == shards > 1


def test_another_tokenizer_is_refused(tmp_path, text_sources, token_sources):
    other = make_config(*text_sources)
    other.tokenizer.vocab_size, other.tokenizer.cache_folder = 290, str(tmp_path / "cache")
    folder = tokenizer.prepare_tokenizer(other)
    config = make_config(*token_sources)
    assert tokenizer.expected_vocabulary(config) == 300
    config.tokenizer.path = folder
    message = r"source-0 were made with another tokenizer than .*: leave tokenizer.path empty"
    with pytest.raises(ConfigError, match=message):
        tokenizer.prepare_tokenizer(config)
    for read in (
        lambda own: data.build_dataloader(1, 0, own, config),
        lambda own: data.validation_sequences(own, config),
    ):
        with pytest.raises(ConfigError, match="were made with another tokenizer"):
            read(tokenizer.load_tokenizer(folder))
    # Settings that do not change what is read do not make it another one.
    config.tokenizer.path = str(tmp_path / "same")
    Path(config.tokenizer.path).mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads(Path(token_sources[0].path, "tokenizer", name).read_text())
        if name == "tokenizer.json":
            content["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        Path(config.tokenizer.path, name).write_text(json.dumps(content))
    assert tokenizer.prepare_tokenizer(config) == config.tokenizer.path


def test_vocabularies_above_16_bits(tmp_path):
    for size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokens.write_shard(tmp_path, "00000", [(7, [0, size - 1]), (8, [])], size)
        array = np.load(tmp_path / "00000.tokens.npy")
        assert array.dtype == dtype and array.tolist() == [0, size - 1]
        assert np.load(tmp_path / "00000.ends.npy").tolist() == [2, 2]


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_damaged_and_hostile_folders_are_refused(tmp_path, token_sources):
    folder = Path(token_sources[0].path)
    config = make_config(token_sources[0])

    def refused(message: str) -> None:
        mixture._load_corpus.cache_clear()
        with pytest.raises(ConfigError, match=rf"data.sources\[0\].{message}"):
            mixture.load_corpus(config)

    file = folder / "00001.tokens.npy"
    kept = file.read_bytes()
    file.write_bytes(kept[:-10])
    refused(".*00001.tokens.npy cannot be read .*run python -m scripts.make_tokens again")
    np.save(file, np.array([Bomb(tmp_path / "executed")], dtype=object), allow_pickle=True)
    refused(".*00001.tokens.npy cannot be read .*")
    assert not (tmp_path / "executed").exists()
    np.save(file, np.zeros(3, np.uint16))
    refused(r".*00001.tokens.npy has \(3,\) entries instead of")
    values = np.load(io.BytesIO(kept))
    np.save(file, values.astype(np.float32))
    refused(".*00001.tokens.npy holds float32 instead of uint16 or uint32: remove")
    file.unlink()
    refused(".*00001.tokens.npy cannot be read")
    flipped = bytearray(kept)
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ConfigError, match=r"00001.tokens.npy is damaged \(its checksum differs\)"):
        make_tokens.main([str(tmp_path / "tokens"), "--verify"])
    beyond = values.copy()
    beyond[5] = 60000
    np.save(file, beyond)
    mixture._load_corpus.cache_clear()
    store = tokens.TokenStore(str(folder))
    with pytest.raises(
        ConfigError, match=r"has token 60000 in document \d+, of a vocabulary of 300: remove .*source-0"
    ):
        [store.tokens(place) for place in range(len(store))]
    file.write_bytes(kept)
    ends = np.load(folder / "00001.ends.npy")
    for damaged in (ends[::-1], ends + 1, np.concatenate([[-1], ends[1:]])):
        np.save(folder / "00001.ends.npy", damaged)
        refused(".*00001.ends.npy does not cut .* tokens into documents")
    np.save(folder / "00001.ends.npy", ends)
    manifest = (folder / "manifest.json").read_text()
    for content in (
        "{",
        "[]",
        manifest.replace('"format": 1', '"format": 9'),
        manifest.replace("00001", "../00001"),
        manifest.replace(": 300,", ': "300",'),
    ):
        (folder / "manifest.json").write_text(content)
        refused(".*manifest.json cannot be read")
    (folder / "manifest.json").write_text(manifest.replace('"checksums"', '"sums"'))
    with pytest.raises(ConfigError, match=r"manifest.json lacks checksums of shard 00000: remove .*source-0"):
        make_tokens.main([str(tmp_path / "tokens"), "--verify"])
    (folder / "manifest.json").write_text(manifest)
    mixture._load_corpus.cache_clear()
    assert len(mixture.load_corpus(config).documents) > 0

    for source, message in (
        (Source(type="tokens"), r'path = "": a source of type "tokens" needs a path'),
        (Source(type="tokens", path=str(tmp_path / "none")), ".*no such folder; give a folder that"),
        (Source(type="tokens", path=str(tmp_path)), ".*holds no tokens: python -m scripts.make_tokens writes them"),
    ):
        config.data.sources = [source]
        refused(message)


def test_what_cannot_be_tokenised_is_refused(tmp_path, token_sources, command, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    with pytest.raises(ConfigError, match=r'source-0" holds tokens, which are not mixed with a streamed source'):
        mixture.load_corpus(make_config(token_sources[0], Source(type="hub", path="org/set")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "source-0").mkdir()
    (tmp_path / "full" / "source-0" / "file").touch()
    made = f'[{{type = "tokens", path = "{token_sources[0].path}"}}]'
    split = '[{type = "hub", path = "org/set", validation_split = "test"}]'
    own, into = '[{{type = "auto", path = "{}"}}]', "takes in .* name a folder outside of it to write"
    for words, message in (
        (instead(command, "--data.sources", made), "are tokens already"),
        (instead(command, "--data.sources", split), "tokens have one split"),
        (instead(command, "--workers", "0"), "--workers 0 is out of bounds"),
        ([str(tmp_path / "full"), *command[1:]], "is not an empty folder"),
        ([str(tmp_path), "--verify"], "holds no source-0"),
        (["", *command[1:]], '"" names no folder'),
        ([str(tmp_path / "texts"), *instead(command, "--data.sources", own.format(tmp_path / "texts"))[1:]], into),
        ([str(tmp_path / "texts" / "x"), *instead(command, "--data.sources", own.format(tmp_path))[1:]], into),
        ([str(tmp_path / "x"), *instead(command, "--data.sources", own.format(tmp_path / "**/*.json*"))[1:]], into),
    ):
        with pytest.raises(ConfigError, match=message):
            make_tokens.main(words)


def test_a_second_process_and_damaged_notes_are_refused(tmp_path, token_sources, command):
    folder = Path(token_sources[0].path)
    with FileLock(folder.parent / ".lock"), pytest.raises(ConfigError, match="tokens is being written by another"):
        make_tokens.main(command)
    for kind in ("tokens", "ends", "hashes"):
        assert (folder / f"00001.{kind}.npy").exists()
    (folder / "manifest.json").unlink()
    for name, remedy in (("plan.json", "remove its folder"), ("00001.json", "remove it")):
        kept = (folder / name).read_text()
        for content in ("", '{"for', "[]", "{}"):
            if (name, content) == ("plan.json", "{}"):
                continue  # of another plan
            (folder / name).write_text(content)
            with pytest.raises(ConfigError, match=rf"{name} is damaged \(.*: {remedy} and run the same command again"):
                make_tokens.main(command)
        (folder / name).write_text(kept)
    (folder / "00001.json").unlink()
    make_tokens.main(command)
    make_tokens.main([str(folder.parent), "--verify"])
