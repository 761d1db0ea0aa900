"""Fit how the loss falls with tokens and parameters, and what a sparse recipe costs of it, in tokens.

    python -m scripts.law docs/evidence.json        # prints the table, writes docs/evidence.png

The dense runs give the law of Hoffmann et al. (arXiv 2203.15556, section 3.3), with N parameters and D tokens:

    L(N, D) = E + A / N^a + B / D^b

Runs of one size cannot tell E from A / N^a: their sum is then one constant. A fit needs three budgets, and one size or
at least three.

A recipe ends `p` nats above the dense run of the same seed, size and budget, its penalty. Dense training would have
reached that loss with fewer tokens. **Effective tokens** are that share of D:

    L(N, share D) = L(N, D) + p        so that        share = (1 + p D^b / B)^(-1/b)

The **iso-loss speed-up** is what a user gains at equal loss: the speed of the whole run times this share. The speed is
that of another, larger model (scripts/benchmark.py), and its penalty is taken to be the one that was measured here.

Intervals are of 90%, by a parametric bootstrap: the mean of the runs of a cell (one name, one budget) is moved by
Student's t times the deviation over seeds, pooled over all cells, and all is fitted anew. They hold what other seeds
would change, and not that another model, text or learning rate may have another law.

The file says which runs count:

    {"dense": [{"study": "docs/studies/A", "run": "dense_900"}, ...],
     "recipes": {"columns_half_fp8": {
         "runs": [{"study": "docs/studies/A", "run": "half", "dense": "dense"}, ...],
         "speeds": {"1B": ["docs/training/1b_fp8_2nd", "columns_half_fp8"],
                    "7B": ["docs/training/7b_slice_fp8_2nd", "columns_half_fp8", 0.9375]}}}}

The timed slice of a 7B model has no dense layer. Where a whole model has some, as many times fewer milliseconds are
saved as the third value of a speed says: the share of the layers that are sparse, 30 of 32 here.

A recipe whose phases keep different shares has a contender for each, with the share of the steps that it takes; the
other steps are dense: `{"columns_eighth_fp8": 0.475, "columns_quarter_fp8": 0.3}` in place of one contender's name.

Two keys of it replace what the runs cannot tell, and the table says so. With two budgets of one size the exponent b
cannot be fitted: `"exponent": [0.28, 0.7]` takes the middle of this range for the estimate, and draws from the whole
range for the intervals. Runs of a second size then add one number, its constant; B and b are those of both. Without a
second seed there is no deviation over seeds: `"deviation": {"dense": 0.01, "penalty": 0.004}`, in nats, takes those of
another study, and normal errors.
"""

import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import mean, variance
from typing import Any

if not __package__:  # started as `python scripts/law.py`: look imports up from the repository, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from configs.errors import ConfigError, run_program
from configs.repository import ROOT
from scripts.options import TERMS, Parser
from scripts.pictures import DPI, GREY, PALETTE, STYLE, save
from scripts.runs import amount, load_groups, mean_step, rounded, seed_of

DRAWS, INTERVAL, SEED = 200, 0.9, 0
SMALLEST_SCALE = 1e-6  # nats, of a law's terms at the smallest size and budget
EXPONENTS = 0.05, 2.0  # bounds of a and b


@dataclass(frozen=True)
class Cell:
    """The runs of one name, which differ in their seed alone."""

    parameters: float
    tokens: float
    values: tuple[float, ...]
    """By seed: final validation losses of a dense cell, in nats a token; penalties of a recipe's cell."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = constant + scale_n / N^a + scale_d / D^b, in nats a token. One size: scale_n is 0."""

    constant: float
    scale_n: float
    a: float
    scale_d: float
    b: float

    def loss(self, parameters: float, tokens: float) -> float:
        size = self.scale_n / parameters**self.a if self.scale_n else 0.0
        return self.constant + size + self.scale_d / tokens**self.b

    def share(self, tokens: float, penalty: float) -> float:
        """Effective tokens: the share of `tokens` after which dense training has its final loss plus `penalty`.

        More than 1 for a negative penalty; infinite if the law never has so low a loss.
        """
        base = 1 + penalty * tokens**self.b / self.scale_d
        return base ** (-1 / self.b) if base > 0 else math.inf

    def slope(self, tokens: float) -> float:
        """Nats by which the loss falls when the tokens grow by a factor of e."""
        return self.b * self.scale_d / tokens**self.b


