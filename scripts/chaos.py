"""Break training runs at random and at chosen moments, resume them, and compare with a run that nothing happened to.

    python -m scripts.chaos docs/reliability/chaos.json --faults 200 --seed 0

A fault is drawn from `KINDS` by its number and the seed: what happens (a signal, a full disk, a read-only folder, NaN,
a damaged checkpoint, a data process that is killed, a step that hangs), when (a random time, or a call of a function of
the trainer, in a run or while it resumes) and to which of one or two processes. The job is configs/debug.toml with a
model of 50 thousand parameters: 12 steps, sparse in steps 4 to 8, a checkpoint every 2 steps. The same command is then
run until the run is complete, and has to leave exactly what the undisturbed run leaves:

    metrics.jsonl   every step once, with the same loss, bit for bit
    step-12/*       the same values, bit for bit: weights, moments, sparse state, place in the data

A run may lose the steps since its last checkpoint, and those of one more interval where the newest checkpoint itself
is damaged. The file is written after each fault and goes on where it ends; `python -m scripts.report` makes the table.

Processes are forked from one that has imported the trainer, with torchrun's variables set; faults of torchrun itself
start the real one.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from configs.errors import first_line
from configs.repository import ROOT, commit
from recipes.atomic import write_atomically
from scripts.options import Parser, out_file, out_folder

STEPS, INTERVAL = 12, 2
HANG = 60.0
"""Seconds that an attempt may take longer than twice the undisturbed run."""

NOBODY = 65534

# Where a fault can be aimed: the module, the name in it whose n-th call it precedes, and the most calls of a run (of a
# process) to choose from.
IN_A_RUN: dict[str, tuple[str, str, int]] = {
    "between a checkpoint's data and its manifest": ("recipes.checkpoint", "write_manifest", 6),
    "between a checkpoint's manifest and the pointer": ("recipes.checkpoint", "SafeCheckpointManager._move_pointer", 6),
    "while a checkpoint's data is written": ("torch.distributed.checkpoint.filesystem", "_write_item", 200),
    "in the switch to sparse": ("recipes.sparsity", "Sparsity._cluster", 1),
    "in validation": ("recipes.validation", "Validator.validate", 4),
    "in a training step": ("recipes.trainer", "SparseTrainer.forward_backward_step", 12),
    "as a data process starts": ("multiprocessing.process", "BaseProcess.start", 1),
}
IN_A_RESUME: dict[str, tuple[str, str, int]] = {
    "while a checkpoint is verified": ("recipes.checkpoint", "_crc32_of_file", 2),
    "while a checkpoint's tensors are loaded": (
        "torch.distributed.checkpoint.default_planner",
        "DefaultLoadPlanner.commit_tensor",
        40,
    ),
    "as a row of the batch takes its place in the data": ("recipes.data", "Row.load_state_dict", 4),
    "before later rows of metrics are dropped": ("recipes.metrics", "Metrics.start", 1),
    "between the metrics and run.json": ("recipes.trainer", "SparseTrainer._write_about", 1),
}
SAVE, ROW = "before a save", "before a row of metrics"
MOMENTS = {
    **IN_A_RUN,
    **IN_A_RESUME,
    SAVE: ("recipes.checkpoint", "SafeCheckpointManager.dcp_save", 6),
    ROW: ("recipes.metrics", "Metrics.finish", 12),
}
ON_RANK0 = {
    "between a checkpoint's data and its manifest",
    "between a checkpoint's manifest and the pointer",
    "while a checkpoint is verified",
    "between the metrics and run.json",
}
AT_RANDOM = "at a random time"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP, SIGCONT after 2 s")
STOPPED = "SIGSTOP for good"
RESUMES = ("SIGKILL in a resume", "SIGTERM in a resume")
FULL, READ_ONLY, NAN = "the disk fills", "the checkpoint folder becomes read-only", "a gradient becomes NaN"
DAMAGES = ("a bit flipped in the newest checkpoint", "a file of it truncated", "a shard of it missing")
DATA_PROCESS, HANGS = "SIGKILL of a data process", "a call that does not return"
ON_ALL = {FULL, READ_ONLY, NAN}
ENDS = {**dict.fromkeys(ON_ALL, 2), DATA_PROCESS: 1, HANGS: 1}  # with one message and this status

# What can happen: kind, moments, numbers of processes, and how often it is drawn.
KINDS: list[tuple[str, tuple[str, ...], tuple[int, ...], int]] = [
    *((kind, (AT_RANDOM, *IN_A_RUN), (1, 2), weight) for kind, weight in zip(SIGNALS, (8, 6, 3), strict=True)),
    *((kind, tuple(IN_A_RESUME), (1, 2), weight) for kind, weight in zip(RESUMES, (5, 1), strict=True)),
    (STOPPED, ("in a training step", "in validation", "while a checkpoint's data is written"), (2,), 1),
    (FULL, (SAVE, ROW), (1, 2), 4),
    (READ_ONLY, (SAVE,), (1, 2), 2),
    (NAN, ("in a training step",), (1, 2), 2),
    *((kind, ("after SIGKILL",), (1, 2), 2) for kind in DAMAGES),
    (DATA_PROCESS, ("in a training step", "in validation", "while a checkpoint's data is written"), (1, 2), 5),
    (HANGS, ("in a training step", "in validation", "in the switch to sparse"), (1, 2), 5),
    ("SIGKILL of torchrun", (AT_RANDOM,), (1, 2), 1),
    ("SIGTERM of torchrun", (AT_RANDOM,), (1, 2), 1),
]


@dataclass
class Fault:
    """One fault, and what came of it."""

    number: int
    kind: str
    moment: str
    processes: int
    rank: int
    """The rank that it happens to; those of `ON_ALL` happen to all."""

    call: int
    """Which call of the moment's function it precedes; 0 at a random time."""

    time: float
    """At a random time: the share of the undisturbed run's time. A full disk: the share of a file that fits."""

    happened: bool = False
    last_step: int = 0
    resumed_from: list[int] = field(default_factory=list)
    lost_steps: int = 0
    attempts: int = 0
    seconds: float = 0.0
    commit: str = ""
    """That of the program: another may draw another fault by the same number."""
    problems: list[str] = field(default_factory=list)

    @classmethod
    def draw(cls, seed: int, number: int) -> "Fault":
        chance = random.Random(f"{seed} {number}")
        kind, moments, processes, _ = chance.choices(KINDS, [weight for *_, weight in KINDS])[0]
        moment, count = chance.choice(moments), chance.choice(processes)
        aimed = "in a training step" if moment == "after SIGKILL" else moment
        call = chance.randint(1, MOMENTS[aimed][2]) if aimed in MOMENTS else 0
        if moment == "after SIGKILL":
            call = max(call, 2 * INTERVAL + 1)  # a damaged checkpoint needs another to fall back to
        rank = 0 if moment in ON_RANK0 else chance.randrange(count)
        return cls(number, kind, moment, count, rank, call, chance.random())


