"""What finished runs logged, read from their folders: metrics.jsonl and run.json, as training leaves them.

A run that differs from others only in its seed has a name that ends in the seed: NAME_s0, NAME_s1, ... They make one
group, and tables and pictures show its means. The dense run of a folder is what the others are compared with.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from configs.errors import ConfigError

# Marker, line and name of the two validations.
VALIDATIONS = {
    "val_loss": ("o", "-", "validation, dense"),
    "val_loss_sparse": ("D", "--", "validation, with the pattern"),
    "val_loss_quantised": ("s", ":", "validation, rounded weights"),
}

# What a run logs of its sparse FFNs, in all and by layer (layers/N/...), with a picture's words for it.
HEALTH = {
    "nonzero_share": "non-zero entries of h, before the cut",
    "energy_kept": "share of h² that the pattern keeps",
    "flip_rate": "share of the 2:4 mask flipped",
    "router_balance": "use of the clusters, 1 is even",
}


@dataclass
class Run:
    """What one run logged, its lines in the order of their steps."""

    name: str
    model: str  # as `model_name` has it
    recipe: str
    folder: Path
    lines: list[dict[str, Any]]
    unigram_entropy: float | None = None  # of the validation text, nats a token
    on_cpu: bool = False
    keep: float | None = None  # the recipe's share of the groups, for phases without one of their own

    def values(self, key: str) -> np.ndarray:
        """The value of a key in every line; NaN where it is missing, null or not finite. float [lines]"""
        numbers = [line.get(key) for line in self.lines]
        array = np.array([x if isinstance(x, int | float) else math.nan for x in numbers], dtype=float)
        return np.where(np.isfinite(array), array, math.nan)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens seen at every line; interpolated where a line lacks them. float [lines]"""
        tokens, steps = self.values("tokens"), self.values("step")
        known = np.isfinite(tokens)
        return np.where(known, tokens, np.interp(steps, steps[known], tokens[known])) if known.any() else tokens

    @cached_property
    def seconds(self) -> np.ndarray:
        """Training time up to every line, in seconds; NaN if a line lacks its tokens or its rate. float [lines]

        Start-up and validation are not counted. Lines in which graphs were compiled (the first of a phase, and of a run
        that resumes) count at the median rate of the other lines of their phase. The time to enter a phase is added.
        """
        switch = np.zeros(len(self.lines))
        rates, index = self.values("tokens_per_second"), self.phase_index
        compiles = np.nan_to_num(self.values("graphs_compiled")) > 0
        for phase in range(index[-1] + 1):
            (inside,) = np.nonzero(index == phase)
            compiles[inside[0]] = True
            others = inside[~compiles[inside]]
            if len(others):
                rates[inside[compiles[inside]]] = np.median(rates[others])
                switch[inside[0]] = np.nan_to_num(self.values("switch_seconds")[inside[0]])
        return np.cumsum(np.diff(self.tokens, prepend=0.0) / rates + switch)

    def reaches(self, loss: float) -> float | None:
        """Training time in seconds until a validation (dense inference) first had this loss; None if none had it."""
        at = self.seconds[self.values("val_loss") <= loss]
        return float(at[0]) if len(at) else None

    def rate(self, mode: str) -> float | None:
        """Median tokens a second in the phases of a mode, without the lines in which graphs are compiled."""
        rates, later = self.values("tokens_per_second"), np.diff(self.phase_index, prepend=-1) == 0
        chosen = rates[later & (self.phases == mode)]
        return float(np.median(chosen)) if len(chosen) else None

    def last(self, key: str) -> float:
        """The last value that was logged for a key; NaN if there is none."""
        values = self.values(key)
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else math.nan

    @cached_property
    def phases(self) -> np.ndarray:
        """The mode at every line; a line without one has that of the line before. str [lines]"""
        phases: list[str] = []
        for line in self.lines:
            phases.append(str(line.get("phase") or (phases[-1] if phases else "dense")))
        return np.array(phases)

    @cached_property
    def phase_index(self) -> np.ndarray:
        """Number of changes of phase up to every line: of its mode, or of the share that it keeps. int [lines]"""
        kinds = list(zip(self.phases, (line.get("keep") for line in self.lines), strict=True))
        return np.cumsum([0] + [a != b for a, b in itertools.pairwise(kinds)])

    def spans(self, x: np.ndarray) -> list[tuple[str, float, float]]:
        """(mode, start, end) of every phase on the axis x; a phase starts at the last line of the one before."""
        index = self.phase_index
        last = [int(np.flatnonzero(index == i)[-1]) for i in range(index[-1] + 1)]
        starts = [0.0] + [float(x[i]) for i in last[:-1]]
        return [(str(self.phases[i]), start, float(x[i])) for i, start in zip(last, starts, strict=True)]

    @property
    def shares(self) -> list[float | None]:
        """The share of the groups that every phase keeps, in the order of `spans`; None: it is dense, or not known."""
        own, first = self.values("keep"), np.flatnonzero(np.diff(self.phase_index, prepend=-1))
        shares = [float(own[i]) if np.isfinite(own[i]) else self.keep for i in first]
        return [share if self.phases[i] == "sparse" else None for i, share in zip(first, shares, strict=True)]

    def layers(self, metric: str) -> list[int]:
        """The layers that log this metric, by depth."""
        keys = {key for line in self.lines for key in line}
        matches = (re.fullmatch(rf"layers/(\d+)/{metric}", key) for key in keys)
        return sorted(int(match.group(1)) for match in matches if match and self.has(match.group(0)))

    def has(self, key: str) -> bool:
        return bool(np.isfinite(self.values(key)).any())