def fit(cells: Sequence[Cell], means: Sequence[float], near: Law | None = None, exponent: float | None = None) -> Law:
    """The law that is nearest to the means of the cells, by least squares weighted by the number of runs.

    Args:
        cells: dense ones.
        means: of each cell, the loss to fit.
        near: a law to start from; None: several starts, of which the best fit is taken.
        exponent: b, if it is given and not fitted: for runs of one size or two, one of them of two budgets or more.

    Raises:
        ConfigError: too few budgets, two sizes without an exponent, or an exponent for more than two.
    """
    sizes, budgets = sorted({cell.parameters for cell in cells}), {cell.tokens for cell in cells}
    if exponent is not None:
        return _fit_given(cells, means, exponent, is_draw=near is not None)
    if len(budgets) < 3 or len(sizes) == 2:
        raise ConfigError(
            f"the dense runs have {len(budgets)} budgets and {len(sizes)} sizes: a law needs 3 budgets and more, and "
            "one size, or 3 and more (or, for 2 budgets or 2 sizes, a range for its exponent: see scripts/law.py)"
        )
    n0, d0 = sizes[0], min(budgets)
    n = np.array([cell.parameters / n0 for cell in cells])
    d = np.array([cell.tokens / d0 for cell in cells])
    loss, weight = np.array(means), np.sqrt([len(cell.values) for cell in cells])
    whole = len(sizes) > 1

    # The scales are those at the smallest size and budget, where each term is of the order of a nat.
    def residuals(x: np.ndarray) -> np.ndarray:
        size = x[3] * n ** -x[4] if whole else 0.0
        return weight * (x[0] + size + x[1] * d ** -x[2] - loss)

    starts = (
        [(near.b, near.a)] if near else [(b, a) for b in (0.2, 0.5, 1.0) for a in ((0.2, 0.5) if whole else (1.0,))]
    )
    low, high = EXPONENTS
    fits = []
    for b, a in starts:
        start, lower, upper = [loss.min() / 2, 1.0, b], [0.0, SMALLEST_SCALE, low], [loss.min(), 50.0, high]
        if whole:
            start, lower, upper = [*start, 1.0, a], [*lower, SMALLEST_SCALE, low], [*upper, 50.0, high]
        fits.append(least_squares(residuals, start, bounds=(lower, upper)))
    x = min(fits, key=lambda each: each.cost).x
    scale_n, a = (float(x[3] * n0 ** x[4]), float(x[4])) if whole else (0.0, 1.0)
    return Law(float(x[0]), scale_n, a, float(x[1] * d0 ** x[2]), float(x[2]))


def _fit_given(cells: Sequence[Cell], means: Sequence[float], b: float, is_draw: bool) -> Law:
    """`fit` with the exponent b given: linear in the numbers that are left, a constant for each size and the scale.

    Two constants are E + A / N^a for any a, so a is not fitted.
    """
    sizes = sorted({cell.parameters for cell in cells})
    budgets = max(len({cell.tokens for cell in cells if cell.parameters == size}) for size in sizes)
    if len(sizes) > 2 or budgets < 2:
        raise ConfigError(
            "a law with a given exponent needs dense runs of one size or two, and of 2 budgets or more of one of them"
        )
    d0 = min(cell.tokens for cell in cells)
    weight = np.sqrt([len(cell.values) for cell in cells])
    terms = np.array([[*(cell.parameters == size for size in sizes), (cell.tokens / d0) ** -b] for cell in cells])
    *constants, scale = np.linalg.lstsq(weight[:, None] * terms, weight * np.array(means), rcond=None)[0]
    if scale < SMALLEST_SCALE and not is_draw:
        raise ConfigError("the dense runs' loss does not fall with the tokens: these runs have no law")
    scale = max(scale, SMALLEST_SCALE)  # draws may differ by more than the loss falls
    constant, scale_n = constants[-1], 0.0
    if len(sizes) > 1:
        scale_n = (constants[0] - constants[1]) / (1 / sizes[0] - 1 / sizes[1])
        constant = constants[0] - scale_n / sizes[0]
    return Law(float(constant), float(scale_n), 1.0, float(scale * d0**b), b)


