"""Sparse phases that keep shares of their own, beside what else a job can have.

Each run is dense in step 1, keeps an eighth in 2 and 3, the recipe's quarter in 4 and 5, a half in 6 and 7, and is
dense from step 8 on.
"""

import json

import pytest
import torch
from conftest import go_on_after, losses, merge, run_ranks
from test_experts import MOE
from test_parallel import COMPILED

import kernels
from kernels.columns.ffn import LARGE_BLOCKS
from kernels.columns.ffn_fp8 import LARGE_BLOCKS_FP8
from kernels.experts import GROUPED_COLUMNS
from kernels.groups.ffn import TILE_GROUPS

SLOW = pytest.mark.slow
SHARES = {2: 0.125, 3: 0.125, 4: None, 5: None, 6: 0.5, 7: 0.5}
OF_RECIPE = 0.25
LAST_STEP = 9


def phases(*keys: str) -> tuple[str, str]:
    """schedule.phases whose three sparse ones have these keys."""
    sparse = ", ".join(f'{{mode = "sparse"{key}, end = {end}}}' for key, end in zip(keys, (3, 5, 7), strict=True))
    return "--schedule.phases", f"[{{end = 1}}, {sparse}, {{end = 1.0}}]"


RISING = (
    *phases(", keep = 0.125", "", ", keep = 0.5"),
    *("--training.steps", str(LAST_STEP), "--validation.freq", "2", "--checkpoint.interval", "1"),
)
# One of two phases that keep the recipe's share.
CONSTANT = (*phases("", "", ""), "--checkpoint.change_recipe", "true")
BLOCKS_OF_512 = ("--activations.v", "512", "--training.seq_len", "128")  # as fp8 has them, in a whole micro-batch
FLOAT8 = ("--model.converters", '["quantize.linear.float8"]', "--quantize.linear.float8.emulate", "true")
QAT = ("--precision.qat", "int4")
FULL = ("--activation_checkpoint.mode", "full")
SELECTIVE = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option")
# Two ranks whose order of neurons does not depend on rounding, and validation without rows that fill up a batch.
RANKS = (
    *("--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    *("--router.cluster_by", "weights", "--validation.sequences", "8"),
)
LAYOUTS = {
    "shards": ("--activations.v", "32", "--router.cluster_size", "32"),
    "experts": (*MOE, "--router.cluster_size", "16", "--parallelism.expert_parallel_degree", "2"),
}


def assert_shares(run: dict[int, dict]) -> None:
    """That rows name the share of their phase, and that a validation with the pattern keeps more of a larger one.

    With a constant share, the growing activations of the first steps let it keep 0.07 more by the next phase.
    """
    assert {step: row.get("keep") for step, row in run.items() if row["phase"] == "sparse"} == SHARES
    kept = [run[step]["energy_kept"] for step in (2, 4, 6)]
    assert kept[0] + 0.1 < kept[1] < kept[2] - 0.1, kept


@pytest.mark.parametrize(
    "recipe, more",
    [
        ("columns_quarter", ()),
        pytest.param("columns_quarter_fp8", BLOCKS_OF_512, marks=SLOW),
        pytest.param("groups_quarter", ("--activations.g", "16"), marks=SLOW),
    ],
)
def test_a_phase_takes_the_steps_of_a_run_of_its_share(train, tmp_path, recipe, more):
    """From the checkpoint before a step of each; dense phases, before and after them, in float8."""
    words = [*RISING, *FLOAT8, *more]
    whole = train(tmp_path / "whole", *words, recipe=recipe)
    assert_shares(whole)

    def take(step: int, *more: str) -> dict:
        copy = go_on_after(step - 1, tmp_path / "whole", tmp_path / f"{step}")
        return train(copy, *merge(words, list(more)), recipe=recipe, stop_after=step)[step]

    for step in (3, 4, 6):
        own = take(step, *CONSTANT, "--activations.keep", str(SHARES[step] or OF_RECIPE))
        for name in ("loss", "grad_norm", "val_loss", "val_loss_sparse", "energy_kept"):
            assert own.get(name) == whole[step].get(name), (step, name)
    assert take(8, "--model.converters", "[]")["loss"] != whole[8]["loss"]


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The rows of a run whose last phase rounds weights to int4, made once."""
    known: dict[int, dict] = {}

    def get(train) -> dict[int, dict]:
        if not known:
            known.update(train(tmp_path_factory.mktemp("eager"), *RISING, *QAT, recipe="columns_quarter"))
        return known

    return get


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*COMPILED, *FULL, "--validation.enable", "false"), id="compiled"),
        pytest.param((*SELECTIVE, "op"), id="selective"),
        pytest.param(FULL, id="full", marks=SLOW),
        *(
            pytest.param((*COMPILED, *mode), id=f"compiled-{mode[-1]}", marks=SLOW)
            for mode in (FULL, (*SELECTIVE, "op"), (*SELECTIVE, "1"))
        ),
    ],
)
def test_compiled_and_recomputed_steps_are_the_eager_ones(train, eager, tmp_path, words):
    """Of each share, and of a last phase with rounded weights; each has a graph of its own."""
    torch._dynamo.reset()
    run = train(tmp_path / "run", *merge([*RISING, *QAT], list(words)), recipe="columns_quarter")
    expected, compiled = eager(train), "--compile.enable" in words
    for each in (expected, run) if "--validation.enable" not in words else (expected,):
        assert_shares(each)
        assert {step for step, row in each.items() if "val_loss_quantised" in row} == {8, LAST_STEP}
    names = {"loss", "grad_norm", "val_loss", "val_loss_sparse", "val_loss_quantised", "energy_kept"}
    for step, row in run.items():
        compared = {name: row[name] for name in names & row.keys()}
        assert compared == pytest.approx(
            {name: expected[step][name] for name in compared}, rel=1e-5 if compiled else 0
        ), step
    graphs = {step: row["graphs_compiled"] for step, row in run.items() if row["graphs_compiled"]}
    assert graphs == (dict.fromkeys((1, 2, 4, 6, 8), 1) if compiled else {})


@SLOW
@pytest.mark.parametrize(
    "recipe, family, words",
    [
        ("columns_quarter", LARGE_BLOCKS, ()),
        ("columns_quarter_fp8", LARGE_BLOCKS_FP8, BLOCKS_OF_512),
        ("groups_quarter", TILE_GROUPS, ("--activations.v", "128", "--model.hidden_dim", "1024")),
    ],
    ids=["columns", "fp8", "groups"],
)
def test_the_kernels_operators_are_compiled_for_each_share(train, tmp_path, recipe, family, words):
    """The shapes that they tell the compiler depend on the share; their CPU path computes what the reference does."""
    torch._dynamo.reset()
    words = (*RISING, *words, "--validation.enable", "false")
    reference = train(tmp_path / "reference", *words, recipe=recipe)
    with kernels.prefer(family):
        run = train(tmp_path / "run", *words, *COMPILED, *FULL, recipe=recipe)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["backend"]["name"] == family.name
    assert losses(run) == pytest.approx(losses(reference), rel=1e-3 if family == LARGE_BLOCKS_FP8 else 1e-4)
    assert {step for step, row in run.items() if row["graphs_compiled"]} == {1, 2, 4, 6}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
@pytest.mark.parametrize("layout", ["shards", pytest.param("experts", marks=SLOW)])
def test_two_ranks_resume_exactly_in_each_share(tiny, tmp_path, layout):
    words = merge([*RISING, *RANKS, "--checkpoint.interval", "2"], list(LAYOUTS[layout]))
    whole = run_ranks(tiny, tmp_path / "whole", "columns_quarter", *words)
    assert_shares(whole)
    for step in (2, 4, 6):
        copy = go_on_after(step, tmp_path / "whole", tmp_path / f"{step}")
        again = run_ranks(tiny, copy, "columns_quarter", *merge(words, ["--checkpoint.interval", "100"]))
        measured = {"loss", "grad_norm", "keep", "val_loss", "val_loss_sparse", "energy_kept", "router_balance"}
        for later in range(step + 1, LAST_STEP + 1):
            mine, theirs = ({name: run[later].get(name) for name in measured} for run in (again, whole))
            assert mine == theirs, (step, later)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA allows no fork")
def test_parallel_experts_take_the_steps_of_one_process_in_each_share(tiny, train, tmp_path):
    """A rank has two experts of four, which get the tokens of both; the one process has the shares in activations."""
    words = merge([*RISING, *RANKS], list(LAYOUTS["experts"]))
    two = run_ranks(tiny, tmp_path / "two", "columns_quarter", *words)
    assert_shares(two)
    alone = merge(words, ["--training.local_batch_size", "4", "--parallelism.expert_parallel_degree", "1", *CONSTANT])
    for step in (2, 4, 6):
        copy = go_on_after(step - 1, tmp_path / "two", tmp_path / f"{step}")
        own = ("--activations.keep", str(SHARES[step] or OF_RECIPE))
        one = train(copy, *merge(alone, list(own)), recipe="columns_quarter", stop_after=step)
        for name in ("loss", "grad_norm", "val_loss", "expert_balance"):
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-4), (step, name)


@SLOW
def test_compiled_and_recomputed_experts_take_the_eager_steps(train, tmp_path, monkeypatch):
    """The path of a GPU on the CPU: grouped products in bf16, all experts at once, new graphs for each share alone."""
    monkeypatch.setattr(kernels.experts, "_uses_grouped_mm", lambda x, *matrices: True)
    torch._dynamo.reset()
    words = (*RISING, *MOE, "--router.cluster_size", "16", "--training.mixed_precision_param", "bfloat16")
    with kernels.prefer(GROUPED_COLUMNS):
        eager = train(tmp_path / "eager", *words, recipe="columns_quarter")
        run = train(tmp_path / "compiled", *words, *COMPILED, *FULL, recipe="columns_quarter")
    assert_shares(run)
    for name in ("loss", "val_loss", "val_loss_sparse"):
        of_run, of_eager = ({step: row[name] for step, row in each.items() if name in row} for each in (run, eager))
        assert of_run == pytest.approx(of_eager, rel=1e-3)
    graphs = {step for step, row in run.items() if row["graphs_compiled"]}
    assert {1, 2, 4, 6} <= graphs and not {5, 7, 8, 9} & graphs, graphs
