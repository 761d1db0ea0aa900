"""Shared by the tests: tiny jobs that train in seconds, in this process, forked ones or under torchrun."""

import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import IO

# Before torch is imported: one thread for each worker of pytest-xdist and each process that a test starts, since the
# workers share the cores, and several threads add in another order now and then.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from configs.repository import ROOT
from scripts.chaos import make_corpus, tiny_job

# As scripts/setup.sh does: else each process that a test starts would compile anew what it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# What imports torch is imported where it is used: the process that hands the tests to the workers starts them sooner.
GPU = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Importing the trainer takes longer than a tiny job: most processes are forked from one that has. CUDA allows no fork.
PROCESSES = multiprocessing.get_context("spawn" if GPU else "forkserver")
PROCESSES.set_forkserver_preload(["train"])
# These files start first, the longest before the others: at the end one of them would leave the other workers idle.
LONGEST = [
    "slurm",
    "chaos",
    "train",
    "parallel",
    "study",
    "export",
    "probe",
    "two_four",
    "shares",
    "kernels",
    "watchdog",
]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_auto_num_workers():
    """With `-n auto`: a GPU is for one test at a time; else one worker more than cores, as some wait, four at most."""
    return 1 if GPU else min(4, 1 + (os.cpu_count() or 1))


def pytest_collectstart():
    """Without a GPU the Triton kernels are tested in its interpreter; it asks for this when it is first imported."""
    import torch

    os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    import torch

    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if torch.cuda.is_available() and "kernels" in item.keywords:
            item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available() and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Later collections of garbage leave out what the imports have made: they take milliseconds."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Show why scripts/test.sh has run a test again: pytest-rerunfailures only counts it."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"{report.nodeid} ran again, because of:")
        terminalreporter.line(report.longreprtext)


@pytest.fixture(autouse=True)
def no_ranks():
    """End what a run in this process has left behind: torchrun's variables and the threads of its process groups.

    A run that a test starts would listen at the old port. Process groups are in reference cycles, and the four threads
    of each wake up a hundred times a second until the cycles are collected.
    """
    if any([os.environ.pop(name, None) for name in RANK_NAMES]):
        gc.collect()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is allocated without a value holds NaN, or -1."""
    import torch

    # `with torch.device(...)` remembers the constructors that it finds first: later tests need the real ones.
    torch.utils._device._device_constructors()

    def poison(allocate):
        def fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else -1)

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small corpus of Python-like text."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> list[str]:
    """Command-line keys that make configs/debug.toml a job of seconds: `tiny_job` of scripts/chaos.py.

    It saves every fourth step, since saving takes longer than training.
    """
    keys = tiny_job(corpus, tmp_path_factory.mktemp("tokenizers")) | {"checkpoint.interval": "4"}
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


@pytest.fixture
def train(tiny):
    """Run a tiny job in this process: `train(folder, *words, stop_after=None)` returns its rows by step.

    With `stop_after` the run dies, as by an exception nobody expects, after that step's checkpoint.
    """
    import torch.distributed as dist

    from configs.loader import load_config
    from recipes.check import check_config
    from recipes.data import check_data
    from recipes.trainer import SparseTrainer
    from recipes.watchdog import Watchdog

    def run(folder: Path, *words: str, recipe: str = "venom_2of16", stop_after: int | None = None) -> dict[int, dict]:
        command = ["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *tiny]
        saves = ["--checkpoint.interval", str(stop_after)] if stop_after else []
        config, _ = load_config(merge(merge(command, saves), [*words, "--job.dump_folder", str(folder)]))
        args, spans = check_config(config)
        check_data(config)
        watchdog = Watchdog(0, 0)
        trainer = SparseTrainer(config, args, spans, watchdog)
        if stop_after is not None:
            original = trainer._enter_phase

            def enter_phase(batches):
                if trainer.step == stop_after + 1:
                    raise KeyboardInterrupt
                original(batches)

            trainer._enter_phase = enter_phase  # type: ignore[method-assign]
        try:
            trainer.train()
        except KeyboardInterrupt:
            pass
        finally:
            trainer.close()
            watchdog.close()
            dist.destroy_process_group()
        return rows(folder)

    return run


@pytest.fixture
def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def sparse_feed_forward(x, w1, w2, pattern=None, w1_scale=None, w2_scale=None, cut_along_tokens=False, **more):
    """`kernels.sparse_feed_forward` with the specification that follows from a pattern and the given scales."""
    import kernels

    products = tuple(n for n, scale in ((1, w1_scale), (3, w2_scale)) if scale is not None)
    sparsity = kernels.FeedForwardSparsity(pattern, products, cut_along_tokens)
    return kernels.sparse_feed_forward(x, w1, w2, sparsity, w1_scale, w2_scale, **more)


def family_named(name, sparsity):
    """The family of that name for a sparsity; "reference": the masked one."""
    from kernels.feed_forward import FAMILIES, MASKED

    families = [*FAMILIES, MASKED]
    return next(family for family in families if family.name == name and family.handles(sparsity))


@pytest.fixture
def write_study(tiny, tmp_path):
    """Write a study of tiny runs: `write_study(runs)` returns its file."""

    def toml(word: str) -> str:
        try:
            tomllib.loads(f"x = {word}")
        except tomllib.TOMLDecodeError:
            return json.dumps(word)
        return word

    def write(runs: str, shared: str = "") -> Path:
        keys = dict(zip((word[2:] for word in tiny[::2]), map(toml, tiny[1::2]), strict=True))
        del keys["schedule.phases"]
        folder = tmp_path / "question"
        folder.mkdir(exist_ok=True)
        file = folder / "study.toml"
        lines = ['config = "configs/debug.toml"', *(f"{key} = {value}" for key, value in keys.items()), shared]
        file.write_text("\n".join(lines) + "\n" + runs)
        return file

    return write


def merge(words: list[str], more: list[str]) -> list[str]:
    """Two lists of `--key value`, the second winning where both have a key."""
    pairs = dict(zip(words[::2], words[1::2], strict=True)) | dict(zip(more[::2], more[1::2], strict=True))
    return [word for pair in pairs.items() for word in pair]


def rows(folder: Path) -> dict[int, dict]:
    """A run's metrics by step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def losses(run: dict[int, dict]) -> dict[int, float]:
    return {step: row["loss"] for step, row in run.items()}


