"""The plot of synthetic runs: an image of the right size, what it is drawn from, and every refusal."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from configs.errors import ConfigError, run_program
from scripts import pictures, plot, runs

THREE_PHASES = (("dense", 0.2), ("sparse", 0.8), ("dense", 1.0))


def write_run(folder: Path, phases=THREE_PHASES, recipe="venom_2of16", steps=200, layers=3, drop=()) -> Path:
    """A dump folder whose loss decays, with a validation and sparsity health every tenth logged step."""
    folder.mkdir(parents=True)
    config = {"recipe": f"recipes/{recipe}.toml", "model": {"name": "llama_relu2", "flavor": "debug"}}
    (folder / "run.json").write_text(json.dumps({"config": config, "versions": {}}))
    random = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(2, steps + 1, 2):
            phase = next(name for name, end in phases if step <= end * steps)
            loss = 2.8 + 7 * math.exp(-step / 10) + random.normal(0, 0.04)
            line = {"step": step, "phase": phase, "loss": loss, "tokens": step * 4096, "lr": 6e-4, "grad_norm": None}
            line["tokens_per_second"] = 1e4 if step == 2 else 1e6
            if step % 20 == 0:
                line |= {"val_loss": loss, "val_bpb": loss / 3, "nonzero_share": 0.3, "layers/0/nonzero_share": 0.4}
                if phase == "sparse":
                    line["val_loss_sparse"] = loss + 0.1
                    for metric in ("energy_kept", "flip_rate", "router_balance"):
                        line |= {metric: 0.5} | {f"layers/{i}/{metric}": 0.5 + 0.01 * i for i in range(layers)}
            kept = {key: value for key, value in line.items() if key.split("/")[-1] not in drop}
            file.write(json.dumps(kept) + "\n")
    return folder


def pixels(path: Path, tallest: int = 2400) -> np.ndarray:
    """The image, [height, width, channels], after a check of its size and that something is drawn."""
    picture = image.imread(path)
    height, width = picture.shape[:2]
    assert 1400 <= width <= 1600
    assert 600 <= height <= tallest
    assert picture[..., :3].std() > 0.02
    return picture


def drawn(*folders: Path) -> Figure:
    return pictures.Picture(runs.load_runs(list(folders)), None).draw()


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left").split(":")[0] for axes in figure.axes if axes.get_title(loc="left")]


def texts(figure: Figure) -> str:
    legends = [legend for legend in figure.findobj(Legend) if isinstance(legend, Legend)]
    return "\n".join(text.get_text() for legend in legends for text in [legend.get_title(), *legend.get_texts()])


@pytest.fixture(autouse=True)
def style():
    """The figures that a test draws itself look as the script's do."""
    with pictures.rc_context(pictures.STYLE):
        yield


def command(*arguments: str | Path, module: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    start = ["-m", "scripts.plot"] if module else [str(ROOT / "scripts" / "plot.py")]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_one_run_as_a_module(tmp_path):
    run = write_run(tmp_path / "run")
    result = command(run)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"wrote {run / 'plot.png'}\n", "")
    pixels(run / "plot.png")


def test_several_runs_as_a_file_from_another_folder(tmp_path):
    folder = tmp_path / "study"
    runs = [write_run(folder / "a"), write_run(folder / "b", (("dense", 1.0),), "dense")]
    (folder / "README.md").write_text("what a shell's * brings along")
    (folder / "hf").mkdir()
    others = [folder / "README.md", folder / "hf"]
    result = command(*runs, *others, module=False, cwd=tmp_path)
    said = f"left out, no run: {others[0]}, {others[1]}\nwrote study/loss.png\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")
    pixels(folder / "loss.png")


def test_a_metrics_file_without_run_json(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "run.json").unlink()
    assert pictures.plot([run / "metrics.jsonl"], tmp_path / "x.png", 1) == tmp_path / "x.png"
    pixels(tmp_path / "x.png")