@dataclass
class Job:
    """The folder of all runs, and the words of the job's command."""

    folder: Path
    words: list[str]
    references: dict[tuple[int, int], tuple[dict[int, float], Path, float]] = field(default_factory=dict)

    def command(self, run: Path, workers: int) -> list[str]:
        return [
            *self.words,
            *("--job.dump_folder", str(run)),
            *("--training.dataloader.num_workers", str(workers)),
        ]

    def reference(self, processes: int, workers: int) -> tuple[dict[int, float], Path, float]:
        """The undisturbed run's losses by step, its folder, and its seconds; made once."""
        if (processes, workers) not in self.references:
            run = self.folder / f"reference-{processes}-{workers}"
            began = time.monotonic()
            attempt = Attempt(self.command(run, workers), processes, self.folder / "log")
            status = attempt.wait(600)
            if status:
                raise RuntimeError(f"the undisturbed run failed:\n{attempt.log()}")
            seconds = time.monotonic() - began
            self.references[processes, workers] = (losses(run)[0], run, seconds)
        return self.references[processes, workers]


def make_corpus(folder: Path) -> None:
    """Write a small corpus: 240 files of Python-like text."""
    for index in range(240):
        lines = [f"def f{index}_{line}(x):\n    return x * {line * index % 97} + {line}\n" for line in range(12)]
        (folder / f"{index:03}.py").write_text("\n".join(lines))


