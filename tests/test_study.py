"""Studies: refused before anything runs, run, interrupted, resumed, collected, tabled and drawn."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Forked, rows
from test_pages import perform_script

from configs.errors import ConfigError, TooLargeError
from scripts import study
from scripts.pictures import Picture
from scripts.runs import load_runs
from scripts.tables import runs_table

RUNS = """
[[runs]]
name = "dense"
recipe = "recipes/dense.toml"
seeds = [0, 1]

[[runs]]
name = "groups"
recipe = "recipes/groups_quarter.toml"
"""


@pytest.fixture
def forked(monkeypatch):
    """The runs of a study in this process are forked."""
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(study, "draw", lambda _: None)


def test_a_study_is_interrupted_resumed_and_collected(forked, write_study, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as left by another job, and none of a run's business
    failing = '[[runs]]\nname = "failing"\noptimizer.lr = 1e30\ntraining.max_norm = 1e9\n'
    file = write_study(RUNS.replace("[0, 1]", "[0]\ntraining.steps = 60\ncheckpoint.interval = 100") + failing)
    words = [str(file), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "scripts.study", *words, "--only", "dense"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "dense_s0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, error = process.communicate(timeout=300)
    assert process.returncode == 130, text
    assert error.splitlines()[-1] == "interrupted: not complete: dense_s0; the same command goes on"
    assert "Traceback" not in text + error
    assert not (file.parent / "dense_s0").exists()

    assert study.main([*words, "--jobs", "3"]) == 1
    out, error = capfd.readouterr()
    assert "3 to run, 3 at once" in out
    assert f"error: failing_s0 failed, see {tmp_path}/out/failing_s0/log.txt" in error
    assert "the run has diverged" in out
    assert "resumed after step" in (tmp_path / "out" / "dense_s0" / "log.txt").read_text()
    stored, logged = (rows(folder / "dense_s0") for folder in (file.parent, tmp_path / "out"))
    assert list(stored) == list(logged) == list(range(1, 61))
    assert "grad_norm" in logged[60] and "grad_norm" not in stored[60], "what nobody reads is not stored"
    assert "command" not in json.loads((file.parent / "dense_s0" / "run.json").read_text())
    assert not (file.parent / "failing_s0").exists()
    assert json.loads((file.parent / "groups_s0" / "run.json").read_text())["runs_per_gpu"] == 3
    assert "+0.0000 (+0.0%)" in out and "groups" in out
    assert all((file.parent / f"{name}.png").exists() for name in ("loss", "front", "behind"))
    assert not (file.parent / "loss_time.png").exists(), "the runs shared a machine"

    assert study.main([*words, "--only", "dense", "groups_s0"]) == 0
    assert "2 complete, 0 to run" in capfd.readouterr().out


@pytest.mark.usefixtures("forked", "undrawn")
def test_a_run_goes_on_from_another_s_checkpoint(write_study, tmp_path):
    dense = '[[runs]]\nname = "dense"\nrecipe = "recipes/dense.toml"\ncheckpoint.interval = 4\n'
    phases = 'schedule.phases = [{ mode = "dense", end = 4 }, { mode = "sparse", end = 8 }, { mode = "dense" }]\n'
    branch = f'[[runs]]\nname = "branch"\nrecipe = "recipes/groups_quarter.toml"\nafter = "dense/step-4"\n{phases}'
    file = write_study(dense + branch)
    words = [str(file), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"branch_s0 goes on from .*step-4, which is not there: run dense_s0 as well"):
        study.main([*words, "--only", "branch"])
    assert study.main([*words, "--jobs", "2"]) == 0
    assert "resumed after step 4" in (tmp_path / "out" / "branch_s0" / "log.txt").read_text()
    before, after = (rows(file.parent / name) for name in ("dense_s0", "branch_s0"))
    assert list(after) == list(before) == list(range(1, 13))
    assert all(after[step] == before[step] for step in range(1, 5))
    assert after[5]["phase"] == "sparse" and after[5]["loss"] == pytest.approx(before[5]["loss"], rel=0.05)
    assert after[6]["loss"] != before[6]["loss"]


@pytest.mark.usefixtures("forked", "undrawn")
def test_a_shorter_run_that_others_begin_with_is_no_result(write_study, tmp_path, capsys):
    start = '[[runs]]\nname = "start"\nrecipe = "recipes/dense.toml"\ntraining.steps = 5\n'
    rest = '[[runs]]\nname = "dense"\nrecipe = "recipes/dense.toml"\nafter = "start/step-4"\n'
    file = write_study(start + rest)
    words = [str(file), "--out", str(tmp_path / "out")]
    assert study.main(words) == 0
    assert sorted(path.name for path in file.parent.iterdir() if path.is_dir()) == ["dense_s0"]
    assert list(rows(file.parent / "dense_s0")) == list(range(1, 13))
    # It is run again only where its checkpoint is missed, or where it alone is asked for.
    shutil.rmtree(tmp_path / "out")
    for more, count in (([], 0), (["--only", "start"], 1)):
        capsys.readouterr()
        assert study.main([*words, *more]) == 0
        assert f", {count} to run," in capsys.readouterr().out


@pytest.mark.usefixtures("forked", "undrawn")
def test_runs_that_are_started_later_find_the_checkpoint_that_they_continue_from(write_study, tmp_path):
    start = '[[runs]]\nname = "start"\nrecipe = "recipes/dense.toml"\ntraining.steps = 5\n'
    start += "checkpoint.interval = 1\ncheckpoint.keep_latest_k = 2\ncheckpoint.last_save_model_only = true\n"
    rest = "".join(
        f'[[runs]]\nname = "{name}"\nrecipe = "recipes/dense.toml"\nafter = "start/step-{step}"\n'
        for name, step in (("late", 4), ("early", 1))
    )
    file = write_study(start + rest)
    words = [str(file), "--out", str(tmp_path / "out")]
    assert study.main([*words, "--only", "start", "late"]) == 0
    assert study.main([*words, "--only", "start", "early"]) == 0
    shutil.rmtree(tmp_path / "out" / "start_s0" / "checkpoint" / "step-1")
    for run in (tmp_path / "out" / "early_s0", file.parent / "early_s0"):
        shutil.rmtree(run, ignore_errors=True)
    with pytest.raises(ConfigError, match=r"early_s0 goes on from .*step-1, which the complete run start_s0 no longer"):
        study.main([*words, "--only", "start", "early"])


@pytest.mark.usefixtures("forked", "undrawn")
def test_a_run_that_another_continues_from_keeps_its_checkpoints_whatever_its_length(
    write_study, tmp_path, monkeypatch, capsys
):
    """With one run at a time the other starts when this one has saved its last step."""
    dense = '[[runs]]\nname = "dense"\nrecipe = "recipes/dense.toml"\ntraining.steps = 8\n'
    dense += "checkpoint.interval = 2\ncheckpoint.keep_latest_k = 2\n"
    branch = '[[runs]]\nname = "branch"\nrecipe = "recipes/dense.toml"\ntraining.steps = 8\nafter = "dense/step-2"\n'
    file = write_study(dense + branch)
    command = [str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    with monkeypatch.context() as patch:  # a run that cannot begin fails alone
        patch.setattr(shutil, "copytree", full_disk)
        assert study.main(command) == 1
    assert "error: branch_s0 failed, it cannot start: [Errno 28] No space left on device" in capsys.readouterr().err
    assert study.main(command) == 0
    assert len(rows(file.parent / "branch_s0")) == len(rows(file.parent / "dense_s0")) == 8


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("forked", "undrawn")
def test_what_goes_on_from_a_failed_run_is_not_started(write_study, tmp_path, capfd):
    failing = '[[runs]]\nname = "failing"\noptimizer.lr = 1e30\ntraining.max_norm = 1e9\ncheckpoint.interval = 4\n'
    branch = '[[runs]]\nname = "branch"\nrecipe = "recipes/groups_quarter.toml"\nafter = "failing/step-4"\n'
    file = write_study(failing + branch)
    assert study.main([str(file), "--out", str(tmp_path / "out")]) == 1
    out, error = capfd.readouterr()
    assert "not complete: branch_s0" in out and "error: failing_s0 failed" in error
    assert not (tmp_path / "out" / "branch_s0" / "log.txt").exists()


def test_complete_means_the_last_step_and_its_checkpoint(write_study, tmp_path):
    file = write_study(RUNS)
    run = study.read_study(file, tmp_path / "out").runs[0]
    assert not study.is_complete(run, run.outputs)
    run.outputs.mkdir(parents=True)
    config = study.resolved(run.config)
    (run.outputs / "run.json").write_text(json.dumps({"config": config}))
    line = {"step": 11, "loss": 1.0}
    (run.outputs / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert not study.is_complete(run, run.outputs)
    (run.outputs / "metrics.jsonl").write_text(json.dumps(line | {"step": 12}) + "\n")
    assert not study.is_complete(run, run.outputs)
    (run.outputs / "checkpoint").mkdir()
    (run.outputs / "checkpoint" / "latest").write_text("step-12")
    assert study.is_complete(run, run.outputs)
    (run.outputs / "checkpoint" / "latest").unlink()
    run.config.checkpoint.enable = False
    assert study.is_complete(run, run.outputs)

    # What changes nothing may differ, such as where it ran; a key that the run did not know counts as its default.
    config["job"]["dump_folder"], config["metrics"]["log_freq"] = "elsewhere", 7
    del config["router"]["spread"]
    (run.outputs / "run.json").write_text(json.dumps({"config": config}))
    assert study.is_complete(run, run.outputs)
    config["optimizer"]["lr"] = 0.5
    (run.outputs / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.5, and the study says 0.003: give the run another name"):
        study.is_complete(run, run.outputs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 1]", "seed = 1", "run dense: the command line: unknown key seed"),
        ("seeds = [0, 1]", "training.stepz = 1", "run dense: .*training.stepz; did you mean training.steps"),
        ("seeds = [0, 1]", "seeds = []", "seeds = .* of run dense: give a list"),
        ("seeds = [0, 1]", "debug.seed = 1", "run dense: debug.seed is the study's to set: use seeds"),
        ("seeds = [0, 1]", 'job.dump_folder = "x"', "use --out instead"),
        ("seeds = [0, 1]", "validation.enable = false", "set validation.enable = true"),
        ("recipes/groups_quarter", "recipes/groups_third", "run groups: recipe = .*no such file"),
        ('name = "groups"', 'name = "dense"', r"runs\[1\].name = \"dense\" is the name of another run"),
        ('name = "groups"', 'name = "groups_s1"', r"runs\[1\].name = \"groups_s1\": .*which says the seed"),
        ('name = "groups"', "", r"runs\[1\].name = null"),
        ("seeds = [0, 1]", 'after = "groups/step-4"', r"run dense: after = .*: no run groups of seed 0 stands before"),
        ("/groups_quarter.toml", '/dense.toml"\nafter = "dense', 'after = "dense": give a run and a step'),
        ("/groups_quarter.toml", '/dense.toml"\nafter = "dense/step-100', "dense_s0 saves a checkpoint every .* steps"),
        ("[[runs]]", "[[run]]", "runs = .*give at least one"),
        ("seeds = [0, 1]", "seeds = [0, 1", "is not valid TOML"),
    ],
)
def test_refused_studies(write_study, tmp_path, old, new, message):
    file = write_study(RUNS.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        study.read_study(file, tmp_path / "out")
    assert not any(path.is_file() for path in tmp_path.glob("out/**/*"))


def test_refused_arguments(write_study, tmp_path, capsys):
    file = write_study(RUNS, 'plot = ["sense"]')
    with pytest.raises(ConfigError, match="plot names no run sense: there are dense, groups"):
        study.read_study(file, tmp_path / "out")
    words = [str(write_study(RUNS)), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"--only sense: no such run .* there are dense_s0, dense_s1, groups_s0"):
        study.main([*words, "--only", "sense"])
    with pytest.raises(SystemExit, match="2"):
        study.main([words[0], "--outputs", "x"])
    assert "--outputs is called --out now" in capsys.readouterr().err
    for shown in ("5", "[[1]]"):
        with pytest.raises(ConfigError, match=r"plot = .*: give names of runs, such as \['dense', 'groups'\]"):
            study.read_study(write_study(RUNS, f"plot = {shown}"), tmp_path / "out")
    for minutes in ("0", "-1", "nan"):
        with pytest.raises(ConfigError, match=f"--limit-minutes {minutes}: give more than 0"):
            study.main([*words, "--limit-minutes", minutes])
    with pytest.raises(ConfigError, match="--jobs 0"):
        study.main([*words, "--jobs", "0"])
    absent = str(write_study(RUNS + 'data.sources = [{ type = "text", path = "absent/*.txt" }]\n'))
    assert study.main([absent, "--list"]) == 0
    with pytest.raises(ConfigError, match=r"run groups_s0: data.sources.*absent"):
        study.main([absent, *words[1:]])
    with pytest.raises(ConfigError, match=r"cannot be read .*there are .*docs/studies/recipes_160m/study.toml"):
        study.read_study(tmp_path / "nothing.toml")


def test_a_run_goes_over_what_all_share(write_study, tmp_path):
    file = write_study(
        RUNS + "training.steps = 7\n", 'model.converters = []\ndebug.deterministic = true\nplot = ["groups"]'
    )
    found = study.read_study(file, tmp_path / "out")
    assert [run.name for run in found.runs] == ["dense_s0", "dense_s1", "groups_s0"]
    assert [run.config.training.steps for run in found.runs] == [12, 12, 7]
    assert [run.config.debug.seed for run in found.runs] == [0, 1, 0]
    assert all(run.config.debug.deterministic for run in found.runs)
    assert found.plot == ["groups"]


@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/studies/*/study.toml")), ids=lambda file: file.parent.name)
def test_committed_studies_are_valid_and_their_results_those_of_the_file(file, tmp_path):
    found = study.read_study(file, tmp_path)
    for run in found.runs:
        assert study.is_complete(run, run.results) or not run.results.exists()
    assert {path.parent for path in file.parent.glob("*/run.json")} <= {run.results for run in found.runs}
    # As long as a dense run, or a little longer to reach its loss; but for what others begin with.
    ends = [run for run in found.runs if not run.only_begins]
    dense = {run.config.training.steps for run in ends if re.match(r"dense(_\d+)?_s0", run.name)}
    assert dense and all(any(1 <= run.config.training.steps / steps <= 1.1 for steps in dense) for run in ends)


@pytest.mark.parametrize("patch", sorted(ROOT.glob("docs/studies/**/*.patch")), ids=lambda file: file.stem)
def test_committed_patches_fit_this_code_or_name_a_commit(patch):
    named = "git checkout " in next(patch.parent.glob("*.toml")).read_text()
    fits = subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True)
    assert named or fits.returncode == 0, fits.stderr


def test_list_prints_the_names_that_only_takes_and_waves_what_can_run_at_once(write_study, capsys):
    def printed(*words):
        assert study.main([str(write_study(runs)), *words]) == 0
        return capsys.readouterr().out.split()

    runs = RUNS
    assert printed("--list") == ["dense_s0", "dense_s1", "groups_s0"] and printed("--waves") == ["0,1,2"]
    begun = '[[runs]]\nname = "{}"\nrecipe = "recipes/dense.toml"\ncheckpoint.interval = 4\nafter = "{}/step-4"\n'
    runs += begun.format("second", "dense") + begun.format("third", "second") + begun.format("other", "dense")
    assert printed("--list")[3:] == ["second_s0", "third_s0", "other_s0"]
    assert printed("--waves") == ["0,1,2", "3,5", "4"]
    assert printed("--waves", "--only", "second", "third") == ["3", "4"]  # by which study.sbatch finds them
    assert printed("--list", "--place", "0") == ["dense_s0"] and printed("--list", "--place", "4") == ["third_s0"]
    for place in ("-1", "6"):
        with pytest.raises(ConfigError, match=rf"--place {place}: .*study.toml has runs in places 0 to 5"):
            printed("--list", "--place", place)
    assert printed("--list", "--only", "second", "--place", "3") == ["second_s0"]
    with pytest.raises(ConfigError, match="--place 0 is dense_s0, which --only leaves out"):
        printed("--only", "second", "--place", "0")


def test_a_job_that_is_no_array_is_one_message(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_ARRAY_TASK_ID"}
    command = ["bash", str(ROOT / "scripts/slurm/study.sbatch"), "STUDY"]
    done = subprocess.run(
        command, env=environment | {"SLURM_SUBMIT_DIR": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "submit an array" in done.stderr, done


def test_gpus_are_taken_in_turn(write_study, tmp_path, monkeypatch):
    """Eight runs on two GPUs, three at once: a stand-in for train.py writes down what it was given."""
    runs = [f'[[runs]]\nname = "r{index}"\nrecipe = "recipes/dense.toml"\n' for index in range(5)]
    found = study.read_study(write_study("\n".join(runs)), tmp_path / "out").runs
    for run in found:
        run.command = [str(run.outputs / "gpu")]
    (tmp_path / "train.py").write_text(
        "import os, sys, time\n"
        "print('12:34:56 training a BPE', flush=True)\n"
        "open(sys.argv[1], 'w').write(os.environ.get('CUDA_VISIBLE_DEVICES', ''))\n"
        "time.sleep(0.3)\n"
    )
    monkeypatch.setattr(study, "ROOT", tmp_path)
    before = signal.getsignal(signal.SIGINT)
    launcher = study.Launcher(3, ["4", "6"], time.monotonic() + 60)
    launcher.run(found)
    assert launcher.runs_per_gpu == 2
    assert len(launcher.interrupted) == 5, "ended well but logged nothing"
    gpus = [(run.outputs / "gpu").read_text() for run in found]
    assert gpus[:3] == ["4", "6", "4"]
    assert set(gpus) == {"4", "6"}
    assert study._progress(found[0]) == "r0_s0 before its first step (training a BPE)"
    late = study.Launcher(1, [], time.monotonic())
    late.run(found[:2])
    assert late.interrupted == found[:2] and not late.failed, "one ended before its first step, one never started"
    assert signal.getsignal(signal.SIGINT) is before, "it gives the signals back"


def test_a_run_that_does_not_fit_beside_others_waits(write_study, tmp_path, monkeypatch, capsys):
    """A stand-in for train.py of which two fit into a GPU, and one that fits nowhere."""
    runs = [f'[[runs]]\nname = "r{index}"\nrecipe = "recipes/dense.toml"\n' for index in range(6)]
    found = study.read_study(write_study("\n".join(runs)), tmp_path / "out").runs
    for index, run in enumerate(found):
        run.command = [str(tmp_path / "memory"), str(run.outputs / "ran"), "3" if index == 4 else "1"]
    (tmp_path / "memory").mkdir()
    (tmp_path / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        "memory, ran, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "mine = [memory / f'{os.getpid()}_{part}' for part in range(size)]\n"
        "[file.touch() for file in mine]\n"
        "time.sleep(0.2)\n"
        "full = len(list(memory.iterdir())) > 2\n"
        "time.sleep(0 if full else 0.5)\n"
        "[file.unlink() for file in mine]\n"
        "if full:\n"
        f"    sys.exit({TooLargeError.status})\n"
        "open(ran, 'w').close()\n"
    )
    monkeypatch.setattr(study, "ROOT", tmp_path)
    launcher = study.Launcher(4, ["0"], time.monotonic() + 60)
    launcher.run(found)
    assert [*launcher.failed] == ["r4_s0"], "alone it does not fit either"
    assert all((run.outputs / "ran").exists() for run in found if run.name != "r4_s0")
    assert launcher.free == ["0"], "r4 had to be alone to fail"
    assert "does not fit beside the others on GPU 0: it waits" in capsys.readouterr().out


def write_result(folder: Path, loss: float, seed: int, sparse: bool, runs_per_gpu: int | None = 1) -> None:
    folder.mkdir()
    phases = [["dense", 1, 20], ["sparse", 21, 80], ["dense", 81, 100]] if sparse else [["dense", 1, 100]]
    about = {
        "config": {"model": {"name": "llama", "flavor": "160m"}, "debug": {"seed": seed}},
        "corpus": {"documents": 10, "copies": 3, "file_bytes": 2_000_000},
        "parameters": 1_000_000,
        "phases": phases,
        "flops_per_token": {"dense": 100.0, "sparse_pattern": 50.0, "sparse_executed": 75.0},
        "versions": {"torch": "2", "torchtitan": "0.2.2", "triton": "3"},
        "hardware": {"device": "GPU", "ranks": 1},
        "commit": "abcdefabcdef",
        "date": "2026-01-02T03:04:05",
    }
    if runs_per_gpu is not None:
        about["runs_per_gpu"] = runs_per_gpu
    (folder / "run.json").write_text(json.dumps(about))
    before = None
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (1, *range(10, 101, 10)):
            phase = next(mode for mode, start, stop in phases if start <= step <= stop)
            # The first logged line of a phase compiles, and so is slow; sparse steps are twice as fast.
            speed = 1000.0 * (1 + (phase == "sparse")) / (100 if phase != before else 1)
            before = phase
            line = {"step": step, "phase": phase, "loss": loss, "tokens": step * 100, "tokens_per_second": speed}
            if step % 50 == 0:
                line |= {"val_loss": loss + (100 - step), "val_bpb": loss / 2}
            file.write(json.dumps(line) + "\n")


def test_runs_on_a_cpu_are_not_compared_by_time(tmp_path, monkeypatch, capsys):
    """Two drawings of the same numbers, the first as of a GPU: the second has FLOPs and says why."""
    labels = []
    original = study.draw_front

    def draw_front(points, baseline, deviation, label, *more):
        labels.append((label, points["groups"][0]))
        return original(points, baseline, deviation, label, *more)

    monkeypatch.setattr(study, "draw_front", draw_front)
    write_result(tmp_path / "dense_s0", 2.1, 0, sparse=False)
    write_result(tmp_path / "groups_s0", 2.09, 0, sparse=True)
    runs = [SimpleNamespace(name=name, results=tmp_path / name) for name in ("dense_s0", "groups_s0")]
    drawn = SimpleNamespace(file=tmp_path / "study.toml", runs=runs, plot=["dense", "groups"])
    study.draw(drawn)
    assert all((tmp_path / f"{name}.png").exists() for name in ("loss", "loss_time", "reached", "front", "behind"))
    assert "| 0.70 |" in runs_table(tmp_path)
    for file in tmp_path.glob("*/run.json"):
        file.write_text(file.read_text().replace('"GPU"', '"CPU"'))
    capsys.readouterr()
    study.draw(drawn)
    assert "loss against time is not drawn: the runs were made on a CPU" in capsys.readouterr().out
    assert all((tmp_path / f"{name}.png").exists() for name in ("loss", "front", "behind"))
    assert not any((tmp_path / f"{name}.png").exists() for name in ("loss_time", "reached"))
    assert "reached" not in runs_table(tmp_path)
    asked_for = Picture(load_runs([tmp_path / "dense_s0", tmp_path / "groups_s0"]), None, "time")
    assert asked_for.x_label == "training time on a CPU, which has no sparse kernels, seconds"
    (timed, seconds), (flops, share) = labels
    assert timed == "training time, over that of dense" and seconds == pytest.approx(0.7)
    assert flops.startswith("FLOPs that the pattern requires, over that of dense\nruns on a CPU")
    assert share == pytest.approx(0.7)  # half of the FLOPs in 60% of the steps


def test_table_of_seeds(tmp_path):
    for seed, loss in ((0, 2.1), (1, 2.3)):  # seed 0 is compared with seed 0
        write_result(tmp_path / f"dense_s{seed}", loss, seed, sparse=False)
    write_result(tmp_path / "groups_s0", 2.121, 0, sparse=True)
    write_result(tmp_path / "shared_s0", 2.0, 0, sparse=True, runs_per_gpu=2)
    write_result(tmp_path / "better_s0", 2.09, 0, sparse=True)
    lines = runs_table(tmp_path).splitlines()
    assert (
        lines[0]
        == "| run | seeds | sparse | validation loss | minus dense | bits/byte | FLOPs | tokens/s | time | reached |"
    )
    assert lines[2] == "| `shared` | 1 | 60% | 2.0000 | -0.1000 (-4.8%) | 1.0000 | 85% (70%) | -, - | - | - |"
    # At its last step, after 7 of dense's 10 seconds.
    assert lines[3] == "| `better` | 1 | 60% | 2.0900 | -0.0100 (-0.5%) | 1.0450 | 85% (70%) | 1k, 2k | 7 s | 0.70 |"
    # Dense: 100 tokens a step, 1000 a second. Groups: 60 of the 100 steps at twice that.
    assert lines[4] == (
        "| `dense` | 2 | 0% | 2.2000 ± 0.1414 | +0.0000 (+0.0%) | 1.1000 | 100% (100%) | 1k, - | 10 s | - |"
    )
    assert lines[5] == "| `groups` | 1 | 60% | 2.1210 | +0.0210 (+1.0%) | 1.0605 | 85% (70%) | 1k, 2k | 7 s | - |"
    assert "10 documents (2 MB, 3 copies left out); 1 x GPU" in lines[7]
    assert "commit abcdefabcd" in lines[7]
    write_result(tmp_path / "better_s1", 2.29, 1, sparse=True)  # below dense_s1, and above the mean of both
    assert "| `better` | 2 | 60% | 2.1900 ± 0.1414 | -0.0100 (-0.5%) |" in (table := runs_table(tmp_path))
    assert "| 7 s | 0.70 |" in table
    padded = runs_table(tmp_path, pad=True).splitlines()
    assert " ".join(padded[0].split()) == lines[0].strip("| ").replace(" |", "")
    assert all(len(line) <= 120 for line in padded)


def test_the_commands_of_the_page_on_one_s_own_data(forked, tmp_path, monkeypatch, capsys):
    """Every command of docs/own_data.md as it stands, in another folder, and with a smaller and shorter model."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs/own_data.md").read_text(), re.DOTALL))
    smaller = {
        "tokenizer.vocab_size = 8192": f'tokenizer.vocab_size = 400\ntokenizer.cache_folder = "{tmp_path}/cache"',
        "model.dim = 384": "model.dim = 32",
        "model.n_layers = 6": "model.n_layers = 2",
        "model.n_heads = 6": "model.n_heads = 2",
        "model.hidden_dim = 2304": "model.hidden_dim = 192\ncompile.enable = false",
        "training.steps = 2000": "training.steps = 20",
        "training.seq_len = 256": "training.seq_len = 64",
        "training.local_batch_size = 64": "training.local_batch_size = 16",
        "training.global_batch_size = 64": "training.global_batch_size = 16",
        "validation.freq = 200": "validation.freq = 10",
    }
    for line, shorter in smaller.items():
        assert script.count(line) == 1, line
        script = script.replace(line, shorter)
    perform_script(script, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert f"files of {tmp_path}/mine" in said and "This job can run." in said
    assert "dense_s0\ncolumns_half_s0\nvenom_4of16_s0\n" in said
    assert re.search(r"^columns_half +80% +[\d.]+ +[+-][\d.]+ ", said, re.MULTILINE), said
    assert (tmp_path / "mine-hf" / "model.safetensors").is_file() and (tmp_path / "study" / "loss.png").is_file()