def test_panels_of_one_run(tmp_path):
    figure = drawn(write_run(tmp_path / "run"))
    assert titles(figure) == [*pictures.HEALTH, "tokens a second", "learning rate"]
    assert figure.get_suptitle() == "llama_relu2 debug  ·  venom_2of16"
    assert "training, on the documents being read" in texts(figure) and "unigram" not in texts(figure)
    assert "run (venom_2of16): validation" in texts(figure)
    assert "validation, with the pattern" in texts(figure)
    (shade,) = figure.axes[0].patches
    extent = shade.get_extents().transformed(figure.axes[0].transData.inverted())
    assert extent.intervalx == pytest.approx([40 * 4096, 160 * 4096])
    losses = runs.load_run(tmp_path / "run").values("loss")
    low, high = figure.axes[0].get_ylim()
    assert low < losses.min() and high > losses[0], "the first point is in the frame"
    left, right = figure.axes[0].get_xlim()
    assert left < 0 and right > 200 * 4096, "the first and the last marker are whole"


def test_a_picture_says_what_it_was_drawn_from(tmp_path):
    folder, file = tmp_path / "study", tmp_path / "study" / "one" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1}\n')
    out = pictures.save(Figure(figsize=(1, 1)), tmp_path / "out.png", [folder, file])
    stored = json.loads(Image.open(out).text[pictures.DATA])
    assert stored == {"study": pictures.digest(folder), "study/one/metrics.jsonl": pictures.digest(file)}
    (folder / "README.md").write_text("no data")
    assert pictures.digest(folder) == stored["study"]
    seen = {stored["study"]}
    for change in (
        lambda: file.write_text('{"step": 2}\n'),
        lambda: (folder / "one" / "run.json").write_text("{}"),
        lambda: (folder / "one").rename(folder / "other"),
        lambda: (folder / "run.json").write_text("{}"),
    ):
        change()
        assert pictures.digest(folder) not in seen
        seen.add(pictures.digest(folder))


@pytest.mark.parametrize("drop", [("flip_rate",), ("flip_rate", "router_balance"), tuple(pictures.HEALTH), ("lr",)])
def test_only_what_is_there_is_drawn(tmp_path, drop):
    run = write_run(tmp_path / "run", drop=drop)
    assert not set(drop) & set(titles(drawn(run)))
    pixels(pictures.plot([run]))


def test_runs_whose_phases_differ_get_strips(tmp_path):
    same = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    other = write_run(tmp_path / "c", (("dense", 0.5), ("sparse", 1.0)))
    assert not pictures.Picture(runs.load_runs(same), None).strips
    figure = drawn(same[0], other)
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["phases"]
    assert not figure.axes[0].patches
    assert len(figure.axes[1].collections) == 5


def test_many_runs_and_runs_of_one_name(tmp_path):
    runs = [write_run(tmp_path / str(i) / "_$run$", recipe=f"recipe{i}") for i in range(9)]
    figure = drawn(*runs)
    assert all(f"{i}/_$run$ (recipe{i}): validation" in texts(figure) for i in range(9))
    assert figure.get_suptitle() == "llama_relu2 debug  ·  9 recipes"


