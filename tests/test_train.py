"""The trainer end to end: phases, what a run keeps, exact resume, signals, several ranks.

The tiny job runs 12 steps, sparse in steps 4 to 8, with a checkpoint after every fourth (see conftest.tiny).
"""

import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Forked, fork, launch, losses, merge, rows
from filelock import FileLock

import kernels
import recipes.trainer
from configs.errors import ConfigError, LostProcessError, TooLargeError, exit_with
from configs.loader import load_config
from kernels.columns.ffn import LARGE_BLOCKS
from kernels.groups.ffn import TILE_GROUPS
from kernels.venom.ffn import COMPACT_VENOM
from models.llama import FLAVORS, Llama, llama_args
from recipes.metrics import Metrics
from recipes.sparsity import Sparsity
from recipes.trainer import SparseTrainer, _lock

# Blocks in fp8 have 512 tokens at least, and have to fit into a micro-batch.
FP8 = ("--activations.v", "512", "--training.seq_len", "128")
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
LAST_STEP = 12
DENSE = ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false")
BLOCKS_OF_32 = ("--activations.v", "32")
ONE_DENSE = ("--schedule.dense_layers", "1")  # of two


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses of a whole run, by recipe; each is trained once."""
    known: dict[tuple, dict[int, dict]] = {}

    def get(train, recipe: str, *words: str):
        if (recipe, words) not in known:
            known[recipe, words] = train(tmp_path_factory.mktemp(recipe), *words, recipe=recipe)
        return known[recipe, words]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_through_its_phases(train, uninterrupted, recipe):
    words = DENSE if recipe == "dense" else FP8 if recipe.endswith("_fp8") else ()
    run = uninterrupted(train, recipe, *words)
    assert sorted(run) == list(range(1, LAST_STEP + 1))
    sparse = [step for step, row in run.items() if row["phase"] == "sparse"]
    assert sparse == ([] if recipe == "dense" else [4, 5, 6, 7, 8])
    assert run[LAST_STEP]["loss"] < run[1]["loss"] - 0.3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in run.values())


def test_a_row_holds_what_was_measured(train, uninterrupted):
    run = uninterrupted(train, "venom_2of16")
    keys = {
        "step",
        "phase",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_gib",
        "peak_active_gib",
    }
    assert all(keys <= set(row) for row in run.values())
    assert run[LAST_STEP]["tokens"] == LAST_STEP * 4 * 32
    assert "mfu" in run[1] if torch.cuda.is_available() else "mfu" not in run[1]
    # Validation at 4, 8 and 12: twice in a sparse phase.
    assert {step for step, row in run.items() if "val_loss" in row} == {4, 8, 12}
    assert {step for step, row in run.items() if "val_loss_sparse" in row} == {4, 8}
    assert all(0 < run[step]["val_bpb"] < 8 for step in (4, 8, 12))
    # Health: where the model is evaluated; flips of the 2:4 mask at every sparse step.
    health = run[8]
    for name in ("nonzero_share", "energy_kept", "router_balance", "flip_rate"):
        assert 0 <= health[name] <= 1, name
        layers = [health[f"layers/{layer}/{name}"] for layer in range(2)]
        assert min(layers) - 1e-6 <= health[name] <= max(layers) + 1e-6
    assert 0 < health["nonzero_share"] < 1 and 0.2 < health["energy_kept"] < 1
    assert {step for step, row in run.items() if "flip_rate" in row} == {4, 5, 6, 7, 8}
    assert "energy_kept" not in run[12] and 0 < run[12]["nonzero_share"] < 1


def test_a_process_alone_leaves_its_port_to_the_system(train, tmp_path):
    """Runs that start at once, as a study's do, would find the same port free before they open it."""
    train(tmp_path, "--training.steps", "1", *DENSE)
    assert os.environ["MASTER_PORT"] == "0" and os.environ["WORLD_SIZE"] == "1"


