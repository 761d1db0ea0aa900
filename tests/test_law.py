"""The fit of losses, effective tokens, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from configs.errors import ConfigError
from scripts import law
from scripts.law import Cell, Law
from scripts.pictures import DATA
from scripts.tables import law_table

TRUE = Law(1.8, 60.0, 0.3, 900.0, 0.32)
SIZES, RATIOS = (12e6, 25e6, 48e6, 129e6), (2.5, 5.0, 10.0, 20.0, 40.0)


def cells(true, sizes, noise=0.0, seeds=2):
    random = np.random.default_rng(1)
    points = [(n, ratio * n) for n in sizes for ratio in RATIOS]
    return [Cell(n, d, tuple(true.loss(n, d) + noise * random.standard_normal(seeds))) for n, d in points]


def fitted(of):
    return law.fit(of, [sum(cell.values) / len(cell.values) for cell in of])


def test_the_law_is_found_again():
    exact = fitted(cells(TRUE, SIZES))
    assert exact.b == pytest.approx(TRUE.b, rel=1e-3) and exact.a == pytest.approx(TRUE.a, rel=1e-3)
    assert exact.loss(7e9, 140e9) == pytest.approx(TRUE.loss(7e9, 140e9), rel=1e-3)
    noisy = fitted(cells(TRUE, SIZES, noise=0.003))
    assert noisy.loss(1e9, 20e9) == pytest.approx(TRUE.loss(1e9, 20e9), abs=0.05)
    one = fitted(cells(TRUE, SIZES[:1]))
    assert one.b == pytest.approx(TRUE.b, rel=1e-3) and one.scale_n == 0
    assert one.constant == pytest.approx(TRUE.constant + TRUE.scale_n / SIZES[0] ** TRUE.a, rel=1e-3)


def test_effective_tokens_are_where_dense_has_the_loss():
    for penalty in (-0.02, 0.0, 0.05):
        share = TRUE.share(1e9, penalty)
        assert TRUE.loss(12e6, share * 1e9) == pytest.approx(TRUE.loss(12e6, 1e9) + penalty)
    assert TRUE.share(1e9, -1.01 * TRUE.scale_d / 1e9**TRUE.b) == math.inf  # lower than with all tokens there are
    grown = TRUE.loss(12e6, 1e9) - TRUE.loss(12e6, 1e9 * math.exp(1e-4))
    assert grown / 1e-4 == pytest.approx(TRUE.slope(1e9), rel=1e-3)


def test_a_second_size_adds_a_constant_to_a_law_with_a_given_exponent():
    points = [(12e6, 6e7), (12e6, 24e7), (24e6, 48e7)]
    given = [Cell(n, d, (TRUE.loss(n, d),)) for n, d in points]
    found = law.fit(given, [cell.values[0] for cell in given], exponent=TRUE.b)
    for n, d in [*points, (24e6, 1e8)]:
        assert found.loss(n, d) == pytest.approx(TRUE.loss(n, d), rel=1e-6)
    assert found.share(48e7, 0.02) == pytest.approx(TRUE.share(48e7, 0.02), rel=1e-6)
    for few in ([given[0], given[2]], [*given, Cell(48e6, 96e7, (2.5,))]):
        with pytest.raises(ConfigError, match="one size or two, and of 2 budgets or more of one of them"):
            law.fit(few, [cell.values[0] for cell in few], exponent=TRUE.b)


@pytest.mark.parametrize("sizes, budgets, message", [(1, 2, "2 budgets and 1 sizes"), (2, 3, "6 budgets and 2 sizes")])
def test_a_law_needs_budgets_and_sizes(sizes, budgets, message):
    few = [Cell(n, ratio * n, (3.0,)) for n in SIZES[:sizes] for ratio in RATIOS[:budgets]]
    with pytest.raises(ConfigError, match=message):
        law.fit(few, [3.0] * len(few))


def store(folder, name, seed, tokens, loss, parameters=12_000_000):
    run = folder / f"{name}_s{seed}"
    run.mkdir(parents=True)
    phases = [["dense", 1, 10]] if name.startswith("dense") else [["dense", 1, 1], ["sparse", 2, 10]]
    about = {"config": {"debug": {"seed": seed}}, "parameters": parameters, "phases": phases}
    (run / "run.json").write_text(json.dumps(about))
    row = {"step": 10, "tokens": tokens, "loss": loss, "val_loss": loss}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def evidence(tmp_path):
    """A file of evidence and its runs: three dense budgets and a recipe 0.05 and 0.07 above dense."""
    study = tmp_path / "study"
    for tokens in (30_000_000, 60_000_000, 120_000_000):
        for seed in (0, 1):
            loss = TRUE.loss(12e6, tokens) + 0.01 * seed
            store(study, f"dense_{tokens // 1_000_000}", seed, tokens, loss)
            if tokens == 120_000_000:
                store(study, "quarter", seed, tokens, loss + 0.05 + 0.02 * seed)
    told = {
        "dense": [{"study": "study", "run": f"dense_{millions}"} for millions in (30, 60, 120)],
        "recipes": {"columns_quarter": {"runs": [{"study": "study", "run": "quarter", "dense": "dense_120"}]}},
    }
    file = tmp_path / "evidence.json"
    file.write_text(json.dumps(told))
    return file


def test_a_file_of_evidence(evidence):
    read = law.read(evidence, evidence.parent)
    (cell,) = read.recipes["columns_quarter"]
    assert cell.values == pytest.approx((0.05, 0.07))  # paired by seed
    share, low, high = read.shares("columns_quarter", 0)
    assert share == pytest.approx(read.law.share(1.2e8, 0.06)) and 0 < low < share < high
    assert law.draw(read).axes[1].get_yticklabels()[0].get_text() == "columns_quarter\n12M, 10 tokens each"
    many = {str(number): read.recipes["columns_quarter"] for number in range(9)}  # more than there are colours
    penalties = dict.fromkeys(many, read.drawn_penalties["columns_quarter"])
    drawn = law.draw(replace(read, recipes=many, drawn_penalties=penalties))
    assert len(drawn.axes[1].get_yticklabels()) == len(many)
    again = law.read.__wrapped__(evidence, evidence.parent)
    assert again.shares("columns_quarter", 0) == (share, low, high)  # the draws are those of one seed


def test_two_budgets_and_one_seed_take_an_exponent_and_deviations(evidence):
    told = json.loads(evidence.read_text())
    for entry in told["dense"] + told["recipes"]["columns_quarter"]["runs"]:
        entry["study"] = str(evidence.parent / "study")
    told["dense"].pop(1)
    for run in ("dense_30", "dense_120", "quarter"):
        shutil.rmtree(evidence.parent / "study" / f"{run}_s1")

    def read(exponent, dense, penalty):
        given = {"exponent": exponent, "deviation": {"dense": dense, "penalty": penalty}}
        evidence.write_text(json.dumps(told | given))
        found = law.read.__wrapped__(evidence)
        return found.law, *found.shares("columns_quarter", 0)

    known, share, low, high = read([TRUE.b, TRUE.b], 1e-9, 1e-9)
    assert known.loss(12e6, 6e7) == pytest.approx(TRUE.loss(12e6, 6e7), rel=1e-6)
    assert share == pytest.approx(TRUE.share(1.2e8, 0.05), rel=1e-6) and high - low < 1e-6
    between, _, low, high = read([0.1, 0.9], 1e-9, 1e-9)
    assert between.b == pytest.approx(0.5) and high - low > 0.01
    _, _, low, high = read([TRUE.b, TRUE.b], 1e-9, 0.01)
    assert high - low > 0.01
    _, share, low, _ = read([TRUE.b, TRUE.b], 1.0, 0.01)  # in many draws the loss does not fall with the tokens
    assert 0 <= low < 0.01 < share
    store(evidence.parent / "study", "dense_large", 0, 200_000_000, TRUE.loss(24e6, 2e8), 24_000_000)
    told["dense"].append({"study": str(evidence.parent / "study"), "run": "dense_large"})
    read([TRUE.b, TRUE.b], 1e-9, 0.01)
    law.read.cache_clear()
    table = law_table(evidence)
    constants = " or ".join(
        f"{TRUE.constant + 60.0 / n**0.3:.3f} ({name})" for n, name in ((12e6, "12M"), (24e6, "24M"))
    )
    assert f"Dense law: L = {constants} + 900 / D^0.320" in table
    assert "not fitted: 0.32, and 0.32 to 0.32 in intervals" in table and "0.01 (over dense) nats" in table


def test_an_interval_of_a_recipe_that_dense_runs_never_reach_is_infinite():
    tokens, lower = 1e9, -1.1 * TRUE.scale_d / 1e9**TRUE.b
    recipes = {"better": [Cell(12e6, tokens, (lower,))]}
    drawn = {"better": np.array([[0.0]] + [[lower]] * 9)}
    shares = law.Evidence([], recipes, TRUE, [TRUE] * 10, drawn).shares("better", 0)
    assert shares[0] == shares[2] == math.inf and shares[1] > 1


def test_intervals_hold_what_is_true():
    """Of 30 sets of runs, the 90% interval of effective tokens holds the true share in 27, give or take."""
    true, random, inside = Law(2.6, 0.0, 1.0, 2.6e5, 0.69), np.random.default_rng(0), 0
    budgets, share = (3e7, 6e7, 1.2e8), Law(2.6, 0.0, 1.0, 2.6e5, 0.69).share(1.2e8, 0.02)
    for _ in range(30):
        dense = [Cell(1e7, d, tuple(true.loss(1e7, d) + 0.01 * random.standard_normal(3))) for d in budgets]
        own = Cell(1e7, 1.2e8, tuple(0.02 + 0.003 * random.standard_normal(3)))
        generator = np.random.default_rng(random.integers(1 << 30))
        laws = [law.fit(dense, list(means), true) for means in law._drawn(dense, generator, dense)[:20]]
        penalties = {"one": law._drawn([own], generator, [own])[:20]}
        read = law.Evidence(dense, {"one": [own]}, fitted(dense), laws, penalties)
        inside += read.shares("one", 0)[1] < share < read.shares("one", 0)[2]
    assert 22 <= inside <= 30


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda told: told["dense"].pop(), "2 budgets"),
        (lambda told: told["dense"].append(told["dense"][0]), "dense has the runs study: dense_30 twice"),
        (
            lambda told: told["recipes"]["columns_quarter"].update(runs=2 * told["recipes"]["columns_quarter"]["runs"]),
            "columns_quarter has the runs study: quarter twice",
        ),
        (lambda told: told["dense"][0].update(run="none"), "study has no run none: there are dense_120"),
        (lambda told: told["recipes"]["columns_quarter"]["runs"][0].update(dense="dense_60"), "differ in their tokens"),
        (lambda told: told.pop("recipes"), "not a file of evidence"),
        (lambda told: told["recipes"].clear(), "has no recipes"),
        (lambda told: told["recipes"]["columns_quarter"]["runs"].clear(), "recipe columns_quarter has no runs"),
        (lambda told: told["dense"][0].update(what="x"), "not a file of evidence"),
        (lambda told: told.update(exponent=[0.5]), "not a file of evidence"),
        (lambda told: told.update(exponent=[0.5, 0.4]), r"exponent = \[0.5, 0.4\]: give its range"),
        (lambda told: told.update(exponent=[0.5, True]), "true is no number"),
        (lambda told: told.update(exponent=["0.5", 0.6]), '"0.5" is no number'),
        (lambda told: told.update(exponent=[0.5, 10**400]), "a number is out of bounds"),
        (lambda told: told.update(deviation={"dense": True, "penalty": 0.01}), "true is no number"),
        (lambda told: told.update(deviation={"dense": 0.01}), 'give "dense" and "penalty"'),
        (lambda told: told.update(deviation={"dense": 0.01, "penalty": 0}), 'give "dense" and "penalty"'),
    ],
)
def test_a_wrong_file_is_one_message(evidence, change, message):
    told = json.loads(evidence.read_text())
    change(told)
    evidence.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=message):
        law.read.__wrapped__(evidence, evidence.parent)


@pytest.mark.parametrize("row", [{"step": 9, "val_loss": 3.0}, {"step": 10, "val_loss": None}, {"step": 10}])
def test_a_run_that_has_not_ended_does_not_count(evidence, row):
    """Nor one without a validation loss at its end: an earlier one is of fewer tokens."""
    with (evidence.parent / "study" / "quarter_s1" / "metrics.jsonl").open("w") as file:
        for line in (
            {"step": 5, "tokens": 1, "loss": 3.0, "val_loss": 3.0},
            {"tokens": 120_000_000, "loss": 3.0} | row,
        ):
            file.write(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="study: quarter_s1 has no validation loss at its last step"):
        law.read.__wrapped__(evidence, evidence.parent)


def test_speeds_that_were_not_timed_are_one_message(tmp_path):
    contenders = {
        "dense": {"failed": "", "ms": {"dense": 200.0}, "sparse_share": 0.0},
        "float8": {"failed": "it ran out of memory"},
        "own": {"failed": "", "ms": {"dense": 200.0, "sparse": 100.0}, "sparse_share": 0.75},
        "own_fp8": {"failed": "", "ms": {"dense": 160.0, "sparse": 100.0}, "sparse_share": 0.75},  # dense in float8
    }
    (tmp_path / "training.json").write_text(json.dumps({"contenders": contenders}))
    # Of 100 and 60 ms, 40 and 45 are saved where 0.4 and 0.75 of the layers are sparse.
    told = {"1B": ["", "own"], "7B": ["", "own", 0.4], "7B, fp8": ["", "own_fp8", 0.75]}
    assert law.speeds({"speeds": told}, tmp_path) == {
        "1B": law.Speed(2.0, 1.6, 1.0),
        "7B": law.Speed(200 / 160, 200 / 170, 1.0),
        "7B, fp8": law.Speed(200 / 115, 200 / (0.25 * 160 + 0.75 * 115), 1.0),
    }
    wrong = {"1B": ["nowhere", "own"]}, {"1B": ["", "none"]}, {"1B": ["", "float8"]}, {"1B": "x"}, "x"
    for told in (*wrong, *({"1B": ["", "own", *share]} for share in ((0,), (1.5,), (True,), (1, 1)))):
        with pytest.raises(ConfigError, match=r"speeds of (1B|\"x\"): give the folder of a training.json"):
            law.speeds({"speeds": told}, tmp_path)


def test_a_recipe_whose_share_rises_has_the_mean_time_of_its_phases(tmp_path):
    contenders = {
        "dense": {"failed": "", "ms": {"dense": 200.0}, "sparse_share": 0.0},
        "eighth": {"failed": "", "ms": {"dense": 160.0, "sparse": 80.0}, "sparse_share": 0.8},
        "half": {"failed": "", "ms": {"dense": 190.0, "sparse": 120.0}, "sparse_share": 0.8},
    }
    contenders["quarter"] = contenders["half"]
    (tmp_path / "training.json").write_text(json.dumps({"contenders": contenders}))
    shares = {"eighth": 0.5, "half": 0.25}
    found = law.speeds({"speeds": {"1B": ["", shares], "7B": ["", shares, 0.5]}}, tmp_path)
    # 50 steps of 80 ms, 25 of 120, and 25 dense ones of 170, the mean of 160 twice and 190; with half of the layers of
    # 120 and 155.
    assert found["1B"].whole == pytest.approx(200 / 112.5)
    assert found["1B"].step == pytest.approx(200 / (7000 / 75))
    assert found["7B"].whole == pytest.approx(200 / (0.5 * 120 + 0.25 * 155 + 0.25 * 170))
    all_steps = {"eighth": 0.33, "half": 0.56, "quarter": 0.11}  # in floats their sum is above 1
    law.speeds({"speeds": {"1B": ["", all_steps]}}, tmp_path)
    for wrong in (
        {},
        {"eighth": 0.8, "half": 0.3},
        {"eighth": 0},
        {"eighth": True},
        {"none": 0.5},
        {"eighth": "0.5"},
        {"eighth": 10**400},
    ):
        with pytest.raises(ConfigError, match="or several with their shares of the steps"):
            law.speeds({"speeds": {"1B": ["", wrong]}}, tmp_path)


def test_one_seed_has_no_interval(evidence):
    for run in evidence.parent.glob("study/*_s1"):
        run.rename(run.with_name(run.name + "_left_out"))
        (run.with_name(run.name + "_left_out") / "run.json").unlink()
    with pytest.raises(ConfigError, match="no run has a second seed"):
        law.read.__wrapped__(evidence, evidence.parent)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "evidence.json"
    file.write_bytes((ROOT / "docs" / "evidence.json").read_bytes())
    assert law.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "columns_quarter_fp8" in printed and "Dense law: L =" in printed
    drawn_from = json.loads(Image.open(file.with_suffix(".png")).text[DATA])
    assert [name.rpartition("/")[2] for name in drawn_from] == ["evidence.json", "rates_12m", "fp8_12m"]


def test_a_picture_shows_all_sizes_and_recipes():
    """Also where there are more of them than colours."""
    dense = cells(TRUE, [1e7 * size for size in range(1, 10)])
    recipes = {f"recipe_{place}": [Cell(1e7, 1e8, (0.01,))] for place in range(9)}
    drawn = {name: np.full((2, 1), 0.01) for name in recipes}
    left, right = law.draw(law.Evidence(dense, recipes, TRUE, [TRUE] * 2, drawn)).axes
    assert len(left.get_legend().get_texts()) == 2 * 9 and len(right.get_yticklabels()) == 9
