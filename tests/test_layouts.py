"""Each recipe family under FSDP2 and what goes with it: four ranks take the steps of one process, from checkpoints.

The one process computes what the ranks do: the same micro-batches and, in sparse phases, the halves of the neurons
(tensor parallelism) or the shares of the sequences (context parallelism) one after the other.
"""

import re

import pytest
import torch
from conftest import ROOT, fork, merge
from test_context import ring_on_a_cpu, shares, whole
from test_parallel import ALONE, FP8, FP8_ROUNDING, ROUNDING, SHARDABLE, assert_steps_of_one, in_halves
from torch import Tensor

from models.feed_forward import FeedForward

DENSE = ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false")
CLUSTERS = ("--router.cluster_size", "32")
RECIPES = {
    "dense": DENSE,
    "columns_quarter": CLUSTERS,
    "columns_quarter_fp8": (*FP8, *CLUSTERS),
    "groups_quarter": ("--activations.g", "32", *CLUSTERS),
    "venom_2of16": CLUSTERS,  # with 2:4 weights
    "activations_2of4": ("--activations.v", "64"),  # not read, so it has to be the default
}
LAYOUTS = {
    "fsdp": (),
    "hsdp": ("--parallelism.data_parallel_replicate_degree", "2"),
    "tensor": ("--parallelism.tensor_parallel_degree", "2"),
    "pipeline": ("--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"),
    "context": ("--parallelism.context_parallel_degree", "2"),
}


@pytest.fixture
def as_in(train, monkeypatch):
    """`as_in(layout)` trains in this process, with sparse FFNs computed in the parts that its ranks compute."""
    forward = FeedForward._sparse_forward

    def in_shares(ffn: FeedForward, x: Tensor) -> Tensor:
        return whole([forward(ffn, share) for share in shares(x, 2)])

    def choose(layout: str):
        parts = {"tensor": lambda ffn, x: in_halves(ffn, x.flatten(0, -2)).view_as(x), "context": in_shares}
        if layout in parts:
            monkeypatch.setattr(FeedForward, "_sparse_forward", parts[layout])
        return train

    return choose


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_take_the_steps_of_one_process(tiny, as_in, tmp_path, layout, recipe):
    words = merge([*SHARDABLE, *ALONE, "--training.global_batch_size", "4"], list(RECIPES[recipe]))
    if layout == "context" and recipe == "columns_quarter_fp8":  # a block has to fit into a share
        words = merge(words, ["--training.seq_len", "1024", "--validation.sequences", "4"])
    command = merge(tiny, [*words, "--job.dump_folder", str(tmp_path / "four")])
    command = merge(command, list(LAYOUTS[layout]))
    prepare = ring_on_a_cpu if layout == "context" else None
    result = fork(
        *("--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *command),
        processes=4,
        prepare=prepare,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    train = as_in(layout)
    tolerance = FP8_ROUNDING if "fp8" in recipe and layout in ("tensor", "context") else ROUNDING
    assert_steps_of_one(
        tmp_path / "four", lambda copy, step: train(copy, *words, recipe=recipe, stop_after=step), (3, 5), tolerance
    )


def test_the_page_names_tests_that_exist():
    """Every row of the table of what runs with what that says yes names a test file, and parts of names in it."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| yes |" in line]
    assert len(rows) >= 14 and all("`test_" in row for row in rows)
    named = re.findall(r"`(test_\w+\.py)`((?::|,) `\w+`(?:, `\w+`)*)?", page)
    assert len(named) > len(rows)
    for file, tests in named:
        text = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"\w+", tests):
            assert re.search(rf"def test_\w*{name}", text), f"{file}: {name}"
