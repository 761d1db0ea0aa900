"""Weights & Biases beside the other logs, offline: nothing leaves the machine."""

import struct

import pytest
from conftest import launch, merge, rows

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")


def records(file):
    """The records of an offline run's file: a header of seven bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def logged(folder):
    """Rows by step and the ids of W&B's runs, in the order in which they began."""
    steps, ids = {}, []
    for file in sorted(folder.glob("tb/*/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.append((record.run.project, record.run.run_id))
            if kind == "history":
                row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                steps[int(row["_step"])] = row
    return steps, ids


def test_rows_are_logged_and_a_resumed_run_is_the_same_one(tiny, tmp_path):
    command = ["--config", "configs/debug.toml", *merge(tiny, ["--job.dump_folder", str(tmp_path)])]
    command += ["--metrics.enable_wandb", "true"]
    for steps in ("8", "12"):
        phases = '[{mode = "dense", end = 3}, {mode = "sparse", end = 8}, {mode = "dense", end = 12}]'
        phases = phases if steps == "12" else '[{mode = "dense", end = 3}, {mode = "sparse", end = 8}]'
        words = merge(command, ["--training.steps", steps, "--schedule.phases", phases])
        run = launch(*words, WANDB_MODE="offline")
        assert run.returncode == 0, run.stderr
    written, (steps, ids) = rows(tmp_path), logged(tmp_path)
    assert sorted(steps) == sorted(written) == list(range(1, 13))
    for step, row in written.items():
        for key, value in row.items():
            if key == "phase":
                assert steps[step]["sparse"] == str(value == "sparse").lower()
            else:
                assert float(steps[step][key]) == pytest.approx(value), (step, key)
    assert len(set(ids)) == 1 and ids[0][0] == "sparsetitan"


def test_a_run_that_wandb_refuses_does_not_train_without_it(tiny, tmp_path):
    words = merge(tiny, ["--job.dump_folder", str(tmp_path), "--metrics.enable_wandb", "true"])
    env = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
    }
    run = launch("--config", "configs/debug.toml", *words, **env)
    assert run.returncode == 2 and "metrics.enable_wandb = true" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "metrics.jsonl").exists()
