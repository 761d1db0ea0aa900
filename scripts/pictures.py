"""Pictures of runs: logged metrics, final loss against cost, and how many tokens a run is behind the dense one.

How to read the picture of loss, sparsity health and throughput (`plot`):

- The x axis is tokens, so that runs with different batches can be compared, or training time. The faint line is the
  loss of every logged step. The bold line is its running mean over `--smooth` logged steps. The mean never crosses a
  change of phase, so a jump where sparsity starts or ends is real. Circles are the validation loss of dense inference,
  which means the same in every phase and run. Dashed diamonds are the same weights with the sparse pattern on. The gap
  between the two is the effect of switching the pattern off. The loss axis is logarithmic, so that the first steps and
  the last ones are both seen. The dotted line is the unigram entropy of the validation text: the loss of a model that
  knows only how frequent each token is.
- A training loss below the validation loss is no overfitting as long as the run has not read its corpus several times.
  Each sequence of the batch goes through one document after the other, so where documents are long, the training loss
  is that of documents whose earlier parts the model has just been trained on. The validation documents are new to it.
  Measured for configs/debug.toml, whose documents last 30 steps on average: the model of step 200 has a loss of 4.60
  on the eight batches that come next, of 5.20 on those from 56 steps later on, and of 5.15 in validation. When the
  learning rate has decayed, the two curves meet.
- Where phases keep shares of their own, each has its share above it, `keep 1/8`, or just `1/8`, if there is room. For
  runs whose phases differ it is in their bars, and a gap parts two shares.
- Sparsity health, if a run logs it: one line for each layer, coloured by depth, and the aggregate in bold. Look for
  layers that differ from the others. For several runs only the aggregates are drawn.
- Throughput and learning rate, which show a slow node or a wrong schedule.

The axes of health, throughput and learning rate omit the outermost few percent of the values (a compilation) if these
would flatten the rest. Curves are cut at the frame; all values are in metrics.jsonl.

A recipe has the same colour in every picture, its family's hue. Further runs of a recipe take colours of their own.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configs.errors import ConfigError
from scripts.options import LARGEST
from scripts.runs import HEALTH, VALIDATIONS, Run, amount, load_runs

DATA = "data"  # a text of every picture, see `save`
RUN_FILES = "metrics.jsonl", "run.json"

# The colour-blind-safe palette of Okabe and Ito, without yellow, which is too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
# The colour of each recipe, one hue a family, darker where fewer neurons are kept.
RECIPE_COLOURS = {
    "dense": "#333333",
    "columns_half": "#56B4E9",
    "columns_quarter": "#0072B2",
    "columns_eighth": "#003A6B",
    "columns_half_fp8": "#9A8CE8",
    "columns_quarter_fp8": "#5B46C9",
    "columns_eighth_fp8": "#2E1F7A",
    "groups_quarter": "#009E73",
    "groups_eighth": "#00543D",
    "venom_4of16": "#E69F00",
    "venom_2of16": "#D55E00",
    "venom_paper": "#8C3A00",
    "weights_2of4": "#CC79A7",
    "activations_2of4": "#7B4B94",
}
# For runs that share a recipe, or whose recipe is not in the table.
OTHER_COLOURS = ("#999933", "#882255", "#44AA99", "#C8563B", "#6699CC", "#AA4499", "#8A8A8A", "#117733", "#BBAA00")
SHADE = "#ECECEC"
GREY = "#6E6E6E"
TRAINING = "#9A9A9A"  # the training loss of a single run, whose validation has the recipe's colour

# Numbers beside a logarithmic axis, each about an eighth above the one before.
ROUND = (1, 1.1, 1.25, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3.2, 3.6, 4, 4.5, 5, 5.6, 6.3, 7, 8, 9)

NARROWEST = 8.8  # inches that the x axis is long at least
SHARE_TEXT = 8.0  # font size of shares

MARKED: dict[str, Any] = {"markersize": 4.6, "markerfacecolor": "white", "linewidth": 1.1}

WIDTH, DPI = 10.0, 150  # inches, dots per inch: 1500 pixels
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DADADA",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "text.parse_math": False,
    "lines.solid_capstyle": "round",
}


def smooth(values: np.ndarray, index: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` lines, shorter at the ends; never across a change of phase. [lines]"""
    result = np.full(len(values), math.nan)
    for phase in range(index[-1] + 1):
        inside = np.flatnonzero((index == phase) & np.isfinite(values))
        sums = np.concatenate([[0.0], np.cumsum(values[inside])])
        at = np.arange(len(inside))
        low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(inside))
        result[inside] = (sums[high] - sums[low]) / (high - low)
    return result