def launch(*words: str, processes: int = 0, timeout: int = 300, **env: str) -> subprocess.CompletedProcess:
    """Run train.py as a user would: under torchrun with so many processes, or plainly with 0."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0"]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    return subprocess.run(
        [*command, "train.py", *words],
        cwd=ROOT,
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fork(
    *words: str,
    program: str = "train",
    processes: int = 0,
    timeout: int = 300,
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> subprocess.CompletedProcess:
    """As `launch`, without the start of Python and torchrun: in a process or, with their variables set, several.

    Each calls `prepare`, a function of a module, before it runs train.py, or another program, such as scripts.plot.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        values = 0, processes, 0, processes, "localhost", probe.getsockname()[1]
    shared = dict(zip(RANK_NAMES, map(str, values), strict=True)) if processes else {}
    shared |= {name: value for name, value in os.environ.items() if name not in RANK_NAMES} | env
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        started = []
        for rank in range(processes or 1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
            started.append(PROCESSES.Process(target=run_train, args=(words, shared | own, outputs, prepare, program)))
            started[-1].start()
        deadline, running = time.monotonic() + timeout, started
        try:
            # Where one fails, the others would wait for it.
            while running and not any(process.exitcode for process in started) and time.monotonic() < deadline:
                connection.wait([process.sentinel for process in running], deadline - time.monotonic())
                running = [process for process in started if process.is_alive()]
            status = next((process.exitcode for process in started if process.exitcode), -bool(running))
        finally:
            for process in started:
                process.kill()
                process.join()
        stdout, stderr = (file.read_text() for file in outputs)
        # No error in Python code ends a process so. scripts/test.sh runs a test with this message once more.
        assert status != -signal.SIGSEGV, f"Segmentation fault in compiled code\n{stdout}{stderr}"
        return subprocess.CompletedProcess(words, status, stdout, stderr)


def run_ranks(
    tiny: list[str],
    folder: Path,
    recipe: str,
    *words: str,
    processes: int = 2,
    prepare: Callable[[], None] | None = None,
    logged: Callable[[str], None] | None = None,
) -> dict[int, dict]:
    """The rows of the tiny job on several processes, which has to succeed; `logged` is called with what it printed."""
    command = merge(tiny, [*words, "--job.dump_folder", str(folder)])
    configuration = ("--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml")
    result = fork(*configuration, *command, processes=processes, prepare=prepare)
    assert result.returncode == 0, result.stdout + result.stderr
    if logged is not None:
        logged(result.stdout)
    return rows(folder)


def go_on_after(step: int, folder: Path, copy: Path) -> Path:
    """A copy of a run's folder as it was after a step."""
    shutil.copytree(folder, copy)
    for saved in (copy / "checkpoint").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    (copy / "checkpoint" / "latest").write_text(f"step-{step}")
    return copy


class Forked:
    """As a subprocess.Popen of train.py or a script that writes into a file, without the start of Python."""

    def __init__(
        self,
        command: list[str],
        *,
        stdout: IO,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
        **others: object,
    ) -> None:
        python, *command = command
        program, *words = ["train", *command[1:]] if command[0] == "train.py" else command[1:]
        assert python == sys.executable and command[0] in ("train.py", "-m")
        prepare = os.setsid if start_new_session else None
        args = (tuple(words), dict(env or os.environ), [Path(stdout.name)] * 2, prepare, program)
        self._process = PROCESSES.Process(target=run_train, args=args)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid or 0, number)


def run_train(
    words: tuple[str, ...],
    environment: dict[str, str],
    outputs: list[Path],
    prepare: Callable[[], None] | None = None,
    program: str = "train",
) -> None:
    """A process of `fork`: a program with its output in files."""
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # whatever started this process, its own are as ever
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [f"{program}.py", *words]
    import torch

    # The stacks of threads of C++ as well, which Python does not know.
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    if prepare is not None:
        prepare()
    runpy.run_module(program, run_name="__main__", alter_sys=True)
