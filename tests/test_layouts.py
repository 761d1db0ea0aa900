"""Each recipe family under FSDP2 and what goes with it: four ranks take the steps of one process, from checkpoints.

The one process computes what the ranks do: the same micro-batches and, in sparse phases, the halves of the neurons
(tensor parallelism) or the shares of the sequences (context parallelism) one after the other.
"""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, go_on_after, losses, merge, rows, run_ranks
from test_context import ring_on_a_cpu, shares, whole
from test_parallel import (
    ALONE,
    FP8,
    FP8_ROUNDING,
    ROUNDING,
    SHARDABLE,
    assert_steps_of_one,
    in_halves,
)
from torch import Tensor

from models.feed_forward import FeedForward
from recipes.restore import find_checkpoint
from recipes.sparsity import Sparsity
from scripts.chaos import _read
from scripts.trained import export_weights

DENSE = ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false")
CLUSTERS = ("--router.cluster_size", "32")
RECIPES = {
    "dense": DENSE,
    "columns_quarter": CLUSTERS,
    "columns_quarter_fp8": FP8,
    "groups_quarter": ("--activations.g", "32", *CLUSTERS),
    "venom_2of16": CLUSTERS,  # with 2:4 weights
    "activations_2of4": ("--activations.v", "64"),  # not read, so it has to be the default
    "weights_2of4": ("--activations.v", "64"),
}
LAYOUTS = {
    "fsdp": (),
    "hsdp": ("--parallelism.data_parallel_replicate_degree", "2"),
    "tensor": ("--parallelism.tensor_parallel_degree", "2"),
    "pipeline": ("--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"),
    "context": ("--parallelism.context_parallel_degree", "2"),
}
# Parameters are sharded over the ranks of a sequence, as by FSDP2.
ALL = "tensor, pipeline and context"
MIXED = {ALL: (*LAYOUTS["tensor"], *LAYOUTS["pipeline"], *LAYOUTS["context"])}


@pytest.fixture
def as_in(train, monkeypatch):
    """`as_in(layout)` trains in this process, with sparse FFNs computed in the parts that its ranks compute."""
    forward = FeedForward._sparse_forward

    def halves(ffn: FeedForward, x: Tensor) -> Tensor:
        return in_halves(ffn, x.flatten(0, -2)).view_as(x)

    def in_shares(of_a_share, ffn: FeedForward, x: Tensor) -> Tensor:
        return whole([of_a_share(ffn, share) for share in shares(x, 2)])

    parts = {
        "tensor": halves,
        "context": lambda ffn, x: in_shares(forward, ffn, x),
        ALL: lambda ffn, x: in_shares(halves, ffn, x),
    }

    begin = Sparsity.__init__

    def choose(layout: str):
        def init(self: Sparsity, *arguments) -> None:
            begin(self, *arguments)
            self.shards = 2 if "tensor" in layout else 1  # neurons are clustered inside them

        monkeypatch.setattr(Sparsity, "__init__", init)
        monkeypatch.setattr(FeedForward, "_sparse_forward", parts.get(layout, forward))
        return train

    return choose