def test_a_spike_does_not_set_the_range(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[50] = json.dumps(json.loads(lines[50]) | {"loss": 1e4})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert drawn(run).axes[0].get_ylim()[1] < 20


def test_the_unigram_entropy_is_a_line_where_it_is_the_runs_own(tmp_path):
    def write(name, entropy):
        folder = write_run(tmp_path / name)
        about = json.loads((folder / "run.json").read_text()) | {"unigram_entropy": entropy}
        (folder / "run.json").write_text(json.dumps(about))
        return folder

    one, same, other = write("one", 5.125), write("same", 5.125), write("other", 6.0)
    for figure in (drawn(one), drawn(one, same)):
        assert "unigram entropy 5.125" in texts(figure)
        assert [line for line in figure.axes[0].lines if list(line.get_ydata()) == [5.125, 5.125]]
    assert "unigram" not in texts(drawn(one, other))


def test_a_model_is_named_by_its_own_shape():
    model = {"name": "llama_relu2", "flavor": "160m", "dim": None, "n_layers": None}
    name = runs.model_name
    assert name({"config": {"model": model}, "parameters": 129_000_000}) == "llama_relu2 160m, 129 M parameters"
    assert name({"config": {"model": model | {"dim": 256}}, "parameters": 12062976}) == "llama_relu2, 12.1 M parameters"
    assert name({"config": {"model": model}, "parameters": 1_040_000_000}) == "llama_relu2 160m, 1.04 B parameters"
    assert name({}) == name({"config": {"model": 3}}) == ""


def test_a_recipe_has_one_colour_in_all_pictures():
    table = pictures.RECIPE_COLOURS
    colours = pictures.run_colours
    assert len(set(table.values()) | set(pictures.OTHER_COLOURS)) == len(table) + len(pictures.OTHER_COLOURS)
    assert table.keys() <= {path.stem for path in (ROOT / "recipes").glob("*.toml")}, "no colour for what is gone"
    named = [("dense_s0", "dense"), ("variant_s0", "columns_half"), ("columns_half_s0", "columns_half")]
    assert colours(named) == [table["dense"], pictures.OTHER_COLOURS[0], table["columns_half"]]
    assert colours(named[1:]) == colours(named)[1:]
    assert colours([("a/variant", "columns_half")]) == [table["columns_half"]]
    assert colours([("variant", "columns_half"), ("columns_half_s0, step 9", "columns_half")]) == colours(named[1:])
    assert colours([("mine", "mine")]) == [pictures.OTHER_COLOURS[0]]


def test_a_logarithmic_axis_has_few_round_numbers():
    for low, high in ((3.0, 3.2), (1.9, 3.0), (1.9, 9.0), (0.01, 9.0)):
        axes = Figure().subplots()
        pictures.log_axis(axes, low, high)
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
        assert bottom < low and high < top and 3 <= len(ticks) <= 32, ticks


def write_shares(folder: Path, shares: dict[float, float | None], begin: float = 0.2) -> Path:
    """A run whose sparse phases end at these parts of it with these shares, None: the recipe's quarter."""
    phases = [("dense", begin), *(("sparse", end) for end in shares), ("dense", 1.0)]
    run = write_run(folder, phases, "columns_quarter", steps=400, drop=tuple(pictures.HEALTH))
    about = json.loads((run / "run.json").read_text())
    about["config"]["activations"] = {"pattern": "groups", "keep": 0.25}
    (run / "run.json").write_text(json.dumps(about))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["phase"] == "sparse" and (own := next(shares[end] for end in shares if line["step"] <= 400 * end)):
            line["keep"] = own
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_sparse_phases_of_different_shares_are_parted_and_say_them(tmp_path):
    rising = write_shares(tmp_path / "rising", {0.5: 0.125, 0.8: None})
    figure = drawn(rising)
    dotted = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":" and line.get_zorder() == 1]
    assert [line.get_xdata()[0] for line in dotted] == [200 * 4096]
    said = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    assert said == {"keep 1/8": pytest.approx(140 * 4096), "keep 1/4": pytest.approx(260 * 4096)}
    assert "sparse phase; dotted line: another share" in texts(figure)
    for constant in (write_run(tmp_path / "venom"), write_shares(tmp_path / "constant", {0.8: None})):
        figure = drawn(constant)
        assert not figure.axes[0].texts and "dotted" not in texts(figure)

    same = drawn(rising, write_shares(tmp_path / "again", {0.5: 0.125, 0.8: None}))
    assert {text.get_text() for text in same.axes[0].texts} == said.keys()
    assert "sparse phase; dotted line: another share" in texts(same)
    falling = write_shares(tmp_path / "falling", {0.5: 0.334, 0.8: 0.1875})
    assert pictures.Picture(runs.load_runs([rising, falling]), None).strips, "they end together, but keep other shares"
    other = drawn(rising, falling, tmp_path / "constant", write_run(tmp_path / "dense", [("dense", 1.0)], "dense"))
    assert not other.axes[0].texts
    assert "sparse phase; gap: another share" in texts(other)
    strips = [(text.get_text(), text.get_position()[1]) for text in other.axes[1].texts]
    shares = [("keep 1/8", 0), ("keep 1/4", 0), ("keep 0.334", 1), ("keep 3/16", 1), ("keep 1/4", 2)]
    assert strips == shares
    assert len(other.axes[1].collections) == 4 + 1 + 4 + 1 + 3 + 1  # phases, and gaps between two


