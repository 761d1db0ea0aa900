"""A run under pipeline parallelism equals one process that computes the same micro-batches, to rounding.

Both add the same gradients in the same order, 1F1B and GPipe to the last bit. What differs is the norm of the
gradient, which is added up by stages, and the order in which an interleaved schedule adds micro-batches: each by a few
units in the last place of float32, 6e-8. Patterns and clusters are the same choices, as they read the same numbers.
"""

import shutil

import pytest
import torch
from conftest import fork, merge, rows

from recipes.restore import find_checkpoint
from scripts.trained import export_weights

PIPELINE = ("--parallelism.pipeline_parallel_degree", "2")
INTERLEAVED = ("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B")
# Four sequences a step, one to a micro-batch; validation, too, without rows that fill up a batch.
ALONE = ("--training.local_batch_size", "1", "--training.global_batch_size", "4")
TWO_EACH = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
COMPILED = ("--compile.enable", "true", "--compile.components", "model", "--compile.backend", "aot_eager")
FOUR_LAYERS = ("--model.n_layers", "4", "--validation.sequences", "8")
SPARSE = (
    *FOUR_LAYERS,
    *("--activations.v", "32", "--schedule.dense_layers", "1", "--router.cluster_size", "32"),
    *("--training.steps", "8", "--checkpoint.interval", "2"),
    *("--schedule.phases", '[{mode = "dense", end = 3}, {mode = "sparse", end = 6}, {mode = "dense", end = 1.0}]'),
)
DENSE = ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false")
# Adam divides by the root of small numbers, so rounding grows by a few orders in twelve steps.
ROUNDING = 1e-5
TIMES = {"tokens_per_second", "step_seconds", "peak_memory_gib", "peak_active_gib", "switch_seconds", "graphs_compiled"}


def run(tiny, folder, recipe: str, *words: str, processes: int = 2) -> dict[int, dict]:
    command = merge(tiny, [*words, "--job.dump_folder", str(folder)])
    result = fork(
        *("--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *command), processes=processes
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return rows(folder)


def assert_equal(found: dict[int, dict], expected: dict[int, dict]) -> None:
    """All that the rows have but for times: losses, norms, validation, and the health of every layer."""
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        mine, theirs = ({name: each[name] for name in each.keys() - TIMES} for each in (found[step], row))
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine == pytest.approx(theirs, rel=ROUNDING)


def go_on_after(step: int, folder, copy) -> None:
    """A copy of a run's folder as it was after a step."""
    shutil.copytree(folder, copy)
    for saved in (copy / "checkpoint").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    (copy / "checkpoint" / "latest").write_text(f"step-{step}")


def test_sparse_stages_give_the_run_of_one_process_and_resume_in_each_other(tiny, train, tmp_path):
    """Through both switches; the router's clusters, health by layer, validation, checkpoints by name, the export."""
    one = train(tmp_path / "one", *SPARSE, *ALONE, recipe="columns_quarter")
    two = run(tiny, tmp_path / "two", "columns_quarter", *SPARSE, *PIPELINE)
    assert {"layers/0/nonzero_share", "layers/3/energy_kept", "layers/3/router_balance"} < one[4].keys()
    assert_equal(two, one)
    mine, theirs = (export_weights(find_checkpoint(str(tmp_path / name)), None) for name in ("two", "one"))
    assert mine.keys() == theirs.keys() and len(mine) == 4 * 8 + 3
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)

    # Step 4 is in the sparse phase, and step 2 is before the switch.
    go_on_after(4, tmp_path / "two", tmp_path / "alone")
    assert_equal(train(tmp_path / "alone", *SPARSE, *ALONE, recipe="columns_quarter"), two)
    go_on_after(2, tmp_path / "one", tmp_path / "again")
    assert_equal(run(tiny, tmp_path / "again", "columns_quarter", *SPARSE, *PIPELINE, *INTERLEAVED), one)


def test_dense_stages_accumulate_and_checkpoint_activations(tiny, train, tmp_path):
    words = (*DENSE, *FOUR_LAYERS, "--training.steps", "4")
    one = train(tmp_path / "one", *words, *ALONE, recipe="dense")
    pipeline = (*PIPELINE, "--parallelism.pipeline_parallel_schedule", "GPipe")
    checkpoints = ("--activation_checkpoint.mode", "full", "--training.skip_bad_batches", "1")
    two = run(tiny, tmp_path / "two", "dense", *words, *pipeline, *TWO_EACH, *checkpoints)
    assert all(row.pop("skipped_batches") == 0 for row in two.values())
    assert_equal(two, one)


def test_four_ranks_shard_stages_by_fsdp(tiny, tmp_path):
    """The ranks of a stage cluster its neurons by the tokens of both, as without a pipeline."""
    words = (*SPARSE, "--training.global_batch_size", "4")
    two = run(tiny, tmp_path / "two", "columns_quarter", *words, "--training.local_batch_size", "1")
    four = run(tiny, tmp_path / "four", "columns_quarter", *words, *PIPELINE, *TWO_EACH, processes=4)
    assert_equal(four, two)


@pytest.mark.slow
def test_four_ranks_compile_stages_and_shard_them_by_tensor(tiny, tmp_path):
    words = (*SPARSE, *COMPILED, "--parallelism.tensor_parallel_degree", "2", "--model.n_kv_heads", "2")
    two = run(tiny, tmp_path / "two", "columns_quarter", *words, *ALONE)
    four = run(tiny, tmp_path / "four", "columns_quarter", *words, *PIPELINE, processes=4)
    assert_equal(four, two)
    assert {step for step, row in four.items() if row["graphs_compiled"]} == {1, 4}
