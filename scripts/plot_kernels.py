"""Draw what `scripts/benchmark_kernels.py` measured: speed-ups over dense, and where a step's time goes.

    python -m scripts.plot_kernels docs/kernels    # kernels.json in this folder to kernels.png beside it

The benchmark draws by itself; this draws again without a GPU. Above, a bar a contender and shape: one FFN, forward and
backward, replayed from a CUDA graph where that was timed. Below, a panel a shape: each bar is one step, milliseconds on
the GPU. The six products carry their numbers, those of a kind the same colour: (2) and (5) reduce over the neurons, (4)
and (6) over the tokens.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from configs.errors import ConfigError, first_line, run_program
from scripts import pictures
from scripts.options import Parser
from scripts.pictures import GREY, PALETTE, STYLE

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = PALETTE
PRODUCTS = ("(1)", "(2)", "(3)", "(4)", "(5)", "(6)")
# Stages of a step, left to right, and their colours.
STAGES = dict(zip(PRODUCTS, (BLACK, BLUE, VERMILION, GREEN, BLUE, GREEN), strict=True)) | {
    "products": GREY,  # of cuBLAS, where the profiler does not tell which
    "packing": "#8B5A00",
    "selection": ORANGE,
    "router": PURPLE,
    "permutation": SKY,
    "other": "#C4C4C4",
}
LEGEND = {
    "(1) y1 = x W1ᵀ": BLACK,
    "(2) (5) reduce neurons": BLUE,
    "(3) dh at kept entries": VERMILION,
    "(4) (6) reduce tokens": GREEN,
} | {stage: STAGES[stage] for stage in ("packing", "selection", "router", "permutation", "other")}


def _names(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _speedups(axes: Axes, shapes: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for shape in shapes for name in shape["timed"]))
    height = 0.8 / len(shapes)
    for index, shape in enumerate(shapes):
        shift = (index - (len(shapes) - 1) / 2) * height
        places = [names.index(name) + shift for name in shape["timed"]]
        values = [entry.get("graph_speedup", entry["speedup"]) for entry in shape["timed"].values()]
        notes = ["" if "graph_ms" in entry else ", not replayed" for entry in shape["timed"].values()]
        colour = (BLUE, ORANGE, GREEN)[index % 3]
        bars = axes.barh(places, values, 0.9 * height, color=colour, label=shape["title"])
        texts = [f"{value:.2f}x{note}" for value, note in zip(values, notes, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.margins(x=0.1)
    axes.legend(loc="lower right")
    _names(axes, names)


def _stages(axes: Axes, timed: dict[str, dict[str, Any]]) -> None:
    totals = [sum(entry["stages"].values()) for entry in timed.values()]
    for place, (entry, total) in enumerate(zip(timed.values(), totals, strict=True)):
        left = 0.0
        for stage, colour in STAGES.items():
            width = entry["stages"].get(stage, 0.0)
            axes.barh(place, width, 0.72, left=left, color=colour, edgecolor="white", linewidth=0.6)
            if stage in PRODUCTS and width > 0.03 * max(totals):
                axes.text(left + width / 2, place, stage, ha="center", va="center", color="white", fontsize=9)
            left += width
        axes.text(left, place, f" {total:.2f} ms", va="center", fontsize=9)
    axes.set_xlim(0, 1.1 * max(totals))
    _names(axes, list(timed))


def draw(result: dict[str, Any]) -> Figure:
    """The figure of what kernels.json holds; a shape of which nothing was timed is left out."""
    shapes: list[dict[str, Any]] = []
    for shape in result["shapes"]:
        timed = {name: entry for name, entry in shape["contenders"].items() if "ms" in entry}
        title = f"d = {shape['dim']}, f = {shape['hidden_dim']}"
        if timed:
            shapes.append({"title": title, "timed": timed, "staged": all("stages" in e for e in timed.values())})
    panels = [shape for shape in shapes if shape["staged"]]
    heights = [0.7 + 0.2 * sum(len(shape["timed"]) for shape in shapes)]
    heights += [0.7 + 0.28 * len(shape["timed"]) for shape in panels]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights) + 0.8), dpi=150, layout="constrained")
        axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
        axes[0].set_title(f"speed-up over dense, {result['tokens']} tokens, replayed from a CUDA graph")
        _speedups(axes[0], shapes)
        for panel, shape in zip(axes[1:], panels, strict=True):
            panel.set_title(f"where the time goes, ms: {shape['title']}")
            _stages(panel, shape["timed"])
        if panels:
            untold = any("products" in e["stages"] for shape in panels for e in shape["timed"].values())
            legend = LEGEND | ({"products not told apart": GREY} if untold else {})
            handles = [Patch(color=colour, label=text) for text, colour in legend.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9.5)
    return figure


def save(file: Path) -> Path:
    """Draw a kernels.json into a PNG beside it, and return where it was written."""
    with rc_context(STYLE):
        return pictures.save(draw(json.loads(file.read_text())), file.with_suffix(".png"), [file])


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m scripts.plot_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="it holds a kernels.json, such as docs/kernels")
    file = parser.parse_args(arguments).folder / "kernels.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; python -m scripts.benchmark_kernels writes it")
    try:
        print(save(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be drawn ({first_line(error)}): measure it again") from error


if __name__ == "__main__":
    run_program(main)
