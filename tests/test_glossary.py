"""docs/glossary.md has every recipe key, metric, mode, family and column of a table, and the help names the page."""

import dataclasses
import importlib
import re
import sys

import pytest
from conftest import ROOT

from configs import schema
from kernels import FeedForwardSparsity, Groups, feed_forward
from models.feed_forward import inference_modes
from scripts.runs import HEALTH, VALIDATIONS

PAGE = ROOT / "docs" / "glossary.md"
# Columns that say what they are, or what a row is about.
PLAIN = {"run", "recipe", "loss", "validation loss", "bits/byte", "step", "time", "ms", "speed-up", "peak memory"}
PLAIN |= {
    "what",
    "d, f",
    "dense step",
    "sparse step",
    "over `dense`",
    "over SwiGLU",
    "mode",
    "sequences",
    "fits",
    "(2) to (6)",
    "parameters",
}
TABLES = r"<!-- (?:runs|probes|evaluations|training|headline|law|batches|kernels)\b[^>]*-->\s*\| ([^\n]*) \|\n"
SCRIPTS = ("benchmark", "benchmark_kernels", "estimate", "evaluate", "law", "plot", "probe", "report", "study")


@pytest.fixture(scope="module")
def terms() -> set[str]:
    """What the page defines: the first cells of its tables, split at commas."""
    cells = re.findall(r"^\| (.*?) \| ", PAGE.read_text(), re.MULTILINE)
    whole = {re.sub(r"[`*]", "", cell) for cell in cells}
    return whole | {part.strip() for cell in whole for part in cell.split(", ")}


def test_what_code_and_tables_name_is_defined(terms):
    keys = {
        f"{section}.{field.name}"
        for section in schema.RECIPE_SECTIONS
        for field in dataclasses.fields(getattr(schema, section.capitalize()))
    }
    assert keys <= terms, keys - terms
    assert {*HEALTH, *VALIDATIONS, "loss", "val_bpb", "mfu"} <= terms
    sparsity = FeedForwardSparsity(Groups(8, 1, 0.5), (1,), clusters=2)
    modes = set(inference_modes(sparsity, 64))
    assert len(modes) == 6 and modes <= terms, modes - terms
    text = PAGE.read_text()
    for name in ("reference", *(family.name for family in feed_forward.FAMILIES)):
        assert f"`{name}`" in text, name


def test_every_column_of_a_generated_table_is_defined(terms):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "kernels" / "README.md"]
    headers = {header for page in pages for header in re.findall(TABLES, page.read_text())}
    columns = {column.split(", ms")[0].split(", TFLOP")[0] for header in headers for column in header.split(" | ")}
    assert {"energy kept", "leak KL", "reached"} <= columns
    assert columns - PLAIN <= terms, columns - PLAIN - terms


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_a_script_names_the_page(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        script = importlib.import_module(f"scripts.{name}")
        script.estimate(["--help"]) if name == "estimate" else script.main()
    assert "docs/glossary.md" in capsys.readouterr().out


def test_the_pages_link_it():
    assert "(glossary.md)" in (ROOT / "docs" / "README.md").read_text()
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text()