def run_in(layout: str, tiny: list[str], folder: Path, recipe: str, words: list[str], processes: int = 4) -> dict:
    words = merge(words, list((LAYOUTS | MIXED)[layout]))
    prepare = ring_on_a_cpu if "context" in layout else None
    return run_ranks(tiny, folder, recipe, *words, processes=processes, prepare=prepare)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_take_the_steps_of_one_process(tiny, as_in, tmp_path, layout, recipe):
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "4"], list(RECIPES[recipe]))
    if layout == "context" and recipe == "columns_quarter_fp8":  # a block has to fit into a share
        words = merge(words, ["--training.seq_len", "1024", "--validation.sequences", "4"])
    run_in(layout, tiny, tmp_path / "four", recipe, words)
    train = as_in(layout)
    tolerance = FP8_ROUNDING if "fp8" in recipe and layout in ("tensor", "context") else ROUNDING
    assert_steps_of_one(
        tmp_path / "four", lambda copy, step: train(copy, *words, recipe=recipe, stop_after=step), (3, 5), tolerance
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("recipe", ["columns_quarter", "groups_quarter", "venom_2of16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_begin_a_sparse_phase_as_one_process(tiny, as_in, tmp_path, layout, recipe):
    """From a checkpoint of the dense phase before it: the same clusters, order of neurons, scales and first step."""
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "4"], list(RECIPES[recipe]))
    phases = '[{mode = "dense", end = 2}, {mode = "sparse", end = 4}, {mode = "dense", end = 1.0}]'
    # By activations, which differ by rounding, a neuron could come into another cluster.
    words = merge(words, ["--schedule.phases", phases, "--router.cluster_by", "weights"])
    run_in(layout, tiny, tmp_path / "four", recipe, words)
    train = as_in(layout)
    assert_steps_of_one(
        tmp_path / "four", lambda copy, step: train(copy, *words, recipe=recipe, stop_after=step), (2, 3)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if each == "fsdp" else pytest.mark.slow) for each in LAYOUTS]
)
def test_ranks_change_the_share_of_a_phase_as_one_process(tiny, as_in, tmp_path, layout):
    """The step before and after a change between sparse phases, and the share that the rows name."""
    words = merge(
        [*SHARDABLE, *ALONE, "--training.global_batch_size", "4"], [*CLUSTERS, "--router.cluster_by", "weights"]
    )
    phases = '{mode = "dense", end = 1}, {mode = "sparse", keep = 0.125, end = 3}, {mode = "sparse", end = 4}'
    words = merge(words, ["--schedule.phases", f'[{phases}, {{mode = "sparse", keep = 0.5, end = 1.0}}]'])
    found = run_in(layout, tiny, tmp_path / "ranks", "columns_quarter", words, 2 if layout == "fsdp" else 4)
    assert [found[step].get("keep") for step in (1, 2, 3, 4, 5)] == [None, 0.125, 0.125, None, 0.5]
    train = as_in(layout)
    assert_steps_of_one(
        tmp_path / "ranks",
        lambda copy, step: train(copy, *words, recipe="columns_quarter", stop_after=step),
        (2, 3, 4) if layout != "fsdp" else (3, 4),
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("recipe", ["dense", "columns_quarter", "venom_2of16"])
def test_eight_ranks_mix_all_parallelisms(tiny, as_in, tmp_path, recipe):
    """Two by two by two, with activation checkpointing; a step has two micro-batches for each stage."""
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "2"], list(RECIPES[recipe]))
    words += ["--activation_checkpoint.mode", "full"]
    run_in(ALL, tiny, tmp_path / "eight", recipe, words, processes=8)
    train = as_in(ALL)
    assert_steps_of_one(
        tmp_path / "eight", lambda copy, step: train(copy, *words, recipe=recipe, stop_after=step), (3, 5)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize(
    "layout, recipe",
    [
        ("fsdp", "columns_quarter"),
        *(pytest.param("fsdp", recipe, marks=pytest.mark.slow) for recipe in RECIPES if recipe != "columns_quarter"),
        *(pytest.param(layout, "columns_quarter", marks=pytest.mark.slow) for layout in ("tensor", "pipeline")),
        *(pytest.param(layout, "dense", marks=pytest.mark.slow) for layout in ("tensor", "pipeline")),
    ],
)
def test_two_ranks_train_with_dense_phases_in_float8(tiny, as_in, tmp_path, layout, recipe):
    """torchao's float8, emulated; its scales are of whole weights and micro-batches, also where ranks share them."""
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "2"], list(RECIPES[recipe]))
    float8 = ["--model.converters", '["quantize.linear.float8"]', "--quantize.linear.float8.emulate", "true"]
    folder = tmp_path / "two"
    two = run_in(layout, tiny, folder, recipe, merge(words, float8), processes=2)
    train = as_in(layout)

    def one_goes_on(copy: Path, step: int) -> dict[int, dict]:
        return train(copy, *words, *float8, recipe=recipe, stop_after=step)

    assert_steps_of_one(folder, one_goes_on, (3, 5), FP8_ROUNDING)
    bf16 = train(go_on_after(4, folder, tmp_path / "bf16"), *words, recipe=recipe, stop_after=5)
    assert bf16[5]["loss"] != pytest.approx(two[5]["loss"], rel=10 * ROUNDING)


