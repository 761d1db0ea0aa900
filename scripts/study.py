"""Run a study: a list of runs in one TOML file, whose results are stored beside it.

    python -m scripts.study docs/studies/smoke/study.toml
    python -m scripts.study docs/studies/recipes_160m --limit-minutes 50 --only start_s0 groups_eighth

A study asks one question. Its file and its results are in one folder of docs/, from which the pages take their tables
(scripts/report.py). The file gives the keys that all runs share, and then each run. Keys are those of train.py's
command line; a run's own key overrides the shared one:

    config = "configs/160m.toml"
    training.steps = 1000
    plot = ["dense", "tail_40"]           # runs whose curves loss.png shows; default: all

    [[runs]]
    name = "dense"
    recipe = "recipes/dense.toml"
    seeds = [0, 1, 2]                     # values of debug.seed, one run for each; default: [0]

    [[runs]]
    name = "tail_40"
    recipe = "recipes/groups_quarter.toml"
    schedule.phases = [{ mode = "dense", end = 0.1 }, { mode = "sparse", end = 0.6 }, { mode = "dense", end = 1.0 }]

A run can continue from a checkpoint of another run, so that both share their first steps. (GPU reductions are not
deterministic, so two separate runs of one seed differ from the first steps on.) It continues the run of the same seed,
with its data order, optimizer and metrics, and starts once that checkpoint has been saved:

    after = "dense/step-500"              # the run of that name must save this step: checkpoint.interval

A run that others continue from keeps all its checkpoints. If it is shorter than they are, it only provides their
beginning: it is not a result, is left out of the tables, and is run again only if a checkpoint is needed.

All runs and their data are checked before the first one starts. A run is a process of train.py with its own folder in
`outputs/studies/NAME`, which also has its log. Running the command again skips complete runs and resumes interrupted
ones (from the start if checkpoint.enable = false). A run is complete if it logged its last step and, if it saves
checkpoints, saved that step. The values of its metrics.jsonl and run.json that tables and pictures need
(scripts/thin.py) are then stored in the study's folder; a run stored there counts as complete on any machine.

The seed determines the initial weights. All runs read the same documents in the same order (data.seed): another order
would train another tokenizer, and losses with different tokenizers are not comparable.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:  # started as `python scripts/study.py`: look imports up from the repository, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from matplotlib import rc_context

from configs.errors import ConfigError, TooLargeError, run_program
from configs.loader import as_word, load_config, resolved
from configs.repository import ROOT
from configs.schema import JobConfig
from recipes.check import check_config, recorded_dtype
from recipes.checkpoint import MANIFEST, POINTER
from recipes.data import check_data
from scripts.options import TERMS, Parser, add_out
from scripts.pictures import STYLE, draw_behind, draw_front, draw_reached, plot, run_colours, save
from scripts.runs import (
    Groups,
    Run,
    baseline_losses,
    flops_share,
    is_timed,
    load_groups,
    on_cpu,
    read_lines,
    seed_of,
    without_seed,
)
from scripts.tables import runs_table
from scripts.thin import INDIFFERENT, store

TIME = r"^\d\d:\d\d:\d\d "  # that lines of a run's log begin with
PROGRESS_SECONDS = 30.0
# Removed from the environment of the runs: each is a single process, even if torchrun or SLURM started the study.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class StudyRun:
    """One run of a study."""

    name: str
    """The run's name in the file and its seed: dense_s0."""

    config: JobConfig
    command: list[str]
    outputs: Path
    """The run's dump folder."""

    results: Path
    """Its folder beside the study's file."""

    after: Path | None = None
    """The checkpoint of another run from which this one continues: `checkpoint/step-N` in the other's outputs."""

    only_begins: bool = False
    """Whether the run only provides the beginning of longer runs that continue from it."""

    def goes_on_from(self, other: "StudyRun") -> bool:
        return self.after is not None and other.outputs in self.after.parents

    def is_ready(self) -> bool:
        """Whether the checkpoint that it starts from has been saved."""
        return self.after is None or self._begun().exists() or (self.after / MANIFEST).exists()

    def _begun(self) -> Path:
        return self.outputs / self.config.checkpoint.folder / POINTER

    def branch(self) -> None:
        """Copy the checkpoint that the run continues from into its folder, unless the run has begun."""
        if self.after is None or self._begun().exists():
            return
        folder = self._begun().parent
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.after, folder / self.after.name)
        rows = read_lines(self.after.parent.parent / "metrics.jsonl")
        kept = [row for row in rows if row["step"] <= int(self.after.name.removeprefix("step-"))]
        (self.outputs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._begun().write_text(self.after.name)


@dataclass
class Study:
    file: Path
    runs: list[StudyRun]
    plot: list[str]
    """Names of runs, as in the file."""


def read_study(file: Path, outputs: Path | None = None) -> Study:
    """Read a study and check each run as train.py would, except for its data, which may be on another machine.

    Args:
        file: the study's TOML file.
        outputs: folder of the runs' dump folders; None: `outputs/studies/NAME`, NAME being the study's folder.

    Raises:
        ConfigError: an unreadable file, an unknown key or a wrong value; the message names the run.
    """
    if file.is_dir():
        file = file / "study.toml"
    try:
        shared = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        found = ", ".join(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/studies/*/study.toml")))
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); there are {found}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    tables, shown = shared.pop("runs", []), shared.pop("plot", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{file}: runs = {json.dumps(tables, default=str)}: give at least one [[runs]] table")
    outputs = outputs or Path("outputs/studies") / file.resolve().parent.name
    names: list[str] = []
    runs: list[StudyRun] = []
    for place, table in enumerate(tables):
        name, seeds, after = table.pop("name", None), table.pop("seeds", [0]), table.pop("after", None)
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*[\w-]", name) or without_seed(name) != name:
            raise ConfigError(
                f"{file}: runs[{place}].name = {json.dumps(name, default=str)}: give letters, digits, _, - and ., "
                "without an ending such as _s0, which says the seed"
            )
        if name in names:
            raise ConfigError(f'{file}: runs[{place}].name = "{name}" is the name of another run: give it its own')
        if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
            raise ConfigError(
                f"{file}: seeds = {json.dumps(seeds, default=str)} of run {name}: give a list such as [0]"
            )
        names.append(name)
        options = _options(shared) | _options(table)
        for key, instead in (("debug.seed", "seeds"), ("job.dump_folder", "--out")):
            if key in options:
                raise ConfigError(f"{file}: run {name}: {key} is the study's to set: use {instead} instead")
        for seed in sorted(set(seeds)):
            full = f"{name}_s{seed}"
            options |= {"debug.seed": str(seed), "job.dump_folder": str(outputs / full)}
            command = [f"--{key}={word}" for key, word in options.items()]
            try:
                config, _ = load_config(command)
                if config.training.mixed_precision_param == "auto":  # results that are there keep theirs on any machine
                    config.training.mixed_precision_param = recorded_dtype(file.parent / full / "run.json") or "auto"
                check_config(config)
            except ConfigError as error:
                raise ConfigError(f"{file}: run {name}: {error}") from None
            if not config.validation.enable:
                raise ConfigError(
                    f"{file}: run {name}: a study compares validation losses: set validation.enable = true"
                )
            before = None if after is None else _find_before(f"{file}: run {name}", after, seed, runs, config)
            runs.append(StudyRun(full, config, command, outputs / full, file.parent / full, before))
    for run in runs:
        following = [other for other in runs if other.goes_on_from(run)]
        run.only_begins = any(other.config.training.steps > run.config.training.steps for other in following)
        if following:  # they may start when it has ended, and, by --only, later ones from any of its checkpoints
            run.config.checkpoint.keep_latest_k = 0
            kept = "--checkpoint.keep_latest_k="
            run.command = [*(word for word in run.command if not word.startswith(kept)), f"{kept}0"]
    if shown is not None and not (isinstance(shown, list) and all(isinstance(name, str) for name in shown)):
        raise ConfigError(f"{file}: plot = {json.dumps(shown, default=str)}: give names of runs, such as {names[:2]}")
    if unknown := set(shown or []) - set(names):
        raise ConfigError(
            f"{file}: plot names no run {', '.join(sorted(map(str, unknown)))}: there are {', '.join(names)}"
        )
    return Study(file, runs, shown or names)


def check_corpora(study: Study, runs: list[StudyRun]) -> None:
    """Check that the data of the runs is on this machine.

    Raises:
        ConfigError: data that is missing or too little; the message names the run.
    """
    for run in runs:
        try:
            check_data(run.config)
        except ConfigError as error:
            raise ConfigError(f"{study.file}: run {run.name}: {error}") from None


def _find_before(where: str, after: Any, seed: int, runs: list[StudyRun], config: JobConfig) -> Path:
    """The folder of the checkpoint that `after` names.

    Raises:
        ConfigError: `after` names no earlier run of this seed, or a step at which that run saves no checkpoint.
    """
    parts = re.fullmatch(r"([\w.-]+)/step-(\d+)", after) if isinstance(after, str) else None
    if parts is None:
        raise ConfigError(f'{where}: after = {json.dumps(after, default=str)}: give a run and a step: "dense/step-500"')
    of = next((run for run in runs if run.name == f"{parts[1]}_s{seed}"), None)
    if of is None:
        raise ConfigError(f'{where}: after = "{after}": no run {parts[1]} of seed {seed} stands before it in the file')
    step, saves = int(parts[2]), of.config.checkpoint
    steps = min(config.training.steps, of.config.training.steps)
    if not saves.enable or not config.checkpoint.enable or step % saves.interval or not 0 < step < steps:
        every = f"every {saves.interval} steps" if saves.enable else "never"
        raise ConfigError(
            f'{where}: after = "{after}": {of.name} saves a checkpoint {every} (checkpoint.interval): name one of '
            f"those, before step {steps}"
        )
    return of.outputs / saves.folder / f"step-{step}"


def _options(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables to the words of a command line: {"training": {"steps": 10}} to {"training.steps": "10"}."""
    options: dict[str, str] = {}
    for key, value in table.items():
        options |= _options(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": as_word(value)}
    return options


def waves(runs: list[StudyRun], chosen: list[StudyRun]) -> list[list[int]]:
    """Positions of the chosen runs in the study, in waves. The runs of a wave continue from runs of earlier waves.

    All runs of a wave can run at the same time.
    """
    depths: list[int] = []
    for run in runs:  # a run is listed after the run that it continues from
        before = (place for place in range(len(depths)) if run.goes_on_from(runs[place]))
        depths.append(max((depths[place] + 1 for place in before), default=0))
    places = [place for place, run in enumerate(runs) if run in chosen]
    return [
        [place for place in places if depths[place] == depth] for depth in sorted({depths[place] for place in places})
    ]


def is_complete(run: StudyRun, folder: Path) -> bool:
    """Whether a folder, the run's outputs or its results, holds the complete run.

    Raises:
        ConfigError: the folder holds a run with another configuration.
    """
    try:
        about = json.loads((folder / "run.json").read_bytes())
        lines = read_lines(folder / "metrics.jsonl")
    except (OSError, ValueError, ConfigError):
        return False
    new, default, old = (_options(values) for values in (resolved(run.config), resolved(JobConfig()), about["config"]))
    for key, word in new.items():
        if not key.startswith(("recipe", *INDIFFERENT)) and old.get(key, default[key]) != word:
            raise ConfigError(
                f"{folder} holds a run with {key} = {old.get(key, default[key])}, and the study says {word}: give the "
                "run another name, or move that folder away to run it anew"
            )
    steps, checkpoint = run.config.training.steps, run.config.checkpoint
    if folder == run.outputs and checkpoint.enable:
        pointer = folder / checkpoint.folder / "latest"
        if not pointer.exists() or pointer.read_text().strip() != f"step-{steps}":
            return False
    return lines[-1]["step"] == steps


def collect(run: StudyRun) -> None:
    """Store what tables and pictures read of a complete run beside the study's file."""
    launch = run.outputs / "launch.json"
    store(run.outputs, run.results, json.loads(launch.read_bytes()) if launch.exists() else {})


class Launcher:
    """Runs processes of train.py, several at a time.

    Args:
        jobs: runs at a time, at least 1. A GPU whose runs do not fit into its memory together gets fewer.
        gpus: the GPUs, used in turn; empty on a machine without one.
        deadline: in the clock of time.monotonic(); then running runs are stopped and no other starts.
    """

    def __init__(self, jobs: int, gpus: list[str], deadline: float):
        self.free = [gpus[job % len(gpus)] if gpus else "" for job in range(jobs)]
        self.runs_per_gpu = math.ceil(jobs / max(1, len(gpus)))
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.deadline = deadline
        self.signal = 0  # the last one that came
        self.stopped = False
        self.running: dict[str, tuple[StudyRun, subprocess.Popen, str, float]] = {}
        self.sharing: set[str] = set()  # runs that were started on a GPU with more than one place
        self.failed: dict[str, str] = {}  # by a run's name, why or what says it
        self.interrupted: list[StudyRun] = []

    def run(self, todo: list[StudyRun]) -> None:
        """Run them all, or as many as time allows."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = [signal.signal(number, self._take_note) for number in numbers]
        total, todo, spoke = len(todo), list(todo), time.monotonic()
        while (todo and not self.stopped) or self.running:
            while self.free and not self.stopped and (ready := next((run for run in todo if run.is_ready()), None)):
                todo.remove(ready)
                self._start(ready)
            if todo and not self.running:
                break  # the rest continue from runs that failed
            time.sleep(0.2)
            for run, process, gpu, began in list(self.running.values()):
                if process.poll() is not None:
                    del self.running[run.name]
                    if run.name in self.sharing and process.returncode == TooLargeError.status:
                        say(f"{run.name} does not fit beside the others on GPU {gpu}: it waits, one fewer runs there")
                        todo.insert(0, run)
                        if self._places(gpu):
                            continue
                    else:
                        self._end(run, process.returncode, time.monotonic() - began)
                    self.free.append(gpu)
            if self.signal or time.monotonic() > self.deadline:
                self._stop(signal.Signals(self.signal).name if self.signal else "the time limit")
            if self.running and time.monotonic() - spoke >= PROGRESS_SECONDS:
                spoke = time.monotonic()
                where = "; ".join(_progress(run) for run, *_ in self.running.values())
                say(f"{total - len(todo) - len(self.running)} of {total} ended, {len(self.running)} running: {where}")
        self.interrupted += todo
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: Any) -> None:
        self.signal = number

    def _stop(self, reason: str) -> None:
        """Start no more runs, and let running ones save and end; a run before its first step is ended at once."""
        if self.stopped:
            return
        self.stopped = True
        say(f"{reason}: {len(self.running)} running are told to save and end, nothing more starts")
        for run, process, _, began in self.running.values():
            metrics = run.outputs / "metrics.jsonl"
            stepped = metrics.exists() and metrics.stat().st_mtime > time.time() - (time.monotonic() - began)
            process.send_signal(signal.SIGTERM if stepped else signal.SIGKILL)

    def _start(self, run: StudyRun) -> None:
        try:
            run.outputs.mkdir(parents=True, exist_ok=True)
            run.branch()
        except (OSError, ConfigError) as error:  # such as a full disk; other runs go on
            self.failed[run.name] = f"it cannot start: {error}"
            return
        launch = run.outputs / "launch.json"
        before = json.loads(launch.read_bytes())["runs_per_gpu"] if launch.exists() else 1
        launch.write_text(json.dumps({"runs_per_gpu": max(before, self.runs_per_gpu)}) + "\n")
        own = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment = {"OMP_NUM_THREADS": str(self.threads)} | own
        if gpu := self.free.pop(0):
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        self.sharing.discard(run.name)
        if self._places(gpu):
            self.sharing.add(run.name)
        with (run.outputs / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "train.py", *run.command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the study alone, which passes it on
            )
        say(f"{run.name} starts" + (f" on GPU {gpu}" if gpu else ""))
        self.running[run.name] = (run, process, gpu, time.monotonic())

    def _places(self, gpu: str) -> int:
        """Number of runs that are running or may start on a GPU."""
        return self.free.count(gpu) + sum(gpu == other for _, _, other, _ in self.running.values())

    def _end(self, run: StudyRun, status: int, seconds: float) -> None:
        if status == 0 and is_complete(run, run.outputs):
            if not run.only_begins:
                collect(run)
            say(f"{run.name} is complete, {seconds / 60:.1f} min, {_progress(run)}")
        elif status == 0 or (self.stopped and status in (-signal.SIGTERM, -signal.SIGKILL)):
            self.interrupted.append(run)
            say(f"{run.name} is interrupted: {_progress(run)}")
        else:
            self.failed[run.name] = f"see {run.outputs / 'log.txt'}"
            say(f"{run.name} failed with status {status}, log in {run.outputs / 'log.txt'}:")
            for line in _last_lines(run, 3):
                print(f"    {line}", flush=True)


def _last_lines(run: StudyRun, count: int) -> list[str]:
    """The last lines of a run's log."""
    return (run.outputs / "log.txt").read_text(errors="replace").splitlines()[-count:]


def _progress(run: StudyRun) -> str:
    """A run's progress: the last step and loss that it logged; before the first step the last line of its log."""
    try:
        line = read_lines(run.outputs / "metrics.jsonl")[-1]
    except ConfigError:
        said = "".join(_last_lines(run, 1) if (run.outputs / "log.txt").exists() else [])
        said = textwrap.shorten(re.sub(TIME, "", said), 80, placeholder=" ...")
        return f"{run.name} before its first step" + (f" ({said})" if said else "")
    loss = f"validation {line['val_loss']:.4f}" if "val_loss" in line else f"loss {line['loss']:.4f}"
    return f"{run.name} step {line['step']}/{run.config.training.steps} {loss}"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def draw(study: Study) -> None:
    """Print the table of the complete runs and draw their pictures."""
    folder = study.file.parent
    if not any((run.results / "run.json").exists() for run in study.runs):
        return
    print("\n" + runs_table(folder, pad=True) + "\n")
    groups, baseline = load_groups(folder)
    firsts = {name: groups[name][0] for name in study.plot if name in groups}
    paths, abouts = [run.folder for run, _ in firsts.values()], [about for _, about in firsts.values()]
    if paths:
        print(plot(paths, folder / "loss.png"))
    if paths and all(map(is_timed, abouts)):
        print(plot(paths, folder / "loss_time.png", against="time"))
    else:
        why = "the runs were made on a CPU" if any(map(on_cpu, abouts)) else "the runs shared a GPU (--jobs)"
        print(f"loss against time is not drawn: {why}")
        for name in ("loss_time.png", "reached.png"):  # of an earlier call
            (folder / name).unlink(missing_ok=True)
    if baseline is None:
        return
    with rc_context(STYLE):
        reached(folder, groups, baseline, study.plot)
        if sparse := {name: run for name, (run, _) in firsts.items() if name != baseline}:
            print(save(draw_behind(sparse, groups[baseline][0][0]), folder / "behind.png", [folder]))
        if len(groups) > 1:
            front(folder, groups, baseline, study.plot)


def reached(folder: Path, groups: Groups, baseline: str, shown: list[str]) -> None:
    """Draw when runs that had a GPU to themselves reached the final loss of the dense run of the same seed."""
    seeds: dict[int, dict[str, Run]] = {}
    for name in shown:
        for run, about in groups.get(name, []):
            if is_timed(about):
                seeds.setdefault(seed_of(about), {})[name] = run
    named = {f"seed {seed}": runs for seed, runs in sorted(seeds.items()) if baseline in runs and len(runs) > 1}
    if named:
        print(save(draw_reached(named, baseline), folder / "reached.png", [folder]))


def front(folder: Path, groups: Groups, baseline: str, shown: list[str]) -> None:
    """Draw final losses against the cost relative to dense: training time or, if runs shared a GPU or had none, FLOPs.

    FLOPs are those executed or, if a run did not record them or was made on a CPU, those that the pattern requires.
    Points of the runs in `shown` are labelled.
    """
    abouts = [about for group in groups.values() for _, about in group]
    timed, cpu = all(map(is_timed, abouts)), any(map(on_cpu, abouts))
    executed = not cpu and all("sparse_executed" in about["flops_per_token"] for about in abouts)
    kind = "sparse_executed" if executed else "sparse_pattern"
    costs = {
        name: mean(float(run.seconds[-1]) if timed else flops_share(about, kind) for run, about in group)
        for name, group in groups.items()
    }
    losses = {name: [run.last("val_loss") for run, _ in group] for name, group in groups.items()}
    # Losses are relative to the baseline's mean over the same seeds, plus its mean over all seeds.
    peers, level = baseline_losses(groups, baseline), mean(losses[baseline])
    points = {name: (cost / costs[baseline], mean(losses[name]) - peers[name] + level) for name, cost in costs.items()}
    deviation = stdev(losses[baseline]) if len(losses[baseline]) > 1 else None
    label = "training time" if timed else "FLOPs executed" if executed else "FLOPs that the pattern requires"
    note = "\nruns on a CPU, which has no sparse kernels: times are not compared" if cpu else ""
    names = [name for name in shown if name in points]
    recipes = {name: groups[name][0][0].recipe for name in names}
    colours = dict(zip(recipes, run_colours(recipes.items()), strict=True))
    label, model = f"{label}, over that of {baseline}{note}", groups[baseline][0][0].model
    figure = draw_front(points, baseline, deviation, label, names, colours, model)
    print(save(figure, folder / "front.png", [folder]))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scripts.study",
        description="Run a study, collect its results, print its table, draw it.",
        epilog=TERMS,
    )
    parser.add_argument("study", metavar="STUDY.toml", type=Path, help="the study's file, or its folder")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="run only these runs: dense (all seeds), or dense_s0")
    parser.add_argument("--place", metavar="P", type=int, help="run only the run in this place among all, from 0")
    parser.add_argument("--gpus", metavar="I,J", help="GPUs to use; default: all visible ones; each run uses one")
    parser.add_argument(
        "--jobs", metavar="N", type=int, help="runs at once, fewer if GPU memory is short; default: one per GPU"
    )
    parser.add_argument(
        "--limit-minutes", metavar="M", type=float, help="after M minutes runs save and end, and no other starts"
    )
    add_out(parser, "FOLDER", "where the runs write; default: outputs/studies/NAME", former="--outputs")
    parser.add_argument("--list", action="store_true", help="only print the names of the runs, one per line")
    parser.add_argument(
        "--waves",
        action="store_true",
        help="only print positions of runs that can run at once; the runs of a line continue from earlier lines",
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    visible = (
        options.gpus or os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    )
    gpus = [gpu for gpu in visible.split(",") if gpu]
    jobs = options.jobs if options.jobs is not None else max(1, len(gpus))
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give 1 or more runs at once")
    if options.limit_minutes is not None and not options.limit_minutes > 0:  # nan is not
        raise ConfigError(f"--limit-minutes {options.limit_minutes:g}: give more than 0")

    study = read_study(options.study, options.out)
    chosen = study.runs
    if options.only:
        names = {run.name: {run.name, without_seed(run.name)} for run in study.runs}
        if unknown := set(options.only) - set().union(*names.values()):
            raise ConfigError(
                f"--only {' '.join(sorted(unknown))}: no such run in {study.file}; there are {', '.join(names)}"
            )
        chosen = [run for run in study.runs if names[run.name] & set(options.only)]
    if options.place is not None:
        if not 0 <= options.place < len(study.runs):
            raise ConfigError(f"--place {options.place}: {study.file} has runs in places 0 to {len(study.runs) - 1}")
        at_place = study.runs[options.place]
        if at_place not in chosen:
            raise ConfigError(
                f"--place {options.place} is {at_place.name}, which --only leaves out: places count all runs"
            )
        chosen = [at_place]
    if options.list:
        print("\n".join(run.name for run in chosen))
        return 0
    if options.waves:
        print("\n".join(",".join(map(str, wave)) for wave in waves(study.runs, chosen)))
        return 0
    todo: list[StudyRun] = []
    for run in reversed(chosen):  # runs are listed after the runs that they continue from
        if run.only_begins:
            following = [other for other in chosen if other.goes_on_from(run)]
            waiting = any(other in todo and not other.is_ready() for other in following)
            if waiting or (not following and not is_complete(run, run.outputs)):
                todo.insert(0, run)
        elif not is_complete(run, run.results):
            if is_complete(run, run.outputs):
                collect(run)
            else:
                todo.insert(0, run)
    for run in todo:
        if run.only_begins and is_complete(run, run.outputs):  # it would go on from its end, and save nothing
            lost = next(other for other in todo if other.goes_on_from(run) and not other.is_ready())
            raise ConfigError(
                f"{lost.name} goes on from {lost.after}, which the complete run {run.name} no longer has: move "
                f"{run.outputs} away to run it anew"
            )
        before = run.after and run.after.parent.parent
        if before and not run.is_ready() and before not in (other.outputs for other in todo):
            raise ConfigError(
                f"{run.name} goes on from {run.after}, which is not there: run {before.name} as well "
                "(--only), or, if its results are here already, move those away"
            )
    check_corpora(study, todo)
    say(
        f"{study.file}: {len(chosen)} run{'s' * (len(chosen) != 1)}, {len(chosen) - len(todo)} complete, "
        f"{len(todo)} to run, {jobs} at once on {'GPU ' + ', '.join(gpus) if gpus else 'the CPU'}"
    )
    launcher = Launcher(
        min(jobs, max(1, len(todo))), gpus, began + (60 * options.limit_minutes if options.limit_minutes else math.inf)
    )
    launcher.run(todo)
    draw(study)
    if launcher.interrupted:
        left = ", ".join(run.name for run in launcher.interrupted)
        said = f"not complete: {left}; the same command goes on"
        if launcher.signal == signal.SIGINT:
            raise KeyboardInterrupt(said)
        say(said)
    for name, why in launcher.failed.items():
        print(f"error: {name} failed, {why}", file=sys.stderr, flush=True)
    return int(bool(launcher.failed))


if __name__ == "__main__":
    run_program(main)