# By name without seed: runs that differ in their seeds alone, each with its run.json.
Groups = dict[str, list[tuple[Run, dict[str, Any]]]]


def load_run(path: Path) -> Run:
    """Read a dump folder, or the metrics.jsonl in one."""
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"{path}: no such folder or file; give the dump folder (job.dump_folder) of a run")
    if not metrics.exists():
        raise ConfigError(f"{path}: no metrics.jsonl in this folder; give the dump folder (job.dump_folder) of a run")
    folder = metrics.parent
    lines = read_lines(metrics)
    about = read_about(folder / "run.json")
    return Run(
        name=folder.resolve().name,
        model=model_name(about),
        recipe=Path(str(about.get("config", {}).get("recipe") or "")).stem,
        folder=folder,
        lines=lines,
        unigram_entropy=about.get("unigram_entropy"),
        on_cpu=on_cpu(about),
        keep=recipe_share(about),
    )


def model_name(about: dict[str, Any]) -> str:
    """What a run.json says about its model: "llama_relu2, 12.1 M parameters"; empty where it says nothing.

    A flavor, such as "160m", is named only where no key of [model] changes its shape.
    """
    section = about.get("config", {}).get("model")
    model = section if isinstance(section, dict) else {}
    reshaped = any(model.get(key) is not None for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim"))
    parts = [" ".join(str(model[key]) for key in ("name", "flavor")[: 2 - reshaped] if model.get(key))]
    if number := about.get("parameters"):
        parts.append(f"{number / 1e9:.3g} B parameters" if number >= 1e9 else f"{number / 1e6:.3g} M parameters")
    return ", ".join(part for part in parts if part)


def recipe_share(about: dict[str, Any]) -> float | None:
    """activations.keep, from a run.json of a recipe that reads it."""
    section = about.get("config", {}).get("activations")
    activations = section if isinstance(section, dict) else {}
    keep = activations.get("keep") if activations.get("pattern") == "groups" else None
    return keep if isinstance(keep, int | float) else None


def split_paths(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """Paths of runs, and others that a shell's `*` brings along: files beside the runs, folders without metrics.jsonl.

    A path that is alone, or not there, counts as one of a run: `load_run` says what is wrong with it.
    """

    def is_run(path: Path) -> bool:
        return not path.exists() or (path / "metrics.jsonl").exists() or path.suffix == ".jsonl"

    runs = [path for path in paths if is_run(path)]
    return (runs, [path for path in paths if not is_run(path)]) if runs else (paths, [])


def load_runs(paths: list[Path]) -> list[Run]:
    """The runs, by their folder's name; where several share it, as in outputs/a/run and outputs/b/run, by one more."""
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl.

    A last line without its newline belongs to a run that was killed, or is, while writing it: left out unless complete.
    A resumed run logs the steps since its checkpoint again, and what it wrote last counts.
    """
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = line["step"] if isinstance(line, dict) else None
            if isinstance(step, bool) or not isinstance(step, int):
                raise ValueError("not an object with a whole number `step`")
        except (ValueError, KeyError) as error:
            if number == len(raw):
                break
            reason = "no `step`" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"{path}, line {number}: not a line of metrics ({reason}); delete or mend that line"
            ) from None
        while lines and lines[-1]["step"] >= step:
            lines.pop()
        lines.append(line)
    if not lines:
        raise ConfigError(f"{path}: holds no logged step; wait for the run's first one (metrics.log_freq)")
    if not any(isinstance(line.get("loss"), int | float) and math.isfinite(line["loss"]) for line in lines):
        raise ConfigError(f"{path}: no line holds a finite loss; give the metrics.jsonl of a training run")
    return lines


def read_about(path: Path) -> dict[str, Any]:
    """A run.json; empty where there is none, and the plot then names only the folder."""
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_bytes())
        if not isinstance(about, dict) or not isinstance(about.get("config", {}), dict):
            raise ValueError("no table of a run's configuration")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a run.json ({error}); mend it, or delete it to plot without names") from None
    return about


def without_seed(name: str) -> str:
    """A run's name without the ending that says its seed."""
    return re.sub(r"_s\d+$", "", name)


def load_groups(folder: Path) -> tuple[Groups, str | None]:
    """Read all runs of a folder.

    Returns:
        by name without seed, the runs and their run.json; and the name of the baseline, None if there is none: the
        only group that is dense throughout, or of several the one called dense.
    """
    groups: Groups = {}
    for file in sorted(folder.glob("*/run.json")):
        pair = load_run(file.parent), json.loads(file.read_text())
        groups.setdefault(without_seed(file.parent.name), []).append(pair)
    dense = [name for name, group in groups.items() if all(mode == "dense" for mode, *_ in group[0][1]["phases"])]
    return groups, "dense" if "dense" in dense else dense[0] if len(dense) == 1 else None


def baseline_losses(groups: Groups, baseline: str) -> dict[str, float]:
    """For each group the baseline's mean final loss, over the group's seeds; over all seeds if it lacks one of them."""
    seeds = {name: {seed_of(about) for _, about in group} for name, group in groups.items()}
    of = {seed_of(about): run.last("val_loss") for run, about in groups[baseline]}
    return {name: mean(of[seed] for seed in (own if own <= of.keys() else of)) for name, own in seeds.items()}


def sparse_share(about: dict[str, Any]) -> float:
    """Share of a run's steps that are sparse."""
    phases = about["phases"]
    return sum(stop - start + 1 for mode, start, stop in phases if mode == "sparse") / phases[-1][2]


def flops_share(about: dict[str, Any], kind: str) -> float:
    """FLOPs of all steps over those of the dense model.

    Args:
        about: the run's run.json.
        kind: of a sparse step's FLOPs: "sparse_executed", or "sparse_pattern" for those that the pattern leaves.
    """
    flops = about["flops_per_token"]
    return 1 - sparse_share(about) * (1 - flops[kind] / flops["dense"])


def on_cpu(about: dict[str, Any]) -> bool:
    """Whether a run was made on a CPU: sparse phases run on the reference there, so times compare no recipes."""
    return about.get("hardware", {}).get("device") == "CPU"


def is_timed(about: dict[str, Any]) -> bool:
    """Whether a run's time may be compared with another's: it was made on a GPU, which it shared with no other run."""
    return about.get("runs_per_gpu") == 1 and not on_cpu(about)


def mean_step(dense: float, sparse: float, share: float) -> float:
    """The mean time of a run's steps, of which `share` are sparse; or of one step, of whose layers `share` are sparse.

    Args:
        dense, sparse: times of a step, in one unit.
    """
    return (1 - share) * dense + share * sparse


def seed_of(about: dict[str, Any]) -> int:
    """debug.seed, from a run.json."""
    return about["config"]["debug"]["seed"]


def rounded(value: float, digits: int = 3) -> str:
    """`amount` of a value rounded to so many digits."""
    return amount(float(f"{value:.{digits}g}"))


def amount(value: float, _position: int | None = None) -> str:
    """1500000 as 1.5M, 0.00025 as 2.5e-4."""
    for unit, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{sign}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
