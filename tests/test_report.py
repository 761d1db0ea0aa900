"""The README's tables are those that the committed runs give."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from scripts import pictures, tables
from scripts.law import Cell, Evidence, Law
from scripts.report import BLOCK, PAGES, fill
from scripts.runs import Run
from scripts.tables import _jumps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_up_to_date(page):
    text = page.read_text()
    assert len(BLOCK.findall(text)) >= 1
    assert fill(text) == text


@pytest.mark.parametrize(
    "page", sorted({*PAGES, *ROOT.glob("docs/*.md")}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_and_pictures_are_there(page):
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    gone = [name for name in targets if name and "://" not in name and not (page.parent / name).exists()]
    assert gone == []


def test_lines_of_prose_and_code_fit_120_columns():
    """Those of tables and of what is generated may be longer."""
    for page in (*ROOT.glob("*.md"), ROOT / "kernels" / "README.md", *ROOT.glob("docs/**/*.md")):
        lines = BLOCK.sub("", page.read_text()).splitlines()
        assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == [], page


def test_a_page_draws_the_tree_that_is_there():
    (tree,) = re.findall(r"## Where things are\n+```\n(.*?)```", (ROOT / "docs" / "code.md").read_text(), re.DOTALL)
    entries = re.findall(r"^(\S+).*\n((?: .*\n)*)", tree, re.MULTILINE)  # a name, and the indented lines below it
    drawn = {name: [line.split()[0] for line in below.splitlines()] for name, below in entries}
    for folder, names in drawn.items():
        there = {
            f"{path.name}/" if path.is_dir() else "*.toml" if path.suffix == ".toml" else path.name
            for path in (ROOT / folder).glob("*")
            if not path.name.startswith((".", "__"))
        }
        assert (ROOT / folder).exists(), folder
        assert sorted(names) == sorted(there) or not names, folder
    code = [path.relative_to(ROOT) for pattern in ("*.py", "[a-z]*/*.py") for path in ROOT.glob(pattern)]
    assert {path.name if path.parent == Path() else f"{path.parts[0]}/" for path in code} <= drawn.keys()


def test_pictures_are_of_the_data_that_is_there():
    """A picture that fails is drawn anew by the script that drew it, from the data named."""
    drawn = {file: json.loads(Image.open(file).text[pictures.DATA]) for file in ROOT.glob("docs/**/*.png")}
    stale = [
        (str(file.relative_to(ROOT)), name)
        for file, data in drawn.items()
        for name, stored in data.items()
        if pictures.digest(file.parent / name) != stored
    ]
    assert stale == [] and all(drawn.values())


def test_a_changed_figure_is_noticed():
    text = (ROOT / "docs" / "results.md").read_text()
    assert fill(text.replace("| 2.9834 ±", "| 2.9833 ±", 1)) == text
    assert text.replace("| 2.9834 ±", "| 2.9833 ±", 1) != text


def test_the_readme_fits_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def run_of(losses, phases, seed=0):
    lines = [{"step": step, "loss": loss} for step, loss in losses.items()]
    about = {"config": {"debug": {"seed": seed}}, "phases": phases}
    return Run("name", "model", "recipe", Path(), lines), about


def test_jumps_at_switches_are_over_the_dense_run_and_what_was_there_before():
    phases = [["dense", 1, 50], ["sparse", 51, 79], ["dense", 80, 100]]
    dense = {50: 4.0, 51: 4.0, 52: 5.0, 53: 4.0, 54: 4.0, 70: 4.0, 90: 2.0, 100: 2.0}
    sparse = dense | {51: 4.04, 52: 5.1, 53: 4.0, 54: 8.0, 70: 4.4, 90: 2.1, 100: 9.0}  # 54 is later, 90 the first
    base = [run_of(dense, [["dense", 1, 100]])]
    assert _jumps([run_of(sparse, phases)], base) == "+2.0%, -5.0%"
    assert _jumps([run_of(sparse, phases), run_of(dense, phases)], base) == "+1.0%, -2.5%"
    assert _jumps([run_of(sparse | {50: 4.01}, phases)], base) == "-"  # not from the dense run's steps
    assert _jumps([run_of(sparse, phases, seed=1)], base) == "-"
    assert _jumps([run_of(sparse, phases)], [run_of({50: 4.0, 51: 4.0}, [["dense", 1, 51]])]) == "+1.0%, -"
    assert _jumps([run_of(dense, [["dense", 1, 100]])], base) == "-"


def test_headline_table(tmp_path, monkeypatch):
    cell = Cell(12e6, 1e8, (0.1, 0.3))
    law = Law(2.0, 0.0, 1.0, 2.0 * 1e8, 1.0)  # 4.0 at 1e8 tokens, and 4.2 at 2 / 2.2 of them
    evidence = Evidence([cell], {"columns_quarter": [cell]}, law, [law] * 2, {"columns_quarter": np.full((2, 1), 0.2)})
    monkeypatch.setattr(tables, "read_evidence", lambda file: evidence)
    monkeypatch.setattr("scripts.law.ROOT", tmp_path)
    contenders = {
        "dense": {"failed": "", "ms": {"dense": 240.0}, "sparse_share": 0.0},
        "float8_tensorwise": {"failed": "", "ms": {"dense": 220.0}, "sparse_share": 0.0},
        "float8_ffn": {"failed": "", "ms": {"dense": 200.0}, "sparse_share": 0.0},
        "quarter": {"failed": "", "ms": {"dense": 200.0, "sparse": 150.0}, "sparse_share": 0.8},
    }
    (tmp_path / "training.json").write_text(json.dumps({"contenders": contenders}))
    told = {"recipes": {"columns_quarter": {"runs": [], "speeds": {"1B": [str(tmp_path), "quarter"]}}}}
    (tmp_path / "evidence.json").write_text(json.dumps(told))
    table = tables.headline_table(tmp_path / "evidence.json")
    # Over the faster of the two float8 steps, which is 1.2x; 1.5x times 2 / 2.2 is 1.36x.
    assert "| 1B 1.60x, 1.33x | 1B 1.50x, 1.25x | 12M, 8 each | +5.0% | 1B 1.36x, 1.14x |" in table


def entry(**more):
    return {"backend": "groups", "reason": "why", "checks": [{"failed": []}]} | more


def test_kernels_table(tmp_path):
    products = {"(1)": 700.0, "(2)": 610.4, "(6)": 580.0}
    rates = {product: {"tflops": rate, "of_cublas": rate / 700} for product, rate in products.items()}
    contenders = {
        "dense": entry(
            **{"ms": 20.0, "rounds": [19.0, 21.0], "speedup": 1.0, "graph_ms": 18.5, "graph_speedup": 1.0},
            **{"peak_bytes": 2**31, "products": {}, "stages": {"(1)": 10.0, "other": 8.0}},
        ),
        "groups_quarter": entry(
            ms=8.0, rounds=[8.0], speedup=2.5, peak_bytes=2**30, products=rates, stages={"(1)": 6.0}
        ),
        "groups_eighth": entry(checks=[{"failed": []}, {"failed": ["y off"]}]),
        "venom_2of16": {"backend": "reference", "reason": "no kernels"},
    }
    result = {
        "command": "python -m x",
        "date": "2026-01-02T03:04:05",
        "hardware": {"device": "GPU"},
        "versions": {"torch": "2", "triton": "3"},
        "tokens": 128,
        "contenders": {name: f"about {name}" for name in contenders},
        "shapes": [{"dim": 64, "hidden_dim": 256, "contenders": contenders}],
    }
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    text = fill(f"a\n<!-- kernels: {tmp_path}/kernels.json -->\nold\n<!-- end -->\nb\n")
    assert fill(text) == text
    assert "old" not in text
    assert "| replayed, ms | speed-up | peak memory |" in text and "replayed from a CUDA graph" in text
    assert "Not timed: `groups_eighth` (failed its check); `venom_2of16` (no kernels)." in text
    assert "| 64, 256 | `dense` | 20.00 | 19.00 to 21.00 | 1.00x | 18.50 | 1.00x | 2.00 GiB | - |" in text
    assert "| `groups_quarter` | 8.00 | 8.00 to 8.00 | 2.50x | - | - | 1.00 GiB | 580 to 610 |" in text
    text = fill(f"<!-- stages: {tmp_path}/kernels.json -->\n<!-- end -->")
    assert "| 64, 256 | (1) | other | sum |" in text
    assert "| `dense` | 10.00 | 8.00 | 18.00 |" in text
    assert "| `groups_quarter` | 6.00 |  | 6.00 |" in text


def test_evaluations_table(tmp_path):
    about = {"text": {"files": ["a", "b"], "tokens": 1234}, "hardware": "GPU", "versions": {"torch": "2"}}
    scores = {
        "dense": {"loss": 2.0, "bits_per_byte": 1.0},
        "preceding": {"loss": 2.1, "bits_per_byte": 1.05, "energy_kept": 0.9, "prefill_tokens/s": 123456.0},
    }
    lines = [about | {"date": f"2026-01-0{day}T00", "scores": scores} for day in (1, 2)]
    lines.append(about | {"date": "2026-01-03T00", "scores": {}, "text": None})
    (tmp_path / "run_s0").mkdir()
    (tmp_path / "run_s0" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = fill(f"<!-- evaluations: {tmp_path} -->\n<!-- end -->")
    assert text.count("| `run_s0` | dense | 2.0000 | - | 1.0000 | - | - |") == 1
    assert "| `run_s0` | preceding | 2.1000 | +0.1000 (+5.00%) | 1.0500 | 90.0% | 123k |" in text
    assert "1,234 tokens of 2 files. GPU, torch 2, 2026-01-01 to 2026-01-02." in text


def test_batches_table(tmp_path):
    for sequences, last in ((12, 1), (8, 15)):
        about = {
            "config": {
                "recipe": "recipes/dense.toml",
                "model": {"flavor": "1b"},
                "training": {"steps": 15, "local_batch_size": sequences, "seq_len": 64},
                "activation_checkpoint": {"mode": "none"},
                "compile": {"enable": True},
            },
            "versions": {"torch": "2", "torchtitan": "3", "triton": "4"},
            "hardware": {"device": "GPU", "ranks": 1},
            "commit": "abcdefabcdef-dirty",
            "date": "2026-01-02T03:04:05",
        }
        row = {"step": last, "phase": "dense", "loss": 2.0, "tokens": 64}
        row |= {"tokens_per_second": 73512.0, "peak_active_gib": 68.69}
        (tmp_path / f"dense_{sequences}").mkdir()
        (tmp_path / f"dense_{sequences}" / "run.json").write_text(json.dumps(about))
        (tmp_path / f"dense_{sequences}" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    lines = fill(f"<!-- batches: {tmp_path} -->\n<!-- end -->").splitlines()
    assert lines[3] == "| `dense` | dense | 8 | yes | 73.5k | 68.7 GiB |"
    assert lines[4] == "| `dense` | dense | 12 | no | - | - |"
    assert "1 x GPU, torch 2, torchtitan 3, triton 4, 2026-01-02, commit abcdefabcd and changes." in lines[6]
