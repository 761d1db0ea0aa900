"""The sbatch scripts under a real SLURM of one node, started for these tests (scripts/slurm/loopback.sh)."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RANK_NAMES, ROOT, losses, merge, rows

from scripts import study

MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs SLURM and munge: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting SLURM's daemons needs root"),
]
STEPS = 60
CHANGES = ["--training.steps", str(STEPS), "--validation.freq", "20"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Run a command as a user of the cluster: `slurm("squeue", ...)` returns what it prints."""
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PORT": port}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    script = ("bash", "scripts/slurm/loopback.sh")
    try:
        # The daemons keep what they inherit open, so their output must not be a pipe that somebody reads to its end.
        with (folder / "start.log").open("w") as log:
            command = [*script, "start", str(folder)]
            started = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=300)
        assert started.returncode == 0, (folder / "start.log").read_text()
        yield run
    finally:
        subprocess.run([*script, "stop", str(folder)], cwd=ROOT, env=environment, timeout=300)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of the run that nothing happens to, trained once: `undisturbed(train)`."""
    known: list[dict[int, float]] = []

    def get(train) -> dict[int, float]:
        if not known:
            known.append(losses(train(tmp_path_factory.mktemp("whole"), *CHANGES, "--checkpoint.enable", "false")))
        return known[0]

    return get


def submit(slurm, log: Path, script: str, *words: str, options: tuple[str, ...] = ()) -> str:
    """Submit with what this machine has, and return the job's number."""
    own = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}", *options)
    return slurm("sbatch", "--parsable", *own, f"scripts/slurm/{script}", *words)


def until(happened, log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"{log} was never written"
        time.sleep(0.1)


def field(slurm, job: str, name: str) -> str:
    words = dict(word.partition("=")[::2] for word in slurm("scontrol", "show", "job", job).split())
    return words[name]


def test_a_signalled_job_saves_is_requeued_and_resumes_exactly(slurm, tiny, train, undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "job.log"
    words = merge(tiny, [*CHANGES, "--checkpoint.interval", "1000", "--job.dump_folder", str(folder)])
    job = submit(slurm, log, "one_node.sbatch", "--config", "configs/debug.toml", *words)
    until((folder / "metrics.jsonl").exists, log)
    # As SLURM does before the time limit, to the batch shell alone.
    slurm("scancel", "--signal=USR1", "--batch", job)
    until(lambda: field(slurm, job, "JobState") == "PENDING", log)
    stopped = max(rows(folder))
    assert stopped < STEPS and f"stopped by a signal after step {stopped}" in log.read_text()
    assert (folder / "checkpoint" / "latest").read_text() == f"step-{stopped}"

    def starts() -> bool:
        # SLURM lets a requeued job wait for two minutes, counted from when the last of it has ended: so say it again.
        # And it does not run a job whose credential it revoked a moment ago: so wait first.
        time.sleep(5)
        if field(slurm, job, "JobState") == "PENDING":
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(2)
        return field(slurm, job, "JobState") != "PENDING"

    until(starts, log)
    until(lambda: field(slurm, job, "JobState") == "COMPLETED", log)
    assert field(slurm, job, "Restarts") == "1"
    text = log.read_text()
    assert f"resumed after step {stopped}" in text and f"job {job} is finished" in text, text
    assert losses(rows(folder)) == undisturbed(train)


def test_a_job_that_loses_a_process_goes_on_by_itself(slurm, tiny, train, undisturbed, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "job.log"
    words = merge(tiny, [*CHANGES, "--checkpoint.interval", "5", "--job.dump_folder", str(folder)])
    job = submit(slurm, log, "one_node.sbatch", "--config", "configs/debug.toml", *words)
    until((folder / "checkpoint" / "latest").exists, log)
    subprocess.run(["pkill", "-KILL", "-f", f"^[^ ]*python[^ ]* -u train.py .*{folder}"], check=True)
    until(lambda: field(slurm, job, "JobState") == "COMPLETED", log)
    text = log.read_text()
    assert field(slurm, job, "Restarts") == "0"
    assert "resumed after step" in text and f"job {job} is finished" in text, text
    assert losses(rows(folder)) == undisturbed(train)


def test_a_failed_job_keeps_its_status_and_is_not_requeued(slurm, tmp_path):
    log = tmp_path / "job.log"
    job = submit(slurm, log, "one_node.sbatch", "--config", str(tmp_path / "missing.toml"))
    until(lambda: field(slurm, job, "JobState") == "FAILED", log)
    assert field(slurm, job, "Restarts") == "0" and field(slurm, job, "ExitCode") != "0:0"
    text = log.read_text()
    assert "is not requeued" in text and text.count("error: ") == text.count("missing.toml") == 1, text


def test_a_study_s_arrays_go_on_from_one_another(slurm, write_study, tmp_path, capsys):
    start = '[[runs]]\nname = "start"\nrecipe = "recipes/dense.toml"\ntraining.steps = 5\n'
    rest = '[[runs]]\nname = "rest"\nrecipe = "recipes/groups_quarter.toml"\nafter = "start/step-4"\n'
    file, jobs = write_study(start + rest), []
    assert study.main([str(file), "--waves"]) == 0
    for wave in capsys.readouterr().out.split():
        options = (f"--array={wave}", *(f"--dependency=afterok:{job}" for job in jobs[-1:]))
        words, log = (str(file), "--out", str(tmp_path / "out")), tmp_path / f"wave_{len(jobs)}.log"
        jobs.append(submit(slurm, log, "study.sbatch", *words, options=options))
    assert len(jobs) == 2
    until((file.parent / "rest_s0" / "run.json").exists, log, 900)
    before, run = (rows(tmp_path / "out" / f"{name}_s0") for name in ("start", "rest"))
    assert list(run) == list(range(1, 13)) and all(run[step] == before[step] for step in range(1, 5))