def run_colours(runs: Iterable[tuple[str, str]]) -> list[str]:
    """A colour for each run, from its name and its recipe, the same whichever of the pictures it is drawn in.

    A recipe's colour goes to the run that is named after it, or else to the recipe's first.
    """
    named = [(re.sub(r"(_s\d+)?(, step \d+)?$", "", name.rsplit("/", 1)[-1]), recipe) for name, recipe in runs]
    owner: dict[str, int] = {}
    for place, (name, recipe) in enumerate(named):
        if recipe in RECIPE_COLOURS and (recipe not in owner or (name == recipe != named[owner[recipe]][0])):
            owner[recipe] = place
    others = [place for place in range(len(named)) if place not in owner.values()]
    colours = {place: RECIPE_COLOURS[recipe] for recipe, place in owner.items()}
    colours |= {place: OTHER_COLOURS[number % len(OTHER_COLOURS)] for number, place in enumerate(others)}
    return [colours[place] for place in range(len(named))]


def share_in_words(share: float | None) -> str:
    """A share of the groups: "keep 1/8", or "keep 0.334" where it is no simple fraction; empty where it is none."""
    if share is None or not 0 < share <= 1:
        return ""
    simple = Fraction(share).limit_denominator(32)
    return f"keep {simple if float(simple) == share else format(share, '.3g')}"


def digest(data: Path) -> str:
    """SHA-256 of what a picture is drawn from: a file, or what a folder has of its own run and of the runs in it."""
    found = [data]
    if data.is_dir():
        found = sorted(file for folder in ("", "*/") for name in RUN_FILES for file in data.glob(folder + name))
    total = hashlib.sha256()
    for file in found:
        total.update(f"{file.relative_to(data)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def save(figure: Figure, out: Path, data: Iterable[Path]) -> Path:
    """Write the figure as PNG with a palette of 256 colours, a third of the size; return `out`.

    The PNG has a text, `DATA`: JSON of the paths in `data`, as seen from its folder, and their digests, by which
    tests/test_report.py finds a picture that is not of its data any more.
    """
    picture, info = io.BytesIO(), PngInfo()
    info.add_text(DATA, json.dumps({os.path.relpath(path, out.parent): digest(path) for path in data}))
    figure.savefig(picture)
    Image.open(picture).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        out, optimize=True, pnginfo=info
    )
    return out


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis from `low` to `high`, with a margin and round numbers beside it."""
    axes.set_yscale("log")
    margin = max((high / low) ** 0.04, 1.001)
    low, high = low / margin, high * margin
    axes.set_ylim(low, high)
    if high / low < 1.8:  # nearly linear
        axes.yaxis.set_major_locator(MaxNLocator(7))
    else:
        axes.yaxis.set_major_locator(LogLocator(10, ROUND[:: 2 if high / low > 4 else 1], numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def points(run: Run, x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that exist, with a break in the line wherever a whole phase logged none."""
    at = np.flatnonzero(np.isfinite(values) & np.isfinite(x))
    breaks = np.flatnonzero(np.diff(run.phase_index[at]) > 1) + 1
    return np.insert(x[at], breaks, math.nan), np.insert(values[at], breaks, math.nan)