def tiny_job(corpus: Path, cache: Path) -> dict[str, str]:
    """Keys that make configs/debug.toml a job of seconds.

    12 steps, sparse in steps 4 to 8; every step is logged and saved.

    Args:
        corpus: folder of its files.
        cache: folder for its tokenizer.
    """
    return {
        "data.sources": f'[{{type = "text", path = "{corpus}/*.py"}}]',
        "data.validation_share": "0.1",
        "tokenizer.cache_folder": str(cache),
        "tokenizer.vocab_size": "384",
        "model.dim": "32",
        "model.n_layers": "2",
        "model.n_heads": "2",
        "model.n_kv_heads": "1",
        "model.hidden_dim": "256",
        "activations.v": "64",
        "training.steps": str(STEPS),
        "training.seq_len": "32",
        "training.local_batch_size": "4",
        "lr_scheduler.warmup_steps": "2",
        "validation.freq": "4",
        "validation.sequences": "6",
        "metrics.log_freq": "1",
        "metrics.enable_tensorboard": "false",
        "checkpoint.interval": "1",
        "checkpoint.keep_latest_k": "0",
        "schedule.phases": '[{mode = "dense", end = 3}, {mode = "sparse", end = 8}, {mode = "dense", end = 1.0}]',
        "schedule.dense_layers": "0",
    }


def make_job(folder: Path) -> Job:
    """A small corpus and the job that trains on it, in a new folder."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    folder.chmod(0o755)
    make_corpus(corpus)
    keys = {
        "config": "configs/debug.toml",
        **tiny_job(corpus, folder / "tokenizers"),
        "checkpoint.interval": str(INTERVAL),
        "checkpoint.keep_latest_k": "3",
        "comm.init_timeout_seconds": "30",
        "comm.train_timeout_seconds": "30",
        "training.hang_timeout_seconds": "20",
        "training.start_timeout_seconds": "20",
    }
    return Job(folder, [word for key, value in keys.items() for word in (f"--{key}", value)])


class Attempt:
    """One start of the job: its processes, forked or under torchrun.

    Args:
        words: of train.py's command line.
        processes: how many.
        output: the file that they write to.
        fault: one that they bring about themselves.
        torchrun: start the real one.
    """

    def __init__(
        self, words: list[str], processes: int, output: Path, fault: Fault | None = None, torchrun: bool = False
    ) -> None:
        self.output = output
        output.unlink(missing_ok=True)
        self.began = time.monotonic()
        self.parent: subprocess.Popen | None = None
        self.ranks: list[BaseProcess] = []
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
            command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py", *words]
            with output.open("w") as file:
                self.parent = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
            return
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        for rank in range(processes):
            variables: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
            }
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment = dict(os.environ) | {name: str(value) for name, value in variables.items()}
            self.ranks.append(context.Process(target=_rank, args=(words, environment, output, fault)))
            self.ranks[-1].start()

    def log(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def send(self, number: int, rank: int) -> bool:
        """Send a signal to a rank, or to torchrun; whether it still ran."""
        if self.parent is not None:
            ran = self.parent.poll() is None
            self.parent.send_signal(number)
            return ran
        if alive := self.ranks[rank].is_alive():
            os.kill(self.ranks[rank].pid or 0, number)
        return alive

    def wait(self, limit: float, goes_on_after: float | None = None) -> int | None:
        """Wait for the end, as torchrun does: where one fails, the others get SIGTERM and, after a while, SIGKILL.

        Args:
            limit: seconds from the start.
            goes_on_after: seconds after which a process that has stopped itself gets SIGCONT; None: never.

        Returns:
            the first status other than 0, or 0; None after `limit`, when all have been killed.
        """
        if self.parent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.parent.wait(max(1.0, self.began + limit - time.monotonic()))
            self.parent.kill()
            return None
        status: int | None = 0
        stopped: dict[int, float] = {}
        while any(rank.is_alive() for rank in self.ranks):
            failed = next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
            if failed or time.monotonic() > self.began + limit:
                status = failed or None
                break
            for rank in self.ranks:
                if goes_on_after is not None and rank.pid and _is_stopped(rank.pid):
                    since = stopped.setdefault(rank.pid, time.monotonic())
                    if time.monotonic() > since + goes_on_after:
                        os.kill(rank.pid, signal.SIGCONT)
                        stopped.pop(rank.pid)
            connection.wait([rank.sentinel for rank in self.ranks if rank.is_alive()], 0.2)
        status = status or next((rank.exitcode for rank in self.ranks if rank.exitcode), status)
        for end, seconds in ((BaseProcess.terminate, 8.0), (BaseProcess.kill, 8.0)):
            for rank in self.ranks:
                end(rank)
            deadline = time.monotonic() + seconds
            for rank in self.ranks:
                rank.join(max(0.1, deadline - time.monotonic()))
        return status


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _rank(words: list[str], environment: dict[str, str], output: Path, fault: Fault | None) -> None:
    """A process of the job: train.py, with a fault at a function's n-th call."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if fault is not None and fault.call and (fault.kind in ON_ALL or int(environment["RANK"]) == fault.rank):
        moment = "in a training step" if fault.moment == "after SIGKILL" else fault.moment
        _aim(MOMENTS[moment], fault.call, lambda arguments: _bring_about(fault, output, arguments))
    sys.argv = ["train.py", *words]
    runpy.run_path("train.py", run_name="__main__")