@pytest.mark.parametrize(
    "shares, written",
    [
        ({0.8: 0.375}, ["keep 3/8"]),
        ({0.5: 0.125, 0.8: None, 0.95: 0.5}, ["keep 1/8", "keep 1/4", "keep 1/2"]),
        ({0.21: 0.0625, 0.25: 0.334, 0.29: 0.125, 0.8: None}, ["1/8", "keep 1/4"]),
    ],
    ids=["one", "three", "short"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_shares_cover_nothing(tmp_path, shares, written, number):
    """They are above the curves, each in the width of its phase, and below the legend and the title."""
    figure = drawn(*(write_shares(tmp_path / f"run{place}", shares) for place in range(number)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    assert axes.get_window_extent().width >= pictures.NARROWEST * figure.dpi
    assert [text.get_text() for text in axes.texts] == written
    said = [text.get_window_extent(renderer) for text in axes.texts]
    legends = [legend.get_window_extent(renderer) for legend in axes.findobj(Legend)]
    above = [legend for legend in legends if legend.y0 > axes.get_window_extent().y1]
    above.append(figure._suptitle.get_window_extent(renderer))
    assert len(above) == number
    for place, each in enumerate(said):
        assert each.y0 > axes.get_window_extent().y1
        for other in (*said[:place], *above):
            assert not each.overlaps(other), axes.texts[place].get_text()


def test_a_share_that_its_bar_has_no_room_for_is_left_out(tmp_path):
    short = write_shares(tmp_path / "short", {0.21: 0.0625, 0.25: 0.334, 0.29: 0.125, 0.8: None})
    figure = drawn(short, write_run(tmp_path / "dense", [("dense", 1.0)], "dense"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, renderer = figure.axes[1], canvas.get_renderer()
    assert [text.get_text() for text in axes.texts] == ["1/8", "keep 1/4"]
    bars = [bar.get_paths()[0].get_extents(axes.transData) for bar in axes.collections]
    for text in axes.texts:
        own = text.get_window_extent(renderer)
        assert any(bar.x0 < own.x0 < own.x1 < bar.x1 and bar.y0 < own.y0 < own.y1 < bar.y1 for bar in bars)


def test_a_share_is_a_simple_fraction_where_it_is_one():
    shares = [0.125, 0.1875, 0.3, 0.334, 1.0, 1e-9, 1e308, -1.0, math.nan, None]
    words = ["keep 1/8", "keep 3/16", "keep 3/10", "keep 0.334", "keep 1", "keep 1e-09", "", "", "", ""]
    assert list(map(pictures.share_in_words, shares)) == words
    damaged = {"config": {"activations": {"pattern": "groups", "keep": 10**400}}}  # which no float holds
    assert pictures.share_in_words(runs.recipe_share(damaged)) == ""


def test_smoothing_stops_at_a_change_of_phase():
    values = np.array([1.0, 2.0, 3.0, 10.0, math.nan, 12.0])
    index = np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(pictures.smooth(values, index, 3), [1.5, 2.0, 2.5, 11.0, math.nan, 11.0])
    np.testing.assert_allclose(pictures.smooth(values, index, 1), values)


def test_training_time_leaves_compilation_out(tmp_path):
    run = runs.load_run(write_run(tmp_path / "run", steps=200))
    # Two steps of 4096 tokens a line at 1e6 tokens a second; the first line, at 1e4, compiles.
    assert run.seconds == pytest.approx([8192e-6 * line for line in range(1, 101)])
    assert run.rate("dense") == run.rate("sparse") == 1e6
    # So does one in the middle of a phase, where a run goes on from a checkpoint.
    run.lines[5] |= {"graphs_compiled": 2, "tokens_per_second": 1e4}
    del run.seconds
    assert run.seconds == pytest.approx([8192e-6 * line for line in range(1, 101)])
    run.lines[20]["switch_seconds"] = 2.0  # where the sparse phase begins; elsewhere it is in the line's rate
    run.lines[30]["switch_seconds"] = 0.5
    del run.seconds
    assert run.seconds == pytest.approx([8192e-6 * line + 2.0 * (line > 20) for line in range(1, 101)])
    del run.seconds, run.lines[20]["switch_seconds"]
    picture = pictures.Picture([run], None, "time")
    assert picture.x_label == "training time, seconds" and picture.spans[0][1] == ("sparse", *run.seconds[[19, 79]])
    out = pictures.plot([tmp_path / "run"], tmp_path / "time.png", against="time")
    pixels(out)
    for line in run.lines[50:80]:  # a sparse phase with a share of its own, whose steps take twice as long
        line |= {"keep": 0.5, "tokens_per_second": 5e5}
    run.lines[50]["graphs_compiled"] = 1
    del run.seconds, run.phase_index
    assert np.diff(run.seconds)[[48, 49, 50, 78, 79]] == pytest.approx(8192e-6 * np.array([1, 2, 2, 2, 1]))
    del run.lines[3]["tokens_per_second"], run.seconds
    with pytest.raises(ConfigError, match=r"--against time: .*run lacks tokens_per_second"):
        pictures.Picture([run], None, "time")


def test_the_front_is_what_nobody_beats_in_both(tmp_path):
    points = {"dense": (1.0, 2.0), "good": (0.7, 2.01), "fast": (0.5, 2.1), "slow": (0.9, 2.05), "equal": (0.7, 2.02)}
    figure = pictures.draw_front(points, "dense", 0.01, "time", colours={"good": "#0072B2"}, model="a model")
    assert figure.get_suptitle().endswith("·  a model")
    (axes,) = figure.axes
    (steps,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(zip(*steps.get_data(), strict=True)) == [points[name] for name in ("fast", "good", "dense")]
    labels = {text.get_text(): text.get_position() for text in axes.texts}
    assert set(labels) == set(points)
    marks = {tuple(map(float, line.get_xydata()[0])): line for line in axes.lines if line.get_marker() == "o"}
    assert marks[points["good"]].get_markerfacecolor() == "#0072B2", "on the front: filled"
    assert marks[points["slow"]].get_markerfacecolor() == "white"
    assert labels["equal"][1] - labels["good"][1] >= 0.034, "labels of near points do not cover each other"
    figure.savefig(tmp_path / "front.png")
    pixels(tmp_path / "front.png")


def test_tokens_behind_are_those_that_dense_did_not_need(tmp_path):
    def run(name, losses):
        lines = [{"step": 1, "tokens": 10, "phase": "dense", "loss": 9.0}]
        lines += [
            {"step": 10 * i, "tokens": 100 * i, "phase": "sparse" if i == 2 else "dense", "val_loss": loss}
            for i, loss in enumerate(losses, 1)
        ]
        return runs.Run(name, "", "", tmp_path, lines)

    # A loss that rises once is not what dense is measured by; one that it never had has no answer.
    dense, other = run("dense", [8.0, 6.0, 7.0, 4.0]), run("other", [8.0, 7.0, 5.0, 3.9])
    tokens, behind = pictures.tokens_behind(other, dense)
    assert list(tokens) == [100, 200, 300, 400]
    assert list(behind[:3]) == [0, 50, -50] and np.isnan(behind[3])
    figure = pictures.draw_behind({"other": other, "dense": dense}, dense)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["other", "dense"]
    assert figure.get_suptitle() == "How many tokens behind the dense run, at the same loss"
    figure.savefig(tmp_path / "behind.png")
    pixels(tmp_path / "behind.png")


def test_reached_is_when_a_run_has_the_loss_that_dense_ends_with(tmp_path):
    def run(name, losses, rate):
        lines = [
            {"step": i, "tokens": 600 * i, "phase": "dense", "tokens_per_second": rate, "val_loss": loss}
            for i, loss in enumerate(losses, 1)
        ]
        return runs.Run(name, "", "", tmp_path, lines)

    dense, fast, slow = run("d", [5.0, 4.0, 3.0], 10), run("f", [5.0, 3.1, 3.0, 2.5], 20), run("s", [5.0, 4.5], 10)
    assert dense.reaches(3.0) == 180 and fast.reaches(3.0) == 90 and slow.reaches(3.0) is None
    figure = pictures.draw_reached(
        {"seed 0": {"dense": dense, "fast": fast}, "seed 1": {"dense": dense, "slow": slow}}, "dense"
    )
    assert figure.get_suptitle() == "When runs reach the loss that dense ends with"
    first, second = figure.axes
    assert first.get_ylim()[1] > 5.0, "the first validation is in the frame"
    assert [text.get_text() for text in first.texts] == ["0.50 of dense's time"] and not second.texts
    assert first.texts[0].xy[0] == 1.5 and (first.get_title("left"), second.get_title("left")) == ("seed 0", "seed 1")
    figure.savefig(tmp_path / "reached.png")
    pixels(tmp_path / "reached.png")


def test_a_phase_without_values_breaks_the_line(tmp_path):
    phases = (("sparse", 0.3), ("dense", 0.6), ("sparse", 1.0))
    run = runs.load_run(write_run(tmp_path / "run", phases))
    assert np.isnan(pictures.points(run, run.tokens, run.values("energy_kept"))[1]).sum() == 1
    assert not np.isnan(pictures.points(run, run.tokens, run.values("nonzero_share"))[1]).any()


def test_null_nan_and_missing_values_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = ['"loss": 3.0, "tokens": 10', '"loss": NaN', '"loss": null, "lr": Infinity', '"loss": 2.0, "tokens": 40']
    file.write_text("".join(f'{{"step": {step}, {row}}}\n' for step, row in enumerate(rows, start=1)))
    run = runs.load_run(file)
    np.testing.assert_array_equal(run.values("loss"), [3.0, math.nan, math.nan, 2.0])
    np.testing.assert_array_equal(run.tokens, [10, 20, 30, 40])
    pixels(pictures.plot([file]))


def test_a_single_line_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.7}\n')
    pixels(pictures.plot([tmp_path]))


@pytest.mark.parametrize("cut", ['{"step": 999, "lo', '{"step": 999', "{", "\0\0\0"])
def test_a_last_line_cut_off_is_ignored(tmp_path, cut):
    run = write_run(tmp_path / "run")
    whole = runs.load_run(run).lines
    with (run / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert runs.load_run(run).lines == whole


def test_a_complete_last_line_without_newline_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.7}\n{"step": 2, "loss": 9.6}')
    assert len(runs.load_run(tmp_path).lines) == 2


def test_steps_logged_again_after_a_resume_replace_the_first(tmp_path):
    steps = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (4, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {loss}}}\n' for s, loss in steps))
    assert [(line["step"], line["loss"]) for line in runs.load_run(tmp_path).lines] == [(1, 5.0), (2, 4.5), (4, 2.0)]


GOOD = '{"step": 1, "loss": 9.7}\n'
REFUSED = {
    "empty": ("", "metrics.jsonl: holds no logged step; wait"),
    "only a cut line": ('{"step": 1', "metrics.jsonl: holds no logged step; wait"),
    "broken": (GOOD + '{"step": 2,\n' + GOOD, "metrics.jsonl, line 2: not a line of metrics"),
    "broken last, newline written": (GOOD + "{\n", "metrics.jsonl, line 2: not a line of metrics"),
    "not an object": (GOOD + "3\n", "metrics.jsonl, line 2: not a line of metrics"),
    "no step": (GOOD + '{"loss": 1}\n', "metrics.jsonl, line 2: not a line of metrics (no `step`); delete or mend"),
    "step is text": (GOOD + '{"step": "2"}\n', "metrics.jsonl, line 2: not a line of metrics"),
    "not text": (GOOD + "\x80\x81\n", "metrics.jsonl, line 2: not a line of metrics"),
    "no loss": ('{"step": 1, "loss": NaN}\n', "metrics.jsonl: no line holds a finite loss; give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_metrics(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "metrics.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        pictures.plot([tmp_path])
    assert f"{tmp_path}/{message}" in str(error.value)
    assert not (tmp_path / "plot.png").exists()


def test_refused_arguments(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        (str(tmp_path / "none"),): f"error: {tmp_path}/none: no such folder or file; give the dump folder",
        (str(empty),): f"error: {empty}: no metrics.jsonl in this folder; give the dump folder",
        (str(run), "--smooth", "0"): "error: --smooth 0: give 1 (no smoothing) to 2147483647",
        (str(run), "--smooth", "9" * 30): "error: --smooth 999",
        (str(run), "-o", "plot.pdf"): "error: --out plot.pdf: give a file name that ends in .png",
        (
            str(run),
            "-o",
            f"{empty}/no/x.png",
        ): f"error: {empty}/no/x.png: cannot be written (No such file or directory)",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            run_program(partial(plot.main, list(arguments)))
        output = capsys.readouterr()
        assert stopped.value.code == 2
        assert output.err.startswith(message)
        assert output.err.count("\n") == 1
        assert not output.out


def test_refused_run_json(tmp_path):
    run = write_run(tmp_path / "run")
    for content in ("{", "[]"):
        (run / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.json: not a run\.json .*; mend it, or delete it"):
            runs.load_run(run)


def test_ctrl_c_is_one_line_in_every_program():
    """While it imports and afterwards: `scripts` is the first module that any of them imports."""
    for line, said in (
        ("raise KeyboardInterrupt", "interrupted\n"),
        ("raise KeyboardInterrupt('2 of 3 are done')", "interrupted: 2 of 3 are done\n"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", f"import scripts\n{line}"], cwd=ROOT, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (130, said)
    result = subprocess.run([sys.executable, "-c", "import scripts\n1 / 0"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_refusal_has_no_traceback(tmp_path):
    result = command(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {tmp_path}: no metrics.jsonl in this folder; give the dump folder (job.dump_folder) of a run\n"
    )
