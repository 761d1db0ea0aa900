"""Stored results: tables and pictures of a thinned run are those of the whole one, and what is committed is thinned."""

import json

import numpy as np
import pytest
from conftest import ROOT

from configs.errors import ConfigError
from scripts import thin
from scripts.runs import load_run
from scripts.tables import batches_table, runs_table

PHASES = [("dense", 1000), ("sparse", 1900), ("sparse", 1500, 0.5), ("dense", 1000)]


def write_run(folder, of_phases):
    """A run with all that training logs.

    Args:
        of_phases: of five steps each: mode, tokens a second, and maybe the share that the phase keeps.
    """
    folder.mkdir(parents=True)
    lines, phases, tokens = [], [], 0
    for part, (mode, rate, *keep) in enumerate(of_phases):
        phases.append([mode, 5 * part + 1, 5 * part + 5])
        for step in range(5 * part + 1, 5 * part + 6):
            tokens += 100
            first = step == 5 * part + 1
            line = {
                "step": step,
                "phase": mode,
                "loss": 3 / step + 0.123456789,
                "lr": 1e-3,
                "grad_norm": 1.5,
                "mfu": 40,
            }
            line |= {"tokens": tokens, "tokens_per_second": rate / (9 if first else 1), "step_seconds": 100 / rate}
            line |= {
                "switch_seconds": 0.5 if first else 0.001,
                "graphs_compiled": 2 * first,
                "peak_active_gib": step / 7,
            }
            line |= {"val_loss": 3 / step, "val_bpb": 1 / step, "energy_kept": 0.9, "layers/1/energy_kept": 0.8}
            line |= {"keep": keep[0]} if keep else {}
            lines.append(line | {"layers/1/router_balance": 0.7, "val_bpb_sparse": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "recipe": "recipes/dense.toml",
        "job": {"dump_folder": "somewhere"},
        "model": {"name": "llama_relu2", "flavor": "debug"},
        "training": {"steps": 15, "local_batch_size": 4, "seq_len": 64, "dataloader": {"prefetch_factor": 2}},
        "activation_checkpoint": {"mode": "none"},
        "compile": {"enable": True},
        "debug": {"seed": 0},
    }
    about = {"config": config, "command": ["train.py"], "phases": phases, "parameters": 10**6, "commit": "abc"}
    about |= {"corpus": {"documents": 10, "file_bytes": 10**6}, "hardware": {"device": "GPU", "ranks": 1}}
    about |= {"flops_per_token": {"dense": 4.0, "sparse_pattern": 2.0, "sparse_executed": 3.0}, "runs_per_gpu": 1}
    about |= {"versions": {"torch": "2", "torchtitan": "0", "triton": "3"}, "date": "2026-01-02T03:04:05"}
    (folder / "run.json").write_text(json.dumps(about))


def test_tables_and_times_of_thinned_results_are_those_of_the_whole(tmp_path):
    write_run(tmp_path / "dense_s0", [("dense", 1000)] * 4)
    write_run(tmp_path / "sparse_s0", PHASES)

    def read():
        run = load_run(tmp_path / "sparse_s0")
        size = sum(file.stat().st_size for file in tmp_path.glob("*/metrics.jsonl"))
        return runs_table(tmp_path), batches_table(tmp_path), run.seconds, run.values("layers/1/energy_kept"), size

    whole = read()
    assert thin.main([str(tmp_path)]) == 0
    thinned = read()
    assert thinned[:2] == whole[:2]
    assert all(np.allclose(a, b, rtol=1e-8, atol=0) for a, b in zip(thinned[2:4], whole[2:4], strict=True))
    assert thinned[4] < 0.75 * whole[4]
    about = json.loads((tmp_path / "sparse_s0" / "run.json").read_text())
    assert "command" not in about and about["config"]["training"]["dataloader"] == {} and "job" not in about["config"]
    files = {file: file.read_bytes() for file in tmp_path.glob("*/*")}
    thin.main([str(tmp_path)])
    assert {file: file.read_bytes() for file in files} == files, "twice changes nothing"


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.json below it; give a folder of results"):
        thin.main([str(tmp_path)])
    write_run(tmp_path / "run", [("dense", 1000)])
    (tmp_path / "run" / "checkpoint").mkdir()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="a run's own folder, not stored results"):
        thin.main([str(tmp_path)])
    (tmp_path / "run" / "checkpoint").rmdir()
    for content in ("", "[]", "{}", '{"config": []}'):
        (tmp_path / "run" / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json: not the run\.json of a run"):
            thin.main([str(tmp_path)])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_committed_results_are_thinned():
    """python -m scripts.thin docs does it."""
    whole = []
    for file in sorted(ROOT.glob("docs/**/run.json")):
        about = json.loads(file.read_bytes())
        lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
        if about != thin.thin_about(about) or lines != thin.thin_lines(lines):
            whole.append(str(file.parent.relative_to(ROOT)))
    assert whole == []


def test_a_table_of_streamed_documents_and_skipped_batches(tmp_path):
    """A skipped batch has no loss; the rise at the switch is that of the steps around it, and its number is told."""
    write_run(tmp_path / "dense_s0", [("dense", 1000)] * 3)
    write_run(tmp_path / "sparse_s0", [("dense", 1000), ("sparse", 1900), ("dense", 1000)])
    for name in ("dense_s0", "sparse_s0"):
        file = tmp_path / name / "run.json"
        about = json.loads(file.read_text())
        about["corpus"]["documents"] = None
        file.write_text(json.dumps(about | {"skipped_batches": 2 * (name == "sparse_s0")}))
    file = tmp_path / "sparse_s0" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for step in (5, 6):  # before and after the switch to sparse
        lines[step - 1]["loss"] = None
    lines[6]["loss"] *= 1.1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = runs_table(tmp_path)
    assert "| +10.0%, +0.0% |" in table
    assert "M tokens of streamed documents, seed 0; " in table
    assert table.endswith("Batches skipped because their loss or gradient was not finite: `sparse_s0` 2.")
