"""A run under pipeline parallelism equals one process that computes the same micro-batches, to rounding.

Both add the same gradients in the same order, 1F1B and GPipe to the last bit. What differs is the norm of the
gradient, which is added up by stages, and the order in which an interleaved schedule adds micro-batches: each by a few
units in the last place of float32, 6e-8. Patterns and clusters are the same choices, as they read the same numbers.
"""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import go_on_after, run_ranks
from torch.distributed.pipelining import _utils as pipelining

from configs.loader import load_config
from configs.titan import torchtitan
from recipes.check import check_config
from recipes.restore import find_checkpoint
from recipes.summary import summary
from recipes.trainer import SparseTrainer
from scripts.trained import export_weights

PIPELINE = ("--parallelism.pipeline_parallel_degree", "2")
TENSOR = ("--parallelism.tensor_parallel_degree", "2")
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
# Where a number lies between two of fp8's, rounding in float32 decides which it becomes. On some CPUs one does in
# these few steps: 5e-5 of a loss was seen, 3e-3 of the share that fires. test_layouts.py compares single steps.
FP8_ROUNDING = 1e-2
PHASES = '[{mode = "dense", end = 1}, {mode = "sparse", end = 3}, {mode = "dense", end = 1.0}]'
TIMES = {"tokens_per_second", "step_seconds", "peak_memory_gib", "peak_active_gib", "switch_seconds", "graphs_compiled"}


def run(tiny, folder, recipe: str, *words: str, processes: int = 2, prepare=None) -> dict[int, dict]:
    splits = sum(word in words for word in (PIPELINE[0], TENSOR[0]))
    without_fsdp = processes == 2**splits

    def logged(text: str) -> None:
        assert ("products in float32 (training.dtype)" in text) == without_fsdp, text

    return run_ranks(tiny, folder, recipe, *words, processes=processes, prepare=prepare, logged=logged)


def assert_equal(found: dict[int, dict], expected: dict[int, dict], tolerance: float = ROUNDING) -> None:
    """All that the rows have but for times: losses, norms, validation, and the health of every layer."""
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        mine, theirs = ({name: each[name] for name in each.keys() - TIMES} for each in (found[step], row))
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine == pytest.approx(theirs, rel=tolerance)


def signal_the_last_stage() -> None:
    """On rank 1 alone: a signal in step 5, and much memory. The data that PyTorch infers shapes with is NaN."""
    enter_phase, allocate = SparseTrainer._enter_phase, pipelining._make_tensor_from_meta
    pipelining._make_tensor_from_meta = lambda *given: allocate(*given).fill_(torch.nan)

    def enter(self, batches):
        if self.step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        enter_phase(self, batches)

    SparseTrainer._enter_phase = enter  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        metrics = torchtitan.components.metrics
        peak = metrics.DeviceMemStats(7000.0, 0.0, 9000.0, 0.0, 0, 0)
        metrics.DeviceMemoryMonitor.get_peak_stats = lambda self: peak


def test_sparse_stages_give_the_run_of_one_process_and_resume_in_each_other(tiny, train, tmp_path):
    """Through a signal and both switches: clusters, health by layer, validation, checkpoints by name, the export."""
    one = train(tmp_path / "one", *SPARSE, *ALONE, recipe="columns_quarter")
    stopped = run(tiny, tmp_path / "two", "columns_quarter", *SPARSE, *PIPELINE, prepare=signal_the_last_stage)
    assert (stopped[1]["peak_active_gib"], stopped[1]["peak_memory_gib"]) == (7000, 9000)
    assert max(stopped) == 5 and (tmp_path / "two" / "checkpoint" / "latest").read_text() == "step-5"
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


BLOCKS = ("--activations.v", "32", "--schedule.dense_layers", "1")
RECIPES = {
    "dense": DENSE,
    "swiglu": (*DENSE, "--model.name", "llama_swiglu"),
    "venom_2of16": BLOCKS,  # with 2:4 weights: their scales, and how many entries of their masks change
    "groups_quarter": (*BLOCKS, "--activations.g", "32", "--router.cluster_size", "32"),
    "activations_2of4": (),
    "columns_quarter_fp8": ("--activations.v", "512", "--training.seq_len", "512"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_stages_accumulate_and_checkpoint_activations(tiny, train, tmp_path, name):
    words = [*FOUR_LAYERS, "--training.steps", "4", "--schedule.phases", PHASES, *RECIPES[name]]
    recipe = "dense" if name == "swiglu" else name
    one = train(tmp_path / "one", *words, *ALONE, recipe=recipe)
    assert ("layers/3/flip_rate" in one[3]) == (name == "venom_2of16")
    words += ["--parallelism.pipeline_parallel_schedule", "GPipe", "--activation_checkpoint.mode", "full"]
    two = run(tiny, tmp_path / "two", recipe, *words, *PIPELINE, *TWO_EACH, "--training.skip_bad_batches", "1")
    assert all(row.pop("skipped_batches") == 0 for row in two.values())
    assert_equal(two, one, FP8_ROUNDING if name.endswith("fp8") else ROUNDING)


def test_four_ranks_shard_stages_by_fsdp(tiny, tmp_path):
    """The ranks of a stage cluster its neurons by the tokens of both, as without a pipeline."""
    words = (*SPARSE, "--training.global_batch_size", "4")
    two = run(tiny, tmp_path / "two", "columns_quarter", *words, "--training.local_batch_size", "1")
    four = run(tiny, tmp_path / "four", "columns_quarter", *words, *PIPELINE, *TWO_EACH, processes=4)
    assert_equal(four, two)


@pytest.mark.slow
def test_eight_ranks_replicate_sharded_stages(tiny, tmp_path):
    """HSDP and a pipeline: two replicas of two shards of two stages, as without the stages."""
    words = (*SPARSE, "--parallelism.data_parallel_replicate_degree", "2", "--training.global_batch_size", "8")
    four = run(tiny, tmp_path / "four", "columns_quarter", *words, "--training.local_batch_size", "1", processes=4)
    eight = (*PIPELINE, "--training.local_batch_size", "2")
    assert_equal(run(tiny, tmp_path / "eight", "columns_quarter", *words, *eight, processes=8), four)


@pytest.mark.slow
def test_four_ranks_compile_stages_and_shard_them_by_tensor(tiny, tmp_path):
    words = (*SPARSE, *COMPILED, *TENSOR, "--model.n_kv_heads", "2")
    two = run(tiny, tmp_path / "two", "columns_quarter", *words, *ALONE)
    four = run(tiny, tmp_path / "four", "columns_quarter", *words, *PIPELINE, processes=4)
    assert_equal(four, two)
    assert {step for step, row in four.items() if row["graphs_compiled"]} == {1, 4}


def test_a_check_says_which_layers_each_gpu_has(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, _ = load_config(["--config", "configs/debug.toml", *PIPELINE, *INTERLEAVED])
    assert (
        "pipeline    Interleaved1F1B, 8 micro-batches of 1 x 256 tokens, layers of each GPU: 0, 3 | 1-2\n"
    ) in summary(config, *check_config(config))


def test_rank_0_writes_the_metrics_of_a_pipeline():
    """torchtitan lets the first rank of the last stage open W&B's run."""
    parallel_dims = SimpleNamespace(pp_enabled=True, world_size=4, pp=2)
    assert torchtitan.components.metrics._get_metrics_rank(parallel_dims, None) == 0