def _aim(moment: tuple[str, str, int], call: int, act: Callable[[tuple], None]) -> None:
    """Let `act` be called, with a function's arguments, before the function's n-th call."""
    module, names, _ = moment
    owner: Any = __import__(module, fromlist=["_"])
    *owners, name = names.split(".")
    for each in owners:
        owner = getattr(owner, each)
    original, count = getattr(owner, name), 0

    def aimed(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            act(args)
        return original(*args, **kwargs)

    setattr(owner, name, aimed)


def _bring_about(fault: Fault, output: Path, arguments: tuple) -> None:
    """What a process does to itself at the moment that a fault is aimed at."""
    output.with_suffix(".happened").touch()
    if fault.kind == FULL and fault.moment == ROW:
        arguments[0].file = Path("/dev/full")  # nothing fits into it
    elif fault.kind == FULL:  # a write fails in the middle of a file, as on a full disk, with EFBIG instead of ENOSPC
        # More than the output that this process writes into a file, less than a shard.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(20_000 + 200_000 * fault.time), resource.RLIM_INFINITY))
    elif fault.kind == READ_ONLY:
        Path(arguments[0].folder).mkdir(parents=True, exist_ok=True)
        os.chmod(arguments[0].folder, 0o555)
        if os.geteuid() == 0:  # whom no mode keeps from writing
            os.seteuid(NOBODY)
    elif fault.kind == NAN:
        _spoil_gradient()
    elif fault.kind == DATA_PROCESS:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    elif fault.kind == HANGS:
        time.sleep(600)
    else:
        number = getattr(signal, re.split(r"\W", fault.kind)[0]) if fault.kind.startswith("SIG") else signal.SIGKILL
        os.kill(os.getpid(), number)


def _spoil_gradient() -> None:
    """Put NaN into the gradient of this step; not by a hook of autograd, since FSDP's shards have none."""
    from configs.titan import dist_utils

    original = dist_utils.clip_grad_norm_

    def clip(parameters, *args, **kwargs):
        dist_utils.clip_grad_norm_ = original
        parameters = list(parameters)
        gradient = parameters[0].grad
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.view(-1)[:1] = math.nan
        return original(parameters, *args, **kwargs)

    dist_utils.clip_grad_norm_ = clip


def losses(run: Path) -> tuple[dict[int, float], list[int]]:
    """A run's losses by step, and the steps of its rows in their order."""
    rows = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
                rows.append(json.loads(line))
    return {row["step"]: row["loss"] for row in rows}, [row["step"] for row in rows]


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoint" / f"step-{STEPS}"


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit, and the same values; compared in a forked process."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_compare, args=(one, other))
    process.start()
    process.join()
    return process.exitcode == 0


def _compare(one: Path, other: Path) -> None:
    """Exit with status 0 if both checkpoints hold the same."""
    sys.exit(int(not _same(_read(one), _read(other))))


def _read(checkpoint: Path) -> Any:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole"
        dcp_to_torch_save(checkpoint, file)
        return torch.load(file, weights_only=False)  # written by the line before


def _same(one: Any, other: Any) -> bool:
    import torch

    from configs.safe_load import PlainUnpickler

    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, bytes) and one != other:  # the data's state: equal values have several pickles
        return _same(*(PlainUnpickler(io.BytesIO(each)).load() for each in (one, other)))
    return type(one) is type(other) and one == other