def y_range(curves: list[np.ndarray], low: float, high: float) -> tuple[float, float]:
    """Limits that contain the `low` to `high` quantiles of every curve, or all values if they fit into thrice that."""
    kept = [curve[np.isfinite(curve)] for curve in curves]
    kept = [curve for curve in kept if len(curve)]
    bottom, top = min(np.quantile(c, low) for c in kept), max(np.quantile(c, high) for c in kept)
    all_bottom, all_top = min(c.min() for c in kept), max(c.max() for c in kept)
    if all_top - all_bottom <= 3 * (top - bottom):
        bottom, top = all_bottom, all_top
    pad = 0.07 * (top - bottom) or 0.05 * abs(top) or 1.0
    return float(bottom - pad), float(top + pad)


class Picture:
    """The figure of one or several runs; each panel has a method."""

    def __init__(self, runs: list[Run], window: int | None, against: str = "tokens"):
        self.runs = runs
        self.window = window
        self.single = len(runs) == 1
        if against == "time":
            for run in runs:
                if not np.isfinite(run.seconds).all():
                    raise ConfigError(f"--against time: {run.folder} lacks tokens_per_second or tokens in a line")
            unit, size = ("minutes", 60) if max(run.seconds[-1] for run in runs) >= 300 else ("seconds", 1)
            where = " on a CPU, which has no sparse kernels" if any(run.on_cpu for run in runs) else ""
            self.x_label, self.x = f"training time{where}, {unit}", [run.seconds / size for run in runs]
        elif all(run.has("tokens") for run in runs):
            self.x_label, self.x = "tokens", [run.tokens for run in runs]
        else:
            self.x_label, self.x = "step", [run.values("step") for run in runs]
        self.end = max(float(x.max()) for x in self.x)
        self.spans = [run.spans(x) for run, x in zip(runs, self.x, strict=True)]
        # Written where any phase has a share of its own.
        own = any(run.has("keep") for run in runs)
        self.shares = [[share_in_words(share if own else None) for share in run.shares] for run in runs]
        self.one_schedule = all(self._same(spans, self.spans[0]) for spans in self.spans)
        self.one_schedule &= all(shares == self.shares[0] for shares in self.shares)
        self.any_sparse = any(phase == "sparse" for spans in self.spans for phase, _, _ in spans)
        # Between two sparse phases, which keep different shares.
        pairs = [pair for spans in self.spans for pair in itertools.pairwise(spans)]
        self.borders = sorted({b[1] for a, b in pairs if a[0] == b[0] == "sparse"})
        # A line only where it is the same for all: of one validation text in one tokenizer.
        entropies = {run.unigram_entropy for run in runs}
        self.entropy = entropies.pop() if len(entropies) == 1 else None
        self.strips = self.any_sparse and not self.one_schedule
        self.colours = run_colours((run.name, run.recipe) for run in runs)

    def _same(self, spans: list[tuple[str, float, float]], others: list[tuple[str, float, float]]) -> bool:
        """Whether two schedules have the same phases, within 0.5% of the x axis."""
        return len(spans) == len(others) and all(
            a[0] == b[0] and abs(a[2] - b[2]) <= 0.005 * self.end for a, b in zip(spans, others, strict=True)
        )

    def draw(self) -> Figure:
        layers = {metric: self.runs[0].layers(metric) if self.single else [] for metric in HEALTH}
        health = [metric for metric in HEALTH if layers[metric] or any(run.has(metric) for run in self.runs)]
        depth = sorted(set().union(*layers.values()))
        bottom = [key for key in ("tokens_per_second", "lr") if any(run.has(key) for run in self.runs)]

        # Rows in inches: loss, phase strips, the layers' colour bar, health, throughput and learning rate.
        per_row = {0: 1, 1: 1, 2: 2, 3: 3, 4: 2}[len(health)]
        rows = {
            "loss": 3.9,
            "strips": (0.19 if any(map(any, self.shares)) else 0.13) * len(self.runs) + 0.05 if self.strips else 0.0,
            "bar": 0.13 if len(depth) > 1 else 0.0,
        }
        rows |= {f"health{row}": 1.85 for row in range(math.ceil(len(health) / per_row))}
        rows["bottom"] = 1.5 if bottom else 0.0
        rows = {name: height for name, height in rows.items() if height}
        order = {name: place for place, name in enumerate(rows)}

        size = (WIDTH, sum(rows.values()) + 0.5 * len(rows) + 0.45)
        engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07, hspace=0.02, wspace=0.03)
        figure = Figure(figsize=size, dpi=DPI, layout=engine)
        grid = figure.add_gridspec(len(rows), 6, height_ratios=list(rows.values()))
        figure.suptitle(self.title(), fontsize=13.5, fontweight="bold", x=0.012, ha="left", color="#222222")

        main = figure.add_subplot(grid[0, :])
        self.loss(main)
        if self.strips:
            self.phase_strips(figure.add_subplot(grid[order["strips"], :], sharex=main), main)
        if "bar" in order:
            self.colour_bar(figure, grid, order["bar"], depth)
        span, separator = 6 // per_row, "\n" if per_row == 3 else " "
        for place, metric in enumerate(health):
            row, column = divmod(place, per_row)
            axes = figure.add_subplot(grid[order[f"health{row}"], column * span : (column + 1) * span])
            self.health(axes, metric, depth, separator)
        for place, key in enumerate(bottom):
            span = 6 // len(bottom)
            self.small(figure.add_subplot(grid[order["bottom"], place * span : (place + 1) * span]), key)
        figure.align_ylabels()
        return figure

    def title(self) -> str:
        models = list(dict.fromkeys(run.model for run in self.runs if run.model))
        recipes = list(dict.fromkeys(run.recipe for run in self.runs if run.recipe))
        parts = [", ".join(models), ", ".join(recipes) if len(recipes) <= 4 else f"{len(recipes)} recipes"]
        return "  ·  ".join(part for part in parts if part) or self.runs[0].name

    def label(self, run: Run) -> str:
        """Run, recipe, and the last validation."""
        text = run.name if run.recipe in ("", run.name) else f"{run.name} ({run.recipe})"
        for key, form in (("val_loss", ": validation {:.3f}"), ("val_bpb", ", {:.4f} bpb")):
            if run.has(key):
                text += form.format(run.last(key))
        return text

    def smoothed(self, run: Run, key: str) -> np.ndarray:
        window = self.window or max(1, int(np.isfinite(run.values(key)).sum()) // 40)
        return smooth(run.values(key), run.phase_index, window)

    def frame(self, axes: Axes) -> None:
        """The x axis that all panels share, and the sparse phases behind it."""
        axes.set_xlim(-0.008 * self.end, self.end * 1.01 or 1.0)  # the first and the last marker whole
        axes.xaxis.set_major_formatter(FuncFormatter(amount))
        if self.any_sparse and self.one_schedule:
            for phase, start, end in self.spans[0]:
                if phase == "sparse":
                    axes.axvspan(start, end, color=SHADE, linewidth=0, zorder=0)
            for border in self.borders:
                axes.axvline(border, color=GREY, linewidth=0.9, linestyle=":", zorder=1)

    def write_shares(self, axes: Axes, run: int, y: float, **style: Any) -> None:
        """Write the share of each phase of a run at its middle, or only its number, or nothing, as there is room."""
        for (_, start, end), share in zip(self.spans[run], self.shares[run], strict=True):
            width = (end - start) / (self.end or 1.0) * NARROWEST  # inches; those of a letter are 0.6 em or less
            for text in (share, share.removeprefix("keep ")) if share else ():
                if 0.6 * SHARE_TEXT / 72 * (len(text) + 1) < width:
                    axes.text((start + end) / 2, y, text, ha="center", fontsize=SHARE_TEXT, **style)
                    break

    def loss(self, axes: Axes) -> None:
        """Training loss, every step and smoothed, and both validations."""
        self.frame(axes)
        for run, x, colour in zip(self.runs, self.x, self.colours, strict=True):
            ink = TRAINING if self.single else colour
            axes.plot(*points(run, x, run.values("loss")), color=ink, alpha=0.28, linewidth=0.7, zorder=2)
            axes.plot(*points(run, x, self.smoothed(run, "loss")), color=ink, linewidth=2.0, zorder=3)
            for key, (marker, line, _) in VALIDATIONS.items():
                at, values = points(run, x, run.values(key))
                every = max(1, len(at) // 30)
                marks = slice((len(at) - 1) % every, None, every)  # counted so that the last validation has one
                axes.plot(at, values, line, color=colour, marker=marker, markevery=marks, zorder=4, **MARKED)
        seen = [self.smoothed(run, "loss") for run in self.runs]
        seen += [run.values(key) for run in self.runs for key in VALIDATIONS]
        values = np.concatenate([curve[np.isfinite(curve)] for curve in seen])
        # Down from where the runs begin: a later spike, as of a run that diverges, does not set the range.
        first = max(losses[np.isfinite(losses)][0] for losses in (run.values("loss") for run in self.runs))
        log_axis(axes, max(values.min(), 1e-3), max(first, np.quantile(values, 0.95)))
        if self.entropy is not None:
            axes.axhline(self.entropy, color=GREY, linewidth=1.1, linestyle=":", zorder=1)
        axes.set_ylabel("loss (nats a token)")
        if not self.strips:
            axes.set_xlabel(self.x_label)
        if self.one_schedule:
            self.write_shares(axes, 0, 1.01, transform=axes.get_xaxis_transform(), va="bottom", color=GREY)
        self.legends(axes)

    def legends(self, axes: Axes) -> None:
        """Legends: the colour of each run (top right), and the kinds of lines, above the shares of phases."""
        ink, mark = (TRAINING, self.colours[0]) if self.single else (GREY, GREY)
        handles: list[Any] = [Line2D([], [], color=ink, linewidth=2)]
        texts = ["training, on the documents being read" if self.single else "training"]
        for key, (marker, line, text) in VALIDATIONS.items():
            if any(run.has(key) for run in self.runs):
                handles += axes.plot([], [], line, color=mark, marker=marker, **MARKED)
                texts.append(text)
        if self.entropy is not None:
            handles.append(Line2D([], [], color=GREY, linewidth=1.1, linestyle=":"))
            texts.append(f"unigram entropy {self.entropy:.3f}")
        if self.any_sparse:
            handles.append(Patch(facecolor=SHADE if self.one_schedule else GREY, edgecolor="#BBBBBB", linewidth=0.5))
            border = "dotted line" if self.one_schedule else "gap"
            texts.append("sparse phase" + (f"; {border}: another share" if self.borders else ""))
        if self.single:
            title = self.label(self.runs[0])
            axes.legend(handles, texts, title=title, loc="upper right", alignment="left", title_fontsize=10.5)
            return
        lines = [Line2D([], [], color=colour, linewidth=2.6) for colour in self.colours]
        names = axes.legend(lines, [self.label(run) for run in self.runs], loc="upper right", alignment="left")
        axes.add_artist(names)
        columns = 3 if self.borders else len(handles)  # one line would be too long
        at = (0, 1.05 if axes.texts else 1.0)
        axes.legend(handles, texts, loc="lower left", ncols=columns, bbox_to_anchor=at, borderaxespad=0.2)

    def phase_strips(self, axes: Axes, main: Axes) -> None:
        """One bar for each run, filled in its sparse phases; for runs with different schedules."""
        for place, (spans, colour) in enumerate(zip(self.spans, self.colours, strict=True)):
            for phase, start, end in spans:
                fill = to_rgba(colour, 1.0 if phase == "sparse" else 0.15)
                axes.broken_barh([(start, end - start)], (place - 0.36, 0.72), facecolor=fill, linewidth=0)
            dark = sum(to_rgba(colour)[:3]) < 1.6
            self.write_shares(axes, place, place, va="center_baseline", color="white" if dark else "black")
            for (before, *_), (after, start, _) in itertools.pairwise(spans):
                if before == after:  # both sparse, with different shares
                    axes.broken_barh(
                        [(start - 0.002 * self.end, 0.004 * self.end)], (place - 0.36, 0.72), color="white"
                    )
        axes.set_ylim(len(self.runs) - 0.5, -0.5)
        axes.set_yticks([(len(self.runs) - 1) / 2], ["phases"])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.set_xlabel(self.x_label)
        main.tick_params(labelbottom=False)

    def colour_bar(self, figure: Figure, grid: GridSpec, row: int, depth: list[int]) -> None:
        """The colour bar of the layers."""
        bar = figure.add_subplot(grid[row, 3:])
        places = np.arange(len(depth) + 1) - 0.5
        colours = ListedColormap([self.depth_colour(layer, depth) for layer in depth])
        every = math.ceil(len(depth) / 12)
        ticks = list(range(0, len(depth), every))
        norm = BoundaryNorm(places, len(depth))
        Colorbar(bar, cmap=colours, norm=norm, orientation="horizontal", ticks=ticks)
        bar.minorticks_off()
        bar.set_xticklabels([str(depth[tick]) for tick in ticks])
        bar.text(-0.015, 0.5, "layer", transform=bar.transAxes, ha="right", va="center", color="#333333")

    @staticmethod
    def depth_colour(layer: int, depth: list[int]) -> Any:
        """From the first layer, dark, to the last, light."""
        return colormaps["viridis"](0.92 * depth.index(layer) / max(1, len(depth) - 1))

    def health(self, axes: Axes, metric: str, depth: list[int], separator: str) -> None:
        """One metric of sparsity health: by layer and aggregated for a single run, aggregated only for several."""
        self.frame(axes)
        curves: list[np.ndarray] = []

        def line(run: Run, x: np.ndarray, key: str, **style: Any) -> None:
            at, values = points(run, x, run.values(key))
            few = len(at) < 40  # logged at validations only
            axes.plot(at, values, marker="o" if few else "", markersize=1.6 * style["linewidth"], **style)
            curves.append(values)

        if self.single:
            for layer in self.runs[0].layers(metric):
                colour = self.depth_colour(layer, depth)
                line(self.runs[0], self.x[0], f"layers/{layer}/{metric}", color=colour, linewidth=0.9, alpha=0.85)
        for run, x, colour in zip(self.runs, self.x, self.colours, strict=True):
            if run.has(metric):
                line(run, x, metric, color="black" if self.single else colour, linewidth=2.2, zorder=4)
        axes.set_title(f"{metric}:{separator}{HEALTH[metric]}")
        axes.set_ylim(*y_range(curves, 0.01, 0.98))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_locator(MaxNLocator(6))

    def small(self, axes: Axes, key: str) -> None:
        """Throughput, smoothed as the loss is, or the learning rate."""
        self.frame(axes)
        curves = []
        for run, x, colour in zip(self.runs, self.x, self.colours, strict=True):
            if key == "lr":
                curves.append(run.values(key))
            else:
                curves.append(self.smoothed(run, key))
                axes.plot(*points(run, x, run.values(key)), color=colour, alpha=0.28, linewidth=0.7)
            axes.plot(*points(run, x, curves[-1]), color=colour, linewidth=1.6)
        axes.set_ylim(0, y_range(curves, 0.0, 0.99)[1])
        axes.set_title("learning rate" if key == "lr" else "tokens a second")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(self.x_label)
        axes.yaxis.set_major_formatter(FuncFormatter(amount))


def draw_front(
    points: dict[str, tuple[float, float]],
    baseline: str,
    deviation: float | None,
    x_label: str,
    named: Collection[str] | None = None,
    colours: dict[str, str] | None = None,
    model: str = "",
) -> Figure:
    """Final loss against cost, with the Pareto front.

    Args:
        points: for each run its cost relative to the baseline, and its final loss.
        baseline: the run that the others are compared with.
        deviation: standard deviation of the baseline's loss over its seeds, drawn as a band of +- this value.
        named: runs whose names are written beside their points; None: all.
        colours: by run; the others are grey.
        model: what the runs trained, for the title.
    """
    figure = _titled("Final loss against cost; filled: no run is better in both", model, 5.2)
    axes = figure.subplots()
    level = points[baseline][1]
    axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
    if deviation is not None:
        axes.axhspan(level - deviation, level + deviation, color=SHADE, linewidth=0, zorder=0)
    order = sorted(points, key=lambda name: points[name])
    front = [name for place, name in enumerate(order) if all(points[name][1] < points[o][1] for o in order[:place])]
    steps = [points[name] for name in front]
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=GREY, linewidth=1.2, zorder=2)
    for name, (x, y) in points.items():
        colour = (colours or {}).get(name, "#B0B0B0")
        fill = colour if name in front else "white"
        axes.plot(x, y, "o", color=colour, markerfacecolor=fill, markersize=6.5, markeredgewidth=1.6, zorder=3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"final validation loss, dense inference (over {baseline})")
    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    wide = high - low or 0.1
    axes.set_xlim(low - 0.06 * wide, high + 0.25 * wide)
    axes.margins(y=0.16)
    axes.autoscale_view(scalex=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3f} ({100 * (y / level - 1):+.1f}%)"))
    # Labels above and to the right of their points, moved up where they would overlap.
    height, taken = 0.035, list[tuple[float, float]]()
    to_axes = axes.transData + axes.transAxes.inverted()
    for name in sorted(points if named is None else named, key=lambda name: points[name][1]):
        x, y = to_axes.transform(points[name])
        place = y + 0.022
        while any(abs(x - other) < 0.25 and abs(place - at) < height for other, at in taken):
            place += 0.005
        taken.append((x, place))
        style: dict[str, Any] = {"va": "center", "fontsize": 9, "color": "#333333"}
        axes.text(x + 0.012, place, name, transform=axes.transAxes, **style).set_in_layout(False)
    return figure


def _titled(title: str, model: str, height: float) -> Figure:
    """An empty figure that says what it shows, and of which model."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    text = f"{title}  ·  {model}" if model else title
    figure.suptitle(text, fontsize=11.5, fontweight="bold", x=0.012, ha="left", color="#222222")
    return figure


def tokens_behind(run: Run, baseline: Run) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens later than the baseline a run reached each of its validation losses (dense inference).

    While the learning rate decays, the baseline reached the loss at a higher learning rate than the run. So the result
    is not the number of tokens by which a shorter baseline, with its own decay, would match the run.

    Returns:
        tokens at the run's validations, and how many fewer the baseline needed for the same loss, interpolated between
        its own validations; NaN for a loss that it never reached.
    """
    (tokens, losses), (base_tokens, base) = (
        (each.tokens[at], each.values("val_loss")[at])
        for each in (run, baseline)
        for at in [np.isfinite(each.values("val_loss"))]
    )
    best = np.minimum.accumulate(base)
    needed = np.interp(-losses, -best, base_tokens, left=math.nan, right=math.nan)
    return tokens, tokens - needed


def draw_behind(runs: dict[str, Run], baseline: Run) -> Figure:
    """`tokens_behind` against tokens: when a run falls behind the dense run, and whether it catches up.

    A constant slope is a cost that grows with the length of the run; a step early in training is a cost that a longer
    run pays only once.

    Args:
        runs: by name, with val_loss and tokens.
        baseline: the dense run.
    """
    figure = _titled("How many tokens behind the dense run, at the same loss", baseline.model, 4.8)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
    colours = run_colours((name, run.recipe) for name, run in runs.items())
    for (name, run), colour in zip(runs.items(), colours, strict=True):
        tokens, behind = tokens_behind(run, baseline)
        axes.plot(tokens, behind, "-o", color=colour, label=name, **MARKED)
        sparse = np.isin(tokens, run.tokens[run.phases == "sparse"])
        axes.plot(tokens[sparse], behind[sparse], "o", color=colour, markersize=4.6)
    axes.set_xlabel("tokens")
    axes.set_ylabel("tokens behind the dense run (filled: sparse phase)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(amount))
    axes.legend(loc="upper left", ncols=2)
    return figure


def draw_reached(seeds: dict[str, dict[str, Run]], baseline: str) -> Figure:
    """When runs reach the baseline's final loss: validation loss against training time, one panel for each seed.

    Args:
        seeds: for each seed's name its runs by name, with val_loss and seconds, including the baseline.
        baseline: the dense run.
    """
    model = next(iter(seeds.values()))[baseline].model
    figure = _titled(f"When runs reach the loss that {baseline} ends with", model, 4.8)
    every = figure.subplots(1, len(seeds), sharex=True, sharey=True, squeeze=False)[0]
    recipes = {name: run.recipe for runs in seeds.values() for name, run in runs.items()}
    names, colours = list(recipes), dict(zip(recipes, run_colours(recipes.items()), strict=True))
    seen: list[np.ndarray] = []
    for axes, (seed, runs) in zip(every, seeds.items(), strict=True):
        level, end = runs[baseline].last("val_loss"), float(runs[baseline].seconds[-1])
        axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
        for name, run in runs.items():
            place, losses, minutes = names.index(name), run.values("val_loss"), run.seconds / 60
            colour, known = colours[name], np.isfinite(losses)
            axes.plot(minutes[known], losses[known], "-o", color=colour, label=name, **MARKED)
            sparse = known & (run.phases == "sparse")
            axes.plot(minutes[sparse], losses[sparse], "o", color=colour, markersize=4.6)
            seen.append(losses[known])
            reached = run.reaches(level)
            if name != baseline and reached is not None:
                axes.axvline(reached / 60, color=colour, linewidth=1, linestyle=":")
                said, at = f"{reached / end:.2f} of {baseline}'s time", (reached / 60, 0.98 - 0.07 * place)
                axes.annotate(said, at, (-6, 0), ("data", "axes fraction"), "offset points", color=colour, ha="right")
        axes.set_title(seed, loc="left")
        axes.set_xlabel("training time, minutes")
    log_axis(every[0], min(values.min() for values in seen), max(values.max() for values in seen))
    every[0].set_ylabel("validation loss (filled: sparse phase)")
    handles = {label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def plot(paths: list[Path], out: Path | None = None, window: int | None = None, against: str = "tokens") -> Path:
    """Draw the runs into `out`, against "tokens" or "time", and return where it was written."""
    if window is not None and not 1 <= window <= LARGEST:
        raise ConfigError(f"--smooth {window}: give 1 (no smoothing) to {LARGEST} logged steps")
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: give a file name that ends in .png")
    runs = load_runs(paths)
    if out is None and len(runs) == 1:
        out = runs[0].folder / "plot.png"
    out = out or Path(os.path.commonpath([run.folder.resolve().parent for run in runs])) / "loss.png"
    inside = os.path.relpath(out)
    out = out if inside.startswith("..") else Path(inside)
    with rc_context(STYLE):
        figure = Picture(runs, window, against).draw()
        try:
            save(figure, out, paths)
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from None
    return out