ONE = "one process"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize(
    "recipe, layout, others, processes",
    [
        ("columns_quarter", "tensor", ["context"], 2),
        *(pytest.param("columns_quarter", each, [*LAYOUTS], 4, marks=pytest.mark.slow) for each in (ONE, *LAYOUTS)),
        *(
            pytest.param(recipe, "tensor", ["pipeline"], 4, marks=pytest.mark.slow)
            for recipe in RECIPES
            if recipe != "columns_quarter"
        ),
    ],
)
def test_a_sparse_phase_goes_on_in_other_layouts(tiny, as_in, tmp_path, recipe, layout, others, processes):
    """From its third step, through the switch to dense steps: steps are those of one process from the same checkpoints.

    In the layout of the run itself the steps are equal to the last bit. The export of every layout is whole.
    """
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "4"], list(RECIPES[recipe]))
    run = tmp_path / "run"
    if layout == ONE:
        as_in(ONE)(run, *words, recipe=recipe)
    else:
        run_in(layout, tiny, run, recipe, words, processes)
    for other in others:
        folder = go_on_after(3, run, tmp_path / other)
        found = run_in(other, tiny, folder, recipe, words, processes)
        if other == layout:
            assert losses(found) == losses(rows(run))
            continue
        train = as_in(other)
        assert_steps_of_one(
            folder,
            lambda copy, step, train=train: train(copy, *words, recipe=recipe, stop_after=step),  # type: ignore[misc]
            (4, 5),
        )
        checkpoint = find_checkpoint(str(folder))
        exported, saved = export_weights(checkpoint, None), _read(checkpoint.folder)
        assert len(exported) == 2 * 8 + 3
        assert torch.equal(exported["model.layers.1.mlp.up_proj.weight"], saved["layers.1.feed_forward.w1.weight"])


def assert_named_tests_exist(text: str) -> int:
    """Of `test_file.py`: `part_of_a_name`, ...; how many of them there are."""
    named = re.findall(r"((?:`test_\w+\.py`(?:, )?)+)((?::|,) `\w+`(?:, `\w+`)*)?", text)
    for files, tests in named:
        for file in re.findall(r"test_\w+\.py", files):
            text = (ROOT / "tests" / file).read_text()
            for name in re.findall(r"\w+", tests):
                assert re.search(rf"def test_\w*{name}", text), f"{file}: {name}"
    return len(named)


def table(page: str, above: str) -> list[list[str]]:
    """The cells of the table with such a first line, row by row."""
    lines = page[page.index(above) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_pages_name_tests_that_exist():
    """Every row of the tables of what runs with what that says yes names a test file, and parts of names in it."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    rows_with_yes = [row for row in table(page, "| parallelism |") if "yes" in row]
    assert len(rows_with_yes) >= 14 and all("`test_" in row[-1] for row in rows_with_yes)
    assert assert_named_tests_exist(page) > len(rows_with_yes)


def test_every_yes_of_the_readme_names_a_test_that_shows_it():
    head, _, *table_rows = table((ROOT / "README.md").read_text(), "| | dense |")
    families = {
        "dense": {"dense"},
        "`columns_*`": {"columns_quarter"},
        "`groups_*`": {"groups_quarter"},
        "`venom_*`": {"venom_2of16"},
        "2:4": {"activations_2of4", "weights_2of4"},
    }
    assert head[-6:-1] == [*families]
    layouts = {"FSDP2, HSDP": {"fsdp", "hsdp"}} | {f"{name} parallelism": {name} for name in LAYOUTS}
    shown = set()
    for name, *cells, tests in table_rows:
        assert assert_named_tests_exist(tests), name
        if layout := layouts.get(name.removesuffix(", with FSDP2")):
            # Each family that says yes is one that the test runs in this layout.
            shown |= layout
            assert "`four_ranks_take`" in tests
            for cell, recipes in zip(cells, families.values(), strict=True):
                assert cell in ("yes", "yes, fp8 too") and recipes <= RECIPES.keys()
                assert "fp8" not in cell or {f"{recipe}_fp8" for recipe in recipes} <= RECIPES.keys()
    assert shown == LAYOUTS.keys()