def damage(run: Path, kind: str, chance: random.Random) -> bool:
    """Damage the newest complete checkpoint; False where there is none to fall back to."""
    complete = sorted((run / "checkpoint").glob("step-*/manifest.json"), key=lambda file: int(file.parent.name[5:]))
    if len(complete) < 2:
        return False
    files = sorted(file for file in complete[-1].parent.iterdir() if file.suffix == ".distcp")
    file = chance.choice(files)
    if kind == DAMAGES[2]:
        file.unlink()
    elif kind == DAMAGES[1]:
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    return True


def try_fault(job: Job, fault: Fault) -> Fault:
    """Run the job, let the fault happen, run it until it is complete, and compare."""
    began = time.monotonic()
    workers = int(fault.moment == "as a data process starts" or fault.kind == DATA_PROCESS)
    expected, reference, usual = job.reference(fault.processes, workers)
    limit = 2 * usual + HANG
    run, output = job.folder / f"fault-{fault.number}", job.folder / "log"
    marker = output.with_suffix(".happened")
    marker.unlink(missing_ok=True)
    torchrun = fault.kind.endswith("of torchrun")
    if fault.kind in RESUMES:  # a run to resume, killed when it has a checkpoint
        step = INTERVAL + 1 + int(fault.time * (STEPS - INTERVAL))
        kill = replace(fault, kind="SIGKILL", moment="in a training step", call=step)
        Attempt(job.command(run, workers), fault.processes, output, kill).wait(limit)
        marker.unlink()
    attempt = Attempt(job.command(run, workers), fault.processes, output, fault, torchrun)
    if fault.moment == AT_RANDOM:
        time.sleep(fault.time * (usual + 15 * torchrun))  # torchrun and its processes import what forked ones have
        number = getattr(signal, re.split(r"\W", fault.kind)[0])
        fault.happened = attempt.send(number, fault.rank)
    status = attempt.wait(limit, goes_on_after=None if fault.kind == STOPPED else 2.0)
    fault.attempts = 1 + (fault.kind in RESUMES)
    fault.happened |= marker.exists()
    log = attempt.log()
    if status is None:
        fault.problems.append(f"the disturbed run did not end in {limit:.0f} s")
    if fault.kind in ENDS and fault.happened:
        if status != ENDS[fault.kind] or "error: " not in log:
            fault.problems.append(f"ended with status {status} and not with one message")
        if "Traceback" in log:
            fault.problems.append("ended with a traceback")
    if fault.kind in ("SIGTERM", SIGNALS[2], RESUMES[1]) and "Traceback" in log:  # torchrun itself prints one
        fault.problems.append("a traceback: " + log[log.index("Traceback") :].strip().splitlines()[-1][:200])
    if fault.kind in DAMAGES:
        fault.happened &= damage(run, fault.kind, random.Random(fault.time))
    if (run / "checkpoint").exists():
        (run / "checkpoint").chmod(0o755)
    fault.last_step = max(losses(run)[0], default=0)

    status = 1
    while status and fault.attempts < 5:
        attempt = Attempt(job.command(run, workers), fault.processes, output)
        status = attempt.wait(limit)
        fault.attempts += 1
        log = attempt.log()
        if torchrun and "is in use by another run" in log:  # processes that torchrun left behind, which end by and by
            time.sleep(10)
            continue
        found = re.search(r"resumed after step (\d+)", log)
        fault.resumed_from.append(int(found[1]) if found else fault.last_step if "is complete" in log else 0)
        if status:
            fault.problems.append(f"status {status} at a resume: {log.strip().splitlines()[-1:]}")
    fault.lost_steps = fault.last_step - fault.resumed_from[0] if fault.resumed_from else fault.last_step
    if fault.lost_steps > (2 * INTERVAL if fault.kind in DAMAGES else INTERVAL):
        fault.problems.append(f"{fault.lost_steps} steps were lost, the interval is {INTERVAL}")
    got, steps = losses(run)
    if steps != list(range(1, STEPS + 1)):
        fault.problems.append(f"metrics.jsonl has steps {steps}")
    if different := [step for step in expected if got.get(step) != expected[step]]:
        fault.problems.append(f"other losses in steps {different}")
    if not status and not same_checkpoint(last_checkpoint(run), last_checkpoint(reference)):
        fault.problems.append("the last checkpoint has other contents")
    if not fault.problems:
        shutil.rmtree(run)
    fault.seconds = round(time.monotonic() - began, 1)
    return fault


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m scripts.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=out_file, help="JSON file of the results; faults that it has are not tried again")
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the faults to try (again)")
    parser.add_argument(
        "--folder", type=out_folder, help="for the runs, kept where one went wrong; default: a temporary one"
    )
    options = parser.parse_args(arguments)
    if options.faults < 1 or min(options.only or [0]) < 0:
        parser.error("--faults and --only: give 1 fault or more, and numbers from 0")
    if options.folder and options.folder.is_dir() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder} is not empty: name another one")
    done: dict[int, dict] = {}
    if options.file.exists():
        try:
            before = json.loads(options.file.read_text())
            seed, done = before["seed"], {fault["number"]: fault for fault in before["faults"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{options.file} is no file of faults ({first_line(error)}): give another file")
        if seed != options.seed:
            parser.error(f"{options.file} is of seed {seed}: give that seed, or another file")
    wanted = list(range(options.faults)) if options.only is None else options.only
    todo = [number for number in wanted if number not in done or options.only is not None]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train"])
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    job, began = make_job(folder), time.monotonic()
    for index, number in enumerate(todo, start=1):
        fault = try_fault(job, Fault.draw(options.seed, number))
        fault.commit = commit() or ""
        done[number] = asdict(fault)
        about = {"seed": options.seed, "steps": STEPS, "interval": INTERVAL}
        options.file.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(done[each]) for each in sorted(done))
        head = json.dumps(about)[:-1]
        write_atomically(options.file, f'{head}, "faults": [\n{rows}\n]}}\n')
        left = (time.monotonic() - began) / index * (len(todo) - index)
        said = "; ".join(fault.problems) or ("equal" if fault.happened else "did not happen; equal")
        print(
            f"{index}/{len(todo)}  {number}: {fault.kind}, {fault.moment}, {fault.processes} processes, call "
            f"{fault.call}: {fault.lost_steps} steps lost, {said}  ({fault.seconds:.0f} s; {left / 60:.0f} min left)",
            flush=True,
        )
    if options.folder is None and not any(fault["problems"] for fault in done.values()):
        shutil.rmtree(folder)
    return int(any(done[number]["problems"] for number in wanted))


if __name__ == "__main__":
    sys.exit(main())