def test_sparse_phases_may_have_larger_micro_batches(train, tmp_path, capfd):
    """From the switch on the run is that of larger micro-batches throughout; it resumes exactly."""
    large = ("--training.global_batch_size", "8", "--training.local_batch_size")
    small = (*large, "2", "--training.sparse_local_batch_size", "8")
    throughout = train(tmp_path / "throughout", *large, "8")
    own = train(tmp_path / "own", *small)
    assert losses(own) == pytest.approx(losses(throughout), rel=1e-5)  # sums of four micro-batches or of one
    for step, row in own.items():
        assert row["tokens"] == throughout[step]["tokens"]
        for name in {"val_loss", "val_loss_sparse"} & row.keys():
            assert row[name] == pytest.approx(throughout[step][name], rel=1e-5)
    assert losses(train(tmp_path / "small", *small[:4]))[8] != pytest.approx(losses(own)[8], rel=1e-5)
    for stop in (3, 6, None):
        capfd.readouterr()
        resumed = train(tmp_path / "resumed", *small, stop_after=stop)
    assert losses(resumed) == losses(own)
    assert re.findall(r"step \d+: \w+ phase \w+", capfd.readouterr().out) == [
        "step 7: sparse phase goes",
        "step 9: dense phase begins",
    ]


def test_sparse_phases_keep_shares_of_their_own(train, tmp_path):
    """Two phases with their own, one with the recipe's, and a resume inside of each."""
    shares = {3: 0.5, 4: 0.5, 5: None, 6: 0.75, 7: 0.75, 8: 0.75}
    own = '{mode = "sparse", keep = 0.5, end = 4}, {mode = "sparse", end = 5}, {mode = "sparse", keep = 0.75, end = 8}'
    phases = f'[{{mode = "dense", end = 2}}, {own}, {{mode = "dense", end = 1.0}}]'
    words = ("--schedule.phases", phases, "--validation.freq", "1", "--activations.g", "32")
    whole = train(tmp_path / "whole", *words, recipe="groups_quarter")
    assert {step: row.get("keep") for step, row in whole.items() if row["phase"] == "sparse"} == shares
    kept = [whole[step]["energy_kept"] for step in (5, 4, 8)]
    assert kept == sorted(kept) and len(set(kept)) == 3
    about = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert about["phases"] == [["dense", 1, 2], ["sparse", 3, 4], ["sparse", 5, 5], ["sparse", 6, 8], ["dense", 9, 12]]
    flops = about["flops_per_token"]
    ffn = 6 * 2 * 2 * 32 * 256  # of two layers
    mean = (2 * 0.5 + 0.25 + 3 * 0.75) / 6
    assert (flops["dense"] - flops["sparse_pattern"]) / ffn == pytest.approx((1 - mean) * 5 / 6)
    for stop in (3, 5, 7, None):
        resumed = train(tmp_path / "resumed", *words, stop_after=stop, recipe="groups_quarter")
    assert losses(resumed) == losses(whole)


def test_executed_flops_of_a_row_are_those_of_its_phase(train, tmp_path, monkeypatch):
    def flops(dense, config, args, spans, *others):
        executed = [dense * (span.keep or 1.0) for span in spans]
        return {"dense": dense, "sparse_pattern": dense, "sparse_executed": max(executed)}

    def start(metrics, step, spans):
        metrics.peak_flops = 1e12
        original(metrics, step, spans)

    original = Metrics.start
    monkeypatch.setattr(Metrics, "start", start)
    monkeypatch.setattr(recipes.trainer, "flops_per_token", flops)
    sparse = '{mode = "sparse", keep = 0.5, end = 2}, {mode = "sparse", keep = 0.25, end = 3}'
    words = ("--schedule.phases", f"[{{end = 1}}, {sparse}, {{end = 1.0}}]", "--training.steps", "4")
    run = train(tmp_path / "run", *words, recipe="groups_quarter")
    assert [row["mfu_executed"] / row["mfu"] for row in run.values()] == pytest.approx([1.0, 0.5, 0.25, 1.0])


def test_a_block_is_compiled_for_many_shares(train, tmp_path):
    """PyTorch compiles a block eight times at most unless it is told that there are more kinds of steps.

    There are five here, each with a graph for training and one for validation.
    """
    shares = [0.125 * (1 + each) for each in range(4)]
    sparse = ", ".join(f'{{mode = "sparse", keep = {share}, end = {1 + each}}}' for each, share in enumerate(shares))
    words = ("--schedule.phases", f'[{sparse}, {{mode = "dense", end = 1.0}}]', "--training.steps", "6")
    compiles = ("--compile.enable", "true", "--compile.components", "model", "--compile.backend", "eager")
    run = train(tmp_path / "run", *words, *compiles, "--validation.freq", "1", recipe="groups_quarter")
    assert [run[step]["graphs_compiled"] for step in range(1, 7)] == [1] * 5 + [0]


