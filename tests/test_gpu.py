"""On a CUDA device: the tiny job of every recipe as users run it, compiled and in bf16, beside what defines it."""

import json

import pytest
import torch
from conftest import ROOT, launch, losses, merge, rows
from test_train import DENSE, LAST_STEP

from kernels import MASKED, prefer

pytestmark = pytest.mark.gpu

BACKENDS = {
    "activations_2of4": "two_four",
    "columns_eighth": "columns",
    "columns_eighth_fp8": "columns_fp8",
    "columns_half": "columns",
    "columns_half_fp8": "columns_fp8",
    "columns_quarter": "columns",
    "columns_quarter_fp8": "columns_fp8",
    "dense": "dense",
    "groups_eighth": "groups",
    "groups_quarter": "groups",
    "venom_2of16": "venom",
    "venom_4of16": "venom",
    "venom_paper": "columns",
    "weights_2of4": "two_four",
}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
BF16 = ("--training.mixed_precision_param", "bfloat16", "--compile.enable", "true")
# A width and blocks that the kernels take.
WIDE = ("--model.dim", "64", "--activations.v", "128")
WIDE_COLUMNS = ("--model.dim", "64", "--activations.v", "512", "--training.seq_len", "128")


@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_follow_the_reference(train, tmp_path, recipe):
    # Whether a key is read depends on the pattern: 2:4 has no blocks.
    words = (
        WIDE_COLUMNS if BACKENDS[recipe].startswith("columns") else WIDE[:2] if BACKENDS[recipe] == "two_four" else WIDE
    )
    words += DENSE if recipe == "dense" else ()
    torch._dynamo.reset()
    compiled = train(tmp_path / "compiled", *words, *BF16, recipe=recipe)
    assert compiled[LAST_STEP]["loss"] < compiled[1]["loss"] - 0.3
    assert 0 < compiled[LAST_STEP]["mfu"] == compiled[LAST_STEP]["mfu_executed"]
    backend = json.loads((tmp_path / "compiled" / "run.json").read_text())["backend"]["name"]
    assert backend == BACKENDS[recipe]
    if backend not in ("dense", "reference"):
        assert compiled[5]["mfu_executed"] < compiled[5]["mfu"]

    with prefer(MASKED):
        reference = train(tmp_path / "reference", *words, *BF16[:2], recipe=recipe)
    assert losses(compiled) == pytest.approx(losses(reference), rel=0.01)
    # The router rounds as well, and sends some tokens of so small a model elsewhere.
    float32 = train(tmp_path / "float32", *words, recipe=recipe)
    assert losses(compiled) == pytest.approx(losses(float32), rel=0.05)


def test_phases_compile_once(train, tmp_path):
    """Dense, sparse, dense: a graph a mode and none for the way back, in training and in evaluation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = {}
    phases = '[{mode = "dense", end = 2}, {mode = "sparse", end = 4}, {mode = "dense"}]'
    for steps, words in (("dense", DENSE), ("phases", ("--schedule.phases", phases))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(tmp_path / steps, *words, *WIDE, *BF16, "--compile.components", "model")
        graphs[steps] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["phases"] == 2 * graphs["dense"], graphs


def test_resume_follows_the_uninterrupted_run(train, tmp_path):
    whole = train(tmp_path / "whole", *WIDE, *BF16)
    for stop in (6, None):
        torch._dynamo.reset()
        run = train(tmp_path / "run", *WIDE, *BF16, stop_after=stop)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_gpus_follow_one(tiny, train, tmp_path, recipe):
    """Under FSDP2 the micro-batches of one GPU, half of them each; neurons are clustered by the tokens of both."""
    words = ("--model.dim", "64", "--training.seq_len", "256", *BF16)
    if BACKENDS[recipe] != "two_four":  # 2:4 has no blocks
        v = "512" if BACKENDS[recipe].startswith("columns") else "128"  # has to fit into a micro-batch
        words += ("--activations.v", v)
    words += ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    words += DENSE if recipe == "dense" else ()
    torch._dynamo.reset()
    one = train(tmp_path / "one", *words, recipe=recipe)
    command = ["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *tiny]
    result = launch(*merge(command, [*words, "--job.dump_folder", str(tmp_path / "two")]), processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    two = rows(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=0.03)
    assert two[LAST_STEP]["tokens"] == one[LAST_STEP]["tokens"]
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [run["hardware"]["ranks"] for run in runs] == [1, 2]
    assert runs[0]["backend"] == runs[1]["backend"] and runs[1]["backend"]["name"] == BACKENDS[recipe]