@dataclass(frozen=True)
class Evidence:
    """A file's cells, the law of its dense ones, and draws of both."""

    dense: list[Cell]
    recipes: dict[str, list[Cell]]
    law: Law
    drawn_laws: list[Law]
    drawn_penalties: dict[str, np.ndarray]
    """By recipe, [draws, cells]."""

    exponent: tuple[float, float] | None = None
    """The range that b is taken from, if it is not fitted."""

    deviation: dict[str, float] | None = None
    """Deviations over seeds of "dense" losses and of penalties ("penalty"), in nats, if they are of another study."""

    data: tuple[Path, ...] = ()
    """The file, and the folders of the studies that it names."""

    def shares(self, recipe: str, cell: int) -> tuple[float, float, float]:
        """Effective tokens of a recipe at the size and budget of one of its cells: the estimate, and its interval."""
        at = self.recipes[recipe][cell]
        drawn = [
            law.share(at.tokens, penalty)
            for law, penalty in zip(self.drawn_laws, self.drawn_penalties[recipe][:, cell], strict=True)
        ]
        with np.errstate(invalid="ignore"):  # NaN between two infinite draws
            bounds = np.quantile(drawn, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
        low, high = np.where(np.isnan(bounds), math.inf, bounds).tolist()
        return self.law.share(at.tokens, mean(at.values)), low, high

    def largest(self, recipe: str) -> int:
        """The place of the recipe's cell with most tokens."""
        tokens = [cell.tokens for cell in self.recipes[recipe]]
        return tokens.index(max(tokens))


def _deviation(cells: Sequence[Cell]) -> tuple[float, int]:
    """The deviation over seeds, pooled over the cells, and its degrees of freedom."""
    freedom = sum(len(cell.values) - 1 for cell in cells)
    if not freedom:
        raise ConfigError("no run has a second seed, so there is no interval: run some of them with seeds = [0, 1]")
    spread = sum((len(cell.values) - 1) * variance(cell.values) for cell in cells if len(cell.values) > 1)
    return math.sqrt(spread / freedom), freedom


def _drawn(
    cells: Sequence[Cell], generator: np.random.Generator, of: Sequence[Cell], given: float | None = None
) -> np.ndarray:
    """Means of the cells as other seeds might have given them, [draws, cells].

    `of` are the cells whose deviation is pooled; `given` is a deviation to take instead.
    """
    shape = DRAWS, len(cells)
    if given is None:
        given, freedom = _deviation(of)
        moves = generator.standard_t(freedom, shape)
    else:
        moves = generator.standard_normal(shape)
    error = given / np.sqrt([len(cell.values) for cell in cells])
    return np.array([mean(cell.values) for cell in cells]) + error * moves


def _losses(study: str, run: str, root: Path) -> tuple[float, float, dict[int, float]]:
    """Parameters and tokens of a run, and its final validation losses by seed."""
    groups, _ = load_groups(root / study)
    if run not in groups:
        raise ConfigError(f"{study} has no run {run}: there are {', '.join(groups) or 'none'}")
    for one, about in groups[run]:
        line = one.lines[-1]
        if line["step"] != about["phases"][-1][2] or not math.isfinite(line.get("val_loss") or math.nan):
            raise ConfigError(f"{study}: {one.name} has no validation loss at its last step: let it end")
    tokens = {one.last("tokens") for one, _ in groups[run]}
    sizes = {about["parameters"] for _, about in groups[run]}
    if len(tokens) > 1 or len(sizes) > 1:
        raise ConfigError(f"{study}: the runs {run} differ in their tokens or parameters: give each a name of its own")
    return sizes.pop(), tokens.pop(), {seed_of(about): one.last("val_loss") for one, about in groups[run]}


@functools.cache
def read(file: Path, root: Path = ROOT) -> Evidence:
    """Read a file of evidence, fit the law and draw from its errors; see the module's docstring for the file.

    Raises:
        ConfigError: a file, study or run that is not there, runs without a dense run of their seed, too few runs.
    """
    try:
        told: dict[str, Any] = json.loads(file.read_text())
        if not told["recipes"]:
            raise ConfigError(f"{file} has no recipes: see python -m scripts.law --help")
        if without := [name for name, entry in told["recipes"].items() if not entry["runs"]]:
            raise ConfigError(f"{file}: recipe {without[0]} has no runs: give it one, or leave it out")
        every = [("dense", told["dense"]), *((name, entry["runs"]) for name, entry in told["recipes"].items())]
        for name, entries in every:
            named = [(e["study"], e["run"]) for e in entries]
            if twice := [f"{study}: {run}" for study, run in named if named.count((study, run)) > 1]:
                raise ConfigError(
                    f"{file}: {name} has the runs {twice[0]} twice, which would count double: name them once"
                )
        dense = [
            Cell(n, d, tuple(losses.values())) for n, d, losses in (_losses(**e, root=root) for e in told["dense"])
        ]
        recipes = {name: [_penalties(e, root) for e in entry["runs"]] for name, entry in told["recipes"].items()}
        exponent, deviation = _exponent(told), _given_deviation(told)
        runs = [run for _, entries in every for run in entries]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a file of evidence ({error!r}): see python -m scripts.law --help") from None
    generator = np.random.default_rng(SEED)
    law = fit(dense, [mean(cell.values) for cell in dense], exponent=mean(exponent) if exponent else None)
    drawn = _drawn(dense, generator, dense, deviation["dense"] if deviation else None)
    exponents = generator.uniform(*exponent, len(drawn)) if exponent else [None] * len(drawn)
    laws = [fit(dense, list(means), law, b) for means, b in zip(drawn, exponents, strict=True)]
    pooled = [cell for cells in recipes.values() for cell in cells]
    given = deviation["penalty"] if deviation else None
    penalties = {name: _drawn(cells, generator, pooled, given) for name, cells in recipes.items()}
    studies = {root / run["study"]: None for run in runs}
    return Evidence(dense, recipes, law, laws, penalties, exponent, deviation, (file, *studies))


def _number(value: Any) -> float:
    """A number of a file of evidence; float() would take true and "0.5" as well."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{json.dumps(value)} is no number")
    if abs(value) > sys.float_info.max:  # an infinity, or a whole number that no float holds
        raise ValueError("a number is out of bounds")
    return float(value)


def _exponent(told: dict[str, Any]) -> tuple[float, float] | None:
    if "exponent" not in told:
        return None
    low, high = map(_number, told["exponent"])
    if not EXPONENTS[0] <= low <= high <= EXPONENTS[1]:
        raise ConfigError(f"exponent = {told['exponent']}: give its range, within {EXPONENTS[0]} and {EXPONENTS[1]}")
    return low, high


def _given_deviation(told: dict[str, Any]) -> dict[str, float] | None:
    if "deviation" not in told:
        return None
    given = {key: _number(value) for key, value in told["deviation"].items()}
    if given.keys() != {"dense", "penalty"} or not all(0 < value < math.inf for value in given.values()):
        raise ConfigError(f'deviation = {told["deviation"]}: give "dense" and "penalty", each in nats and above 0')
    return given


def _penalties(entry: dict[str, str], root: Path) -> Cell:
    parameters, tokens, losses = _losses(entry["study"], entry["run"], root)
    other = _losses(entry["study"], entry["dense"], root)
    if other[:2] != (parameters, tokens):
        raise ConfigError(f"{entry['study']}: {entry['run']} and {entry['dense']} differ in their tokens or parameters")
    if missing := losses.keys() - other[2].keys():
        raise ConfigError(f"{entry['study']}: {entry['dense']} lacks seed {min(missing)} of {entry['run']}")
    return Cell(parameters, tokens, tuple(loss - other[2][seed] for seed, loss in losses.items()))


@dataclass(frozen=True)
class Speed:
    """Speed-ups over dense bf16 steps of one model: of a sparse step, of the whole run, and of the fastest rival."""

    step: float
    whole: float
    rival: float


def speeds(entry: dict[str, Any], root: Path = ROOT) -> dict[str, Speed]:
    """The speed-ups of a recipe by model.

    Args:
        entry: a recipe of the file, whose `speeds` name the folder of a training.json and the contender for each model,
            or several with their shares of the steps, and perhaps a share of the layers, see the module's docstring.

    Raises:
        ConfigError: a training.json that cannot be read, a contender that it has not timed, a share not in (0, 1], or
            shares of the steps that add up to more than 1.
    """
    found, model, where = {}, "", entry.get("speeds", {})
    try:
        for model, (folder, contender, *shares) in where.items():
            (layers,) = map(_number, shares or (1.0,))
            if not 0 < layers <= 1:
                raise ValueError(f"the share of sparse layers is {layers}, not above 0 and at most 1")
            contenders = json.loads((root / folder / "training.json").read_text())["contenders"]
            dense = contenders["dense"]["ms"]["dense"]
            if isinstance(contender, dict):
                steps = {name: _number(share) for name, share in contender.items()}
            else:
                steps = {contender: contenders[contender]["sparse_share"]}
            total = math.fsum(steps.values())  # rounded once: a plain sum of shares of all steps can exceed 1
            if not (steps and min(steps.values()) > 0 and total <= 1):
                raise ValueError(f"the shares of the steps are {contender}, not above 0 and in sum at most 1")
            rival = min(
                each["ms"]["dense"] for each in contenders.values() if not (each["failed"] or each["sparse_share"])
            )
            # Of the sparse steps: each contender's part of their sum. Its dense steps are weighted alike.
            times = {name: contenders[name]["ms"] for name in steps}
            own = sum(share * times[name]["dense"] for name, share in steps.items()) / total
            kept = sum(share * times[name]["sparse"] for name, share in steps.items()) / total
            sparse = mean_step(own, kept, layers)
            found[model] = Speed(dense / sparse, dense / mean_step(own, sparse, total), dense / rival)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"speeds of {model or json.dumps(where)}: give the folder of a training.json, a contender that it has "
            f"timed, or several with their shares of the steps, and, if fewer layers are sparse than were timed, their "
            f"share ({error!r})"
        ) from None
    return found


def draw(evidence: Evidence) -> Figure:
    """The law through the dense runs, and the effective tokens of every recipe at each size and budget."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.0, 4.2), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        sizes = sorted({cell.parameters for cell in evidence.dense})
        for colour, size in zip(cycle(PALETTE), sizes, strict=False):
            own = [cell for cell in evidence.dense if cell.parameters == size]
            tokens = np.geomspace(min(cell.tokens for cell in own) / 1.2, max(cell.tokens for cell in own) * 2, 60)
            curves = np.array([[law.loss(size, each) for each in tokens] for law in evidence.drawn_laws])
            low, high = np.quantile(curves, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
            left.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
            fitted = [evidence.law.loss(size, each) for each in tokens]
            left.plot(tokens, fitted, color=colour, label=f"dense, {rounded(size, 2)} parameters: law")
            points = [(cell.tokens, loss) for cell in own for loss in cell.values]
            left.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, label="dense runs, one a seed")
        left.set(xscale="log", xlabel="tokens", ylabel="validation loss, nats a token")
        left.xaxis.set_major_formatter(amount)
        left.xaxis.set_minor_formatter("")
        left.set_title("The dense law, with its 90% interval")
        left.legend()
        names: list[str] = []
        for (recipe, cells), colour in zip(evidence.recipes.items(), cycle(PALETTE), strict=False):
            for index, cell in enumerate(cells):
                share, low, high = evidence.shares(recipe, index)
                place, parameters = len(names), rounded(cell.parameters, 2)
                names.append(f"{recipe}\n{parameters}, {cell.tokens / cell.parameters:.0f} tokens each")
                right.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2)
                right.plot(100 * share, place, "o", color=colour)
        right.axvline(100, color=GREY, linewidth=0.8)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set(xlabel="effective tokens, % of the run's tokens")
        right.set_title("What a recipe's loss is worth in dense tokens")
    return figure


def main(arguments: list[str] | None = None) -> int:
    from scripts.tables import law_table  # which reads what this module fits

    parser = Parser(
        prog="python -m scripts.law",
        description="Fit the loss of dense runs, and what sparse recipes cost of it.",
        epilog=TERMS,
    )
    parser.add_argument("evidence", type=Path, metavar="EVIDENCE.json", help="which runs count; see scripts/law.py")
    options = parser.parse_args(arguments)
    print(law_table(options.evidence.resolve(), pad=True))
    evidence = read(options.evidence.resolve())
    print(save(draw(evidence), options.evidence.with_suffix(".png"), evidence.data))
    return 0


if __name__ == "__main__":
    run_program(main)