def test_first_layers_can_stay_dense(train, tmp_path):
    """The row of a sparse phase's validation, and FLOPs of the half that is sparse."""
    whole = train(tmp_path / "whole")[8]
    half = train(tmp_path / "half", *ONE_DENSE)[8]
    for name in ("energy_kept", "router_balance", "flip_rate"):
        assert half[name] == pytest.approx(half[f"layers/1/{name}"]) and half[name] < 1
        assert f"layers/0/{name}" in whole and f"layers/0/{name}" not in half
    assert half["layers/0/nonzero_share"] > 0
    saved = []
    for name in ("whole", "half"):
        flops = json.loads((tmp_path / name / "run.json").read_text())["flops_per_token"]
        saved.append(flops["dense"] - flops["sparse_pattern"])
    assert saved[1] == pytest.approx(saved[0] / 2)


def test_a_row_of_several_steps_says_the_time_of_one(train, tmp_path):
    run = train(tmp_path / "run", "--metrics.log_freq", "5", "--checkpoint.enable", "false")
    assert all(run[step]["step_seconds"] * run[step]["tokens_per_second"] == pytest.approx(4 * 32) for step in (1, 5))


def test_a_run_keeps_its_configuration_versions_and_tensorboard(train, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = train(tmp_path / "run", "--metrics.enable_tensorboard", "true", "--checkpoint.enable", "false")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["config"]["activations"]["pattern"] == "venom"
    assert kept["phases"] == [["dense", 1, 3], ["sparse", 4, 8], ["dense", 9, 12]]
    assert kept["versions"]["torch"] == torch.__version__
    flops = kept["flops_per_token"]
    assert 0 < flops["sparse_pattern"] < flops["dense"]
    assert signal.getsignal(signal.SIGTERM) is before, "a closed trainer gives the signals back"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "run" / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert kept["unigram_entropy"] > 2
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses(run))
    assert [event.value for event in events.Scalars("sparse")] == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert events.Scalars("layers/1/energy_kept")[-1].step == 8


@pytest.mark.parametrize("recipe", ["venom_2of16", "groups_quarter", "activations_2of4"])
def test_resume_is_exact_whatever_the_phase(train, uninterrupted, tmp_path, recipe):
    """
    Killed before, at and after each switch; the optimizer's moments, scales and clusters come back with the weights.
    """
    whole = uninterrupted(train, recipe)
    for killed in (2, 3, 4, 5, 7, 8, 9, None):
        resumed = train(tmp_path / "run", recipe=recipe, stop_after=killed)
    assert losses(resumed) == losses(whole)
    assert {s: r.get("val_loss_sparse") for s, r in resumed.items()} == {
        s: r.get("val_loss_sparse") for s, r in whole.items()
    }


def test_a_second_resume_is_exact_and_so_is_one_from_an_older_checkpoint(train, uninterrupted, tmp_path):
    whole = uninterrupted(train, "venom_2of16")
    # With a checkpoint at every fourth step, a run killed after step 6 does steps 5 and 6 again.
    for stop in (6, 10, None):
        run = train(tmp_path / "run", "--checkpoint.interval", "4", stop_after=stop)
    assert losses(run) == losses(whole)


def test_reclustering_resumes_exactly_too(train, uninterrupted, tmp_path):
    words = ("--router.recluster_every", "2", *ONE_DENSE)
    whole = uninterrupted(train, "groups_quarter", *words)
    assert losses(whole) != losses(uninterrupted(train, "groups_quarter", *ONE_DENSE))
    for stop in (5, 6, None):
        run = train(tmp_path / "run", *words, recipe="groups_quarter", stop_after=stop)
    assert losses(run) == losses(whole)


def test_a_damaged_checkpoint_is_passed_over(train, uninterrupted, tmp_path, caplog):
    whole = uninterrupted(train, "venom_2of16")
    train(tmp_path / "run", "--checkpoint.interval", "1", stop_after=6)
    data = next((tmp_path / "run" / "checkpoint" / "step-6").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    run = train(tmp_path / "run")
    assert losses(run) == losses(whole)
    assert (tmp_path / "run" / "checkpoint" / "broken-6").is_dir()


@pytest.mark.parametrize(
    "recipe, words, family",
    [
        ("groups_quarter", ("--activations.v", "128"), TILE_GROUPS),
        ("columns_quarter", (), LARGE_BLOCKS),
        ("venom_2of16", (), COMPACT_VENOM),
    ],
    ids=["groups", "columns", "venom"],
)
def test_the_kernels_operators_train_as_the_reference(train, tmp_path, recipe, words, family):
    """Their CPU path in float32: the same products, sorted and compacted, through the whole trainer."""
    expected = train(tmp_path / "reference", *words, recipe=recipe)
    with kernels.prefer(family):
        actual = train(tmp_path / family.name, *words, recipe=recipe)
    assert json.loads((tmp_path / family.name / "run.json").read_text())["backend"]["name"] == family.name
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
    assert actual[8]["val_loss_sparse"] == pytest.approx(expected[8]["val_loss_sparse"], rel=1e-4)


def test_reordering_neurons_leaves_the_dense_model_as_it_was(train, tmp_path):
    """
    The router permutes neurons and moments at the switch; with nothing cut, losses stay those of the dense recipe.
    """
    words = ("--activations.keep", "1.0", "--checkpoint.enable", "false")
    sparse = train(tmp_path / "sparse", *words, recipe="groups_quarter")
    dense = train(tmp_path / "dense", *words, *DENSE, "--lr_scheduler.decay_ratio", "0.333333", recipe="dense")
    assert losses(sparse) == pytest.approx(losses(dense), rel=2e-4)


def test_an_earlier_run_in_the_same_folder_is_kept(train, tmp_path):
    words = ("--checkpoint.enable", "false", "--training.steps", "9")
    train(tmp_path / "run", *words)
    train(tmp_path / "run", *words)
    assert (tmp_path / "run" / "metrics-1.jsonl").exists()
    assert len(rows(tmp_path / "run")) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_resumes(tiny, train, uninterrupted, tmp_path, number):
    folder = tmp_path / "run"
    # A process of its own reads the data: it must end with the run, or the pipe would stay open.
    changes = ["--checkpoint.interval", "1000", "--training.dataloader.num_workers", "1"]
    changes += ["--training.dataloader.prefetch_factor", "2"]
    words = merge(tiny, ["--job.dump_folder", str(folder), *changes])
    command = [sys.executable, "train.py", "--config", "configs/debug.toml", *words]
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pipe.open("w") as writer:
        process = Forked(
            command, cwd=ROOT, env=dict(os.environ), stdout=writer, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal and torchrun do: the process that reads the data gets it too
    process.wait(timeout=300)
    os.set_blocking(reader, True)
    with open(reader) as file:
        output = file.read()
    assert process.returncode == 0, output
    stopped = max(rows(folder))
    assert stopped < LAST_STEP and f"stopped by a signal after step {stopped}" in output, output
    assert output.count(f"{signal.Signals(number).name}: the run saves and ends after this step") == 1, output
    assert (folder / "checkpoint" / "latest").read_text() == f"step-{stopped}"
    assert losses(train(folder, *changes)) == losses(uninterrupted(train, "venom_2of16"))


def test_a_closed_trainer_leaves_no_data_process(train, tmp_path, monkeypatch):
    """Neither one that waits for work nor one that is stuck; they ignore SIGTERM, with which Python would end them."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before, started = set(multiprocessing.active_children()), []
    enter_phase = SparseTrainer._enter_phase

    def stop_one(self, batches):
        enter_phase(self, batches)
        if self.step == 3:
            started.extend(set(multiprocessing.active_children()) - before)
            assert len(started) == 2
            os.kill(started[0].pid, signal.SIGSTOP)
            raise RuntimeError("something that nobody expects")

    monkeypatch.setattr(SparseTrainer, "_enter_phase", stop_one)
    processes = "--training.dataloader.num_workers", "2", "--training.local_batch_size", "2"
    with pytest.raises(RuntimeError):
        train(tmp_path, *processes, "--training.global_batch_size", "4")
    assert {process.exitcode for process in started} == {0, -signal.SIGKILL}


def test_a_signal_while_a_resumed_run_starts_changes_nothing(train, uninterrupted, tmp_path, monkeypatch):
    train(tmp_path, stop_after=6)
    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "_any_rank_interrupted", lambda _: True)
        train(tmp_path)
    assert losses(train(tmp_path)) == losses(uninterrupted(train, "venom_2of16"))


def test_another_tokenizer_is_refused_and_the_run_left_as_it_was(train, tmp_path):
    train(tmp_path, stop_after=6)
    own = tmp_path / "tokenizer" / "tokenizer.json"
    own.write_text(own.read_text() + "\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"trained with another tokenizer .* set tokenizer.path = {own.parent}"):
        train(tmp_path)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.suffix != ".lock")


def test_sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint(tiny, train, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    words = merge(tiny, ["--job.dump_folder", str(folder), "--checkpoint.interval", "1"])
    command = [sys.executable, "train.py", "--config", "configs/debug.toml", *words]
    with open(os.devnull, "w") as nowhere:
        process = Forked(command, env=dict(os.environ), stdout=nowhere, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint" / "step-5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert losses(train(folder)) == losses(uninterrupted(train, "venom_2of16"))


def test_two_ranks_give_the_losses_of_one(tiny, train, uninterrupted, tmp_path):
    """FSDP2 over gloo, the same global batch, dense; a sparse run on two ranks resumes exactly."""
    half = ["--training.local_batch_size", "2", "--training.global_batch_size", "4"]

    def two_ranks(recipe: str, *extra: str) -> tuple[dict[int, dict], str]:
        words = merge(tiny, [*half, "--job.dump_folder", str(tmp_path / recipe), *extra])
        command = ["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *words]
        result = fork(*command, processes=2)
        assert result.returncode == 0, result.stdout + result.stderr
        return rows(tmp_path / recipe), result.stdout

    one = uninterrupted(train, "dense", *DENSE)
    two, _ = two_ranks("dense", *DENSE)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two[LAST_STEP]["val_loss"] == pytest.approx(one[LAST_STEP]["val_loss"], rel=1e-4)
    assert two[LAST_STEP]["tokens"] == one[LAST_STEP]["tokens"]

    two, printed = two_ranks("venom_2of16")
    assert printed.count("phase begins") == 2
    saved = tmp_path / "venom_2of16" / "checkpoint"
    for step in (8, LAST_STEP):
        shutil.rmtree(saved / f"step-{step}")
    (saved / "latest").write_text("step-4")
    assert losses(two_ranks("venom_2of16")[0]) == losses(two)


def test_gradients_are_gone_where_neurons_are_clustered(train, tmp_path, monkeypatch):
    """Of some layers at once h is gigabytes: what the step before has left would be held beside it for nothing."""
    held, prepare = [], Sparsity._prepare

    def watched(self, *arguments):
        held.append([parameter.grad for each in self.feed_forwards for parameter in each.parameters()])
        prepare(self, *arguments)

    monkeypatch.setattr(Sparsity, "_prepare", watched)
    train(tmp_path)
    assert held == [[None] * 4]


def test_a_compiled_block_gives_the_eager_losses(train, uninterrupted, tmp_path):
    words = ("--compile.enable", "true", "--compile.components", "model", "--compile.backend", "aot_eager")
    for more in ((), ONE_DENSE):
        torch._dynamo.reset()
        compiled = train(tmp_path / f"run{len(more)}", *words, *more)
        # Both layers run the dense graph; in a sparse phase those that are sparse run another.
        assert {step: row["graphs_compiled"] for step, row in compiled.items() if row["graphs_compiled"]} == {
            1: 1,
            4: 1,
        }
        assert losses(compiled) == pytest.approx(losses(uninterrupted(train, "venom_2of16", *more)), rel=1e-3)


def test_gradient_accumulation_gives_the_losses_of_one_batch(train, uninterrupted, tmp_path):
    words = ("--training.local_batch_size", "1", "--training.global_batch_size", "4", *DENSE)
    run = train(tmp_path / "run", *words, recipe="dense")
    assert losses(run) == pytest.approx(losses(uninterrupted(train, "dense", *DENSE)), rel=1e-4)


def test_the_swiglu_baseline_trains(train, tmp_path):
    run = train(tmp_path / "run", "--model.name", "llama_swiglu", *DENSE, recipe="dense")
    assert run[LAST_STEP]["loss"] < run[1]["loss"] - 0.3


def test_the_two_models_of_a_flavor_have_equal_parameters():
    with torch.device("meta"):
        for flavor in FLAVORS:
            sizes = [
                sum(p.numel() for p in Llama(llama_args(flavor, vocab_size=1024, swiglu=swiglu)).parameters())
                for swiglu in (False, True)
            ]
            assert sizes[1] == pytest.approx(sizes[0], rel=0.005), flavor


def test_tensor_parallel_dense_training_gives_the_losses_of_one(tiny, train, uninterrupted, tmp_path):
    words = merge(tiny, ["--job.dump_folder", str(tmp_path), "--parallelism.tensor_parallel_degree", "2", *DENSE])
    words = merge(words, ["--model.n_kv_heads", "2"])
    result = fork("--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *words, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    one = uninterrupted(train, "dense", *DENSE, "--model.n_kv_heads", "2")
    assert losses(rows(tmp_path)) == pytest.approx(losses(one), rel=1e-3)


def test_asynchronous_checkpoints_resume_exactly(train, uninterrupted, tmp_path):
    words = ("--checkpoint.async_mode", "async")
    for stop in (5, None):
        run = train(tmp_path / "run", *words, stop_after=stop)
    assert losses(run) == losses(uninterrupted(train, "venom_2of16"))


def test_a_sparse_run_can_start_from_a_dense_checkpoint(train, tmp_path):
    dense = train(tmp_path / "dense", *DENSE, recipe="dense")
    start = ("--checkpoint.initial_load_path", str(tmp_path / "dense" / "checkpoint" / f"step-{LAST_STEP}"))
    run = train(tmp_path / "sparse", *start)
    assert run[1]["loss"] < dense[LAST_STEP - 1]["loss"] + 0.2


def test_a_checkpoint_of_another_model_is_refused(tiny, train, tmp_path):
    train(tmp_path, stop_after=2)
    words = merge(tiny, ["--job.dump_folder", str(tmp_path), "--model.hidden_dim", "512"])
    result = fork("--config", "configs/debug.toml", *words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and result.stderr.count("error:") == 1, result.stderr
    assert "the model's hidden_dim = 512, but the run in" in result.stderr, result.stderr


@pytest.mark.parametrize("building", [False, True])
@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has"), "CUDA out of memory"),
        (dist.DistBackendError("NCCL error\nLast error:\nFailed to CUDA calloc async 4 bytes\n"), "Failed to CUDA"),
        (dist.DistBackendError("NCCL error\nLast error:\nunhandled system error\n"), None),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for it\nCompile with more"), "error: out of memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\n"), None),
        (MemoryError(), r"memory \(MemoryError\): use a smaller one"),
    ],
)
def test_a_job_that_does_not_fit_is_one_message(tiny, monkeypatch, error, said, building):
    class Trainer:
        closed = False
        dataloader = SimpleNamespace(lost_process=lambda: None)

        def __init__(self, *_):
            if building:
                raise error

        def train(self):
            raise error

        def close(self):
            Trainer.closed = True

    program = importlib.import_module("train")
    monkeypatch.setattr(program, "SparseTrainer", Trainer)
    message = r'local_batch_size = 4 with activation_checkpoint.mode = ".*" does not fit .*' + str(said)
    with pytest.raises(TooLargeError if said else type(error), match=message if said else str(error).strip()) as caught:
        program.main(["--config", "configs/debug.toml", *tiny])
    assert Trainer.closed != building
    if said:
        with pytest.raises(SystemExit) as ended:
            exit_with(caught.value)
        assert ended.value.code == 3


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:16281. This is"),
        dist.DistBackendError("NCCL error\nLast error:\nremote process exited or there was a network error\n"),
    ],
)
def test_a_rank_that_is_left_alone_says_so_in_one_message(tiny, monkeypatch, error):
    class Trainer:
        dataloader = SimpleNamespace(lost_process=lambda: None)

        def __init__(self, *_):
            pass

        def train(self):
            raise error

        def close(self):
            pass

    program = importlib.import_module("train")
    monkeypatch.setattr(program, "SparseTrainer", Trainer)
    with pytest.raises(LostProcessError, match=r"another process .* ended \(.*(by peer|exited).*\): its own"):
        program.main(["--config", "configs/debug.toml", *tiny])


def test_a_rank_that_fails_alone_does_not_wait_for_rank_0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    waits: list[float] = []
    monkeypatch.setattr("configs.errors.time.sleep", waits.append)
    error = LostProcessError("a process is lost")
    for error.alone, waited in ((True, []), (False, [15])):
        with pytest.raises(SystemExit) as ended, monkeypatch.context() as patch:
            patch.setattr("configs.errors.signal.signal", lambda *_: None)
            exit_with(error)
        assert ended.value.code == 1 and waits == waited
    assert capsys.readouterr().err == "error: a process is lost\n" * 2


def test_a_job_that_no_memory_holds_is_one_message(tiny, tmp_path):
    words = merge(["--config", "configs/debug.toml", *tiny], [*DENSE, "--model.hidden_dim", str(10**12)])
    result = fork(*words, "--job.dump_folder", str(tmp_path / "run"))
    assert result.returncode == 3 and "Traceback" not in result.stderr, result.stderr
    assert re.search(r"error: .* does not fit into memory \(can't allocate memory: you tried to", result.stderr)


def test_a_shadowed_kernels_package_is_named(tmp_path):
    """Hugging Face has a package of this name; found first, it is refused instead of failing somewhere later."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.9.0'\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    result = launch("--config", "configs/debug.toml", "--check", PYTHONPATH=path, PYTHONSAFEPATH="1")
    assert result.returncode == 2
    assert "shadows this repository's kernels" in result.stderr and "Traceback" not in result.stderr


def test_a_resume_in_the_middle_of_a_phase_that_was_never_prepared_prepares_it(train, tmp_path):
    """The phases of a resumed run may be others than those it was begun with: scales of zero would silence the FFNs."""
    no_router = ("--router.enable", "false")
    train(tmp_path, *no_router, stop_after=2)
    phases = '[{mode = "dense", end = 1}, {mode = "sparse", end = 8}, {mode = "dense", end = 1.0}]'
    change = ("--checkpoint.change_recipe", "true")
    resumed = train(tmp_path, *no_router, *change, "--schedule.phases", phases, stop_after=5)
    assert resumed[3]["phase"] == "sparse" and 0 < resumed[3]["flip_rate"] < 0.5
    assert resumed[4]["val_loss_sparse"] < resumed[2]["loss"] + 0.1


def test_a_refused_resume_leaves_the_run_as_it_was(tiny, train, tmp_path):
    train(tmp_path, stop_after=6)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file() and file.name != ".lock"}
    words = merge(tiny, ["--job.dump_folder", str(tmp_path), "--training.local_batch_size", "2"])
    result = fork("--config", "configs/debug.toml", *words)
    assert result.returncode == 2 and "training.global_batch_size" in result.stderr, result.stderr
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_two_runs_do_not_share_a_folder(tiny, tmp_path):
    words = merge(tiny, ["--job.dump_folder", str(tmp_path)])
    with FileLock(tmp_path / ".lock"):
        result = fork("--config", "configs/debug.toml", *words)
    assert result.returncode == 2 and "is in use by another run" in result.stderr, result.stderr


def test_a_restarted_run_waits_for_the_processes_of_the_killed_one(tmp_path, monkeypatch):
    """Those that read data hold the folder until they notice that the rank they read for is gone."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    config, _ = load_config(["--config", "configs/debug.toml", "--job.dump_folder", str(tmp_path)])
    orphan = FileLock(tmp_path / ".lock", thread_local=False)
    orphan.acquire()
    timer = threading.Timer(0.3, orphan.release)
    timer.start()
    _lock(config).release()
    timer.join()


def test_a_complete_run_says_so_and_changes_nothing(train, tmp_path, caplog):
    whole = train(tmp_path)
    kept = (tmp_path / "run.json").read_bytes()
    assert train(tmp_path) == whole
    assert (tmp_path / "run.json").read_bytes() == kept


def test_a_start_that_fails_leaves_nothing_behind(train, tmp_path, monkeypatch):
    """No folder where the trainer was never built, no empty run in TensorBoard where the first step failed."""
    with pytest.raises(ConfigError, match=r"data\.sources"):
        train(tmp_path / "run", "--data.sources", f'[{{path = "{tmp_path}/nowhere"}}]')
    train(tmp_path / "dense", *DENSE, "--training.steps", "2", "--validation.enable", "false", recipe="dense")
    start = str(tmp_path / "dense" / "checkpoint" / "step-2")
    with pytest.raises(ConfigError, match="is a model of n_layers"):
        train(tmp_path / "new" / "run", "--checkpoint.initial_load_path", start, "--model.n_layers", "1")
    with monkeypatch.context() as context:
        context.setattr("recipes.trainer.Sparsity", None)  # fails when torchtitan's part has been built
        with pytest.raises(TypeError):
            train(tmp_path / "run", *DENSE, recipe="dense")
    dist.destroy_process_group()
    assert not (tmp_path / "run").exists() and not (tmp_path / "new" / "run").exists()
    words = ("--metrics.enable_tensorboard", "true")

    def fail(*_):
        raise ConfigError("the first step failed")

    monkeypatch.setattr(SparseTrainer, "train_step", fail)
    with pytest.raises(ConfigError, match="the first step failed"):
        train(tmp_path / "run", *words)
    assert (tmp_path / "run" / "run.json").is_file()
    assert not (tmp_path / "run" / "tb").exists()


def test_a_run_ends_with_a_summary(train, tmp_path, capfd):
    train(tmp_path / "a run", stop_after=6)
    capfd.readouterr()
    train(tmp_path / "a run")
    said = [line.split(" ", 1)[1] for line in capfd.readouterr().out.splitlines()]
    end = said[said.index("next:") - 2 :]
    assert re.fullmatch(
        r"finished: steps 7 to 12 in 0m\d\ds; 1.5k tokens, 0.0\d+ a parameter; 42% of the steps sparse", end[0]
    )
    assert re.fullmatch(
        r"validation loss \d\.\d{4} nats a token \(.* bits a byte\): \d\.\d{3} (below|ABOVE) the unigram entropy .*",
        end[1],
    )
    folder = tmp_path / "a run"
    assert {each.name for each in folder.iterdir() if each.is_dir()} == {"checkpoint", "tokenizer"}, "no empty folder"
    assert end[3:] == [
        f"  python -m scripts.plot '{folder}'",
        f"  python -m scripts.generate '{folder}' --prompt \"The\"",
        f"  python -m scripts.evaluate '{folder}' --text FILE",
        f"  python -m scripts.export_hf '{folder}' '{folder}-hf'",
    ]


def test_a_diverged_run_ends_before_it_saves(train, tmp_path):
    words = ("--optimizer.lr", "1e30", "--training.max_norm", "1e30", "--checkpoint.interval", "1")
    with pytest.raises(ConfigError, match=r"norm of the gradient is (nan|inf) at step .* newest checkpoint is .*step-"):
        train(tmp_path, *words, "--metrics.log_freq", "100")  # no step would be looked at, were it not saved
    latest = int((tmp_path / "checkpoint" / "latest").read_text().removeprefix("step-"))
    assert latest == max(rows(tmp_path))


def test_shards_that_split_a_group_of_four_do_not_hang(tiny, tmp_path):
    """Width 28 on three ranks: W2's shards have 10, 10 and 8 rows, so all ranks have to gather it for the flip rate."""
    words = ["--job.dump_folder", str(tmp_path), "--model.dim", "28", "--training.local_batch_size", "2"]
    words += ["--training.steps", "5", "--checkpoint.enable", "false"]
    phases = '[{mode = "dense", end = 2}, {mode = "sparse", end = 4}, {mode = "dense"}]'
    words = merge(tiny, [*words, "--schedule.phases", phases])
    result = fork("--config", "configs/debug.toml", *words, processes=3, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(0 <= rows(tmp_path)[step]["flip_rate"] < 0.5 for step in (3, 4))


def test_hybrid_sharding_gives_the_losses_of_one(tiny, train, uninterrupted, tmp_path):
    """HSDP, two replicas of two shards: the losses of one process that takes the same micro-batches in turn."""
    batch = ["--training.local_batch_size", "1", "--training.global_batch_size", "4", *BLOCKS_OF_32]
    words = ["--parallelism.data_parallel_replicate_degree", "2", "--job.dump_folder", str(tmp_path)]
    # Layers that stay gathered after the forward pass that the neurons are clustered by must not be put in order for
    # their shards.
    words += ["--parallelism.fsdp_reshard_after_forward", "never"]
    words = merge(tiny, [*words, *batch])
    result = fork("--config", "configs/debug.toml", *words, processes=4)
    assert result.returncode == 0, result.stdout + result.stderr
    one = uninterrupted(train, "venom_2of16", *batch)
    assert losses(rows(tmp_path)) == pytest.approx(losses(one), rel=1e-3)
