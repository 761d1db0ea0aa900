"""Probes of checkpoints: leaks of every mode, calibration, cloze items, and a model loaded without its trainer."""

import json
import shutil
import signal

import pytest
import torch
from conftest import merge
from matplotlib import image

from configs.errors import ConfigError
from configs.schema import JobConfig, Source
from recipes import progress
from recipes.restore import find_checkpoint
from recipes.sparsity import Sparsity
from scripts import probe
from scripts.tables import probes_table

LEAKS = ("kl", "logprob", "argmax")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A job of sequences of 64 tokens in blocks of 16, of whole micro-batches, on a corpus whose lines end in words."""
    folder = tmp_path_factory.mktemp("words")
    for index in range(240):
        lines = [f"def f{index}_{line}(first):\n    return first * {line} + total{line % 7}\n" for line in range(12)]
        (folder / f"{index:03}.py").write_text("\n".join(lines))
    keys = {
        "data.sources": f'[{{type = "text", path = "{folder}/*.py"}}]',
        "training.seq_len": "64",
        "validation.sequences": "8",
        "activations.v": "16",
        "checkpoint.interval": "4",
    }
    return [word for key, value in keys.items() for word in (f"--{key}", value)]


LARGER = ["--training.sparse_local_batch_size", "8", "--training.global_batch_size", "8"]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("venom_2of16", []), ("groups_quarter", [*LARGER, "--activations.g", "32", "--router.token_clusters", "4"])],
)
def test_a_sparse_phase_leaks_and_a_causal_choice_does_not(train, words, tmp_path, recipe, more):
    rows = train(tmp_path / "run", *words, *more, recipe=recipe)
    modes = probe.Probe(str(tmp_path / "run" / "checkpoint" / "step-8")).measure(items=20)["modes"]
    leaking = {"sparse"} | ({"dense W1"} if recipe == "venom_2of16" else set())
    assert modes.keys() - leaking == {"dense", "token", "cluster", "preceding"}
    for name in modes.keys() - leaking:
        assert all(modes[name][f"{prefix}_{what}"] == 0 for prefix in ("leak", "own", "next") for what in LEAKS)
    for name in leaking:
        assert modes[name]["leak_kl"] > 0 and modes[name]["leak_logprob"] > 0
        assert modes[name]["own_kl"] > 0 and modes[name]["next_kl"] > 0
    dense, sparse = modes["dense"], modes["sparse"]
    # The model is the trainer's: the same losses, in both of its ways.
    assert dense["loss"] == pytest.approx(rows[8]["val_loss"], abs=1e-6)
    assert dense["bits_per_byte"] == pytest.approx(rows[8]["val_bpb"], abs=1e-6)
    assert sparse["loss"] == pytest.approx(rows[8]["val_loss_sparse"], abs=1e-6)
    for name in ("nonzero_share", "energy_kept", "router_balance", "layers/1/energy_kept"):
        assert sparse["health"][name] == pytest.approx(rows[8][name], abs=1e-6)
    assert len({mode["loss"] for mode in modes.values()}) == len(modes)
    kept = {name: mode["health"].get("energy_kept") for name, mode in modes.items()}
    assert kept.pop("dense") is None and all(0 < share < 1 for share in kept.values())
    assert kept["token"] > kept["preceding"]  # the same size of choice, with and without a look at the token
    assert {name for name in modes if "router_balance" in modes[name]["health"]} == leaking | {"cluster"}


def test_blocks_of_neighbours_leak_to_the_token_before_and_not_across_halves(train, words, tmp_path):
    train(tmp_path / "run", *words, "--router.enable", "false", recipe="groups_quarter")
    modes = probe.Probe(str(tmp_path / "run" / "checkpoint" / "step-8")).measure(items=4)["modes"]
    assert list(modes) == ["dense", "sparse", "token", "preceding"]
    for name, mode in modes.items():
        assert mode["leak_kl"] == mode["own_kl"] == 0
        assert (mode["next_kl"] > 0) == (name == "sparse")


@pytest.mark.parametrize("recipe", ["activations_2of4", "weights_2of4"])
def test_patterns_of_one_token_and_of_weights_leak_nothing(train, words, tmp_path, recipe):
    train(tmp_path / "run", *merge(words, ["--activations.v", "64"]), recipe=recipe)  # read by neither: its default
    modes = probe.Probe(str(tmp_path / "run" / "checkpoint" / "step-8")).measure(items=4)["modes"]
    assert list(modes) == ["dense", "sparse"]
    assert all(mode["leak_kl"] == mode["own_kl"] == mode["next_kl"] == 0 for mode in modes.values())
    assert modes["sparse"]["loss"] != modes["dense"]["loss"]


def test_the_command_writes_a_file_a_table_and_a_picture(train, words, tmp_path, capsys):
    train(tmp_path / "runs" / "venom", *words)
    shutil.copytree(tmp_path / "runs" / "venom", tmp_path / "runs" / "again")
    for words in (["venom/checkpoint/step-12"], ["venom/checkpoint/step-8", "again"], ["again", "--dense"]):
        paths = [word if word == "--dense" else str(tmp_path / "runs" / word) for word in words]
        probe.main([*paths, "--items", "5", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    steps = json.loads((tmp_path / "out" / "venom" / "probe.json").read_text())
    assert list(steps) == ["8", "12"]
    again = json.loads((tmp_path / "out" / "again" / "probe.json").read_text())
    assert list(again) == ["12"] and list(again["12"]["modes"]) == ["dense"]
    assert again["12"]["modes"]["dense"]["ece"] == steps["12"]["modes"]["dense"]["ece"]
    assert steps["12"]["recipe"] == "venom_2of16" and steps["12"]["cloze"]["items"] == 5
    assert "8 held-out sequences; ECE over 15 bins; cloze: 5 items of 4 choices" in " ".join(printed.split())
    assert max(map(len, printed.splitlines()[-25:])) <= 120
    assert len(probes_table(tmp_path / "out").splitlines()) == 2 + 2 * 6 + 1 + 2
    picture = image.imread(tmp_path / "out" / "reliability.png")
    assert picture.shape[0] > 900 and picture[..., :3].std() > 0.02


def test_values_that_cannot_be_used_are_refused_before_a_model_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, message in (
        (["--items=--"], "--items=--: -- is no value"),
        (["--out", str(tmp_path / "file")], "is no folder: give another path"),
    ):
        with pytest.raises(SystemExit, match="2"):
            probe.main(["no run", *words])
        assert message in capsys.readouterr().err
    for words, message in (
        (["run", "--items", "0"], "--items 0 is out of bounds: give 1 to 2147483647"),
        (["x" * 5000], "no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            probe.main(words)


def test_ctrl_c_keeps_the_models_that_are_measured(train, words, tmp_path, monkeypatch, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a program of its own
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    train(tmp_path / "run", *words)
    measure, calls = probe.Probe.measure, []

    def once(*arguments):
        calls.append(arguments)
        return measure(*arguments) if len(calls) == 1 else signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(probe.Probe, "measure", once)
    models = [str(tmp_path / "run" / "checkpoint" / f"step-{step}") for step in (8, 12)]
    with pytest.raises(KeyboardInterrupt, match=rf"1 of 2 models are measured, kept in {tmp_path}/RUN/probe.json"):
        probe.main([*models, "--items", "5", "--dense"])
    assert list(json.loads((tmp_path / "run" / "probe.json").read_text())) == ["8"]


def test_a_checkpoint_of_another_recipe_that_was_dense_so_far(train, words, tmp_path):
    """As a study's run has it that goes on from a dense one: without centroids."""
    dense = ("--schedule.phases", '[{mode = "dense", end = 1.0}]')
    train(tmp_path, *words, *dense, "--checkpoint.interval", "1", recipe="dense", stop_after=3)
    train(tmp_path, *words, "--checkpoint.change_recipe", "true", stop_after=6)
    model, sparsity = find_checkpoint(str(tmp_path / "checkpoint" / "step-3")).model(
        tokens=torch.arange(64).view(2, 32)
    )
    assert sparsity.prepared and not model.training


def test_a_model_of_eight_ranks_and_of_the_last_save_or_an_early_one(train, words, tmp_path):
    run = tmp_path / "run"
    late = '[{mode = "dense", end = 5}, {mode = "sparse", end = 8}, {mode = "dense", end = 1.0}]'
    train(run, *words, "--checkpoint.last_save_model_only", "true", "--schedule.phases", late)
    file = run / "run.json"
    about = json.loads(file.read_text())
    about["config"]["parallelism"]["data_parallel_shard_degree"] = 8
    file.write_text(json.dumps(about))
    kept, _ = find_checkpoint(str(run / "checkpoint" / "step-8")).model()
    # The final save has no centroids, nor has one from before the sparse phase: they are those of given tokens.
    tokens = torch.arange(64).view(2, 32)
    for path in (run, run / "checkpoint" / "step-4"):
        model, sparsity = find_checkpoint(str(path)).model()
        assert not sparsity.prepared and not model.training
        with pytest.raises(ValueError, match="the FFNs are not prepared"):
            sparsity.run_as(next(iter(kept.feed_forwards().values())).sparsity)
        model, sparsity = find_checkpoint(str(path)).model(tokens=tokens)
        assert sparsity.prepared and not model.training
        for ffn, old in zip(model.feed_forwards().values(), kept.feed_forwards().values(), strict=True):
            assert not ffn.sparse
            assert torch.allclose(ffn.centroids.norm(dim=1), torch.ones(len(ffn.centroids)))
            assert not torch.equal(ffn.centroids, old.centroids)
    (run / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"run/tokenizer: no tokenizer can be loaded .*its own tokenizer.json back"):
        probe.Probe(str(run))
    (tmp_path / "tokenizer").rename(run / "tokenizer")
    assert len(probe.Probe(str(run)).batches) == 2


def test_small_defaults_on_a_cpu_and_progress_that_ends_at_its_total(train, words, tmp_path, capsys, monkeypatch):
    more = ("--validation.sequences", "32", "--training.local_batch_size", "4", *LARGER)
    train(tmp_path / "run", *merge(words, more))
    made = probe.Probe(str(tmp_path / "run"))
    assert sum(map(len, made.batches)) == (probe.CPU_SEQUENCES if probe.device_type == "cpu" else 32)
    assert sum(map(len, probe.Probe(str(tmp_path / "run"), 24).batches)) == 24
    with monkeypatch.context() as fewer:
        fewer.setattr(probe, "CPU_SEQUENCES", 2)
        assert probe.device_type != "cpu" or probe.Probe(str(tmp_path / "run")).batches[0].shape[0] == 8  # of LARGER
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    capsys.readouterr()
    made.measure(items=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    shares = [int(line.split(": ")[1].split("%")[0]) for line in lines]
    assert shares == sorted(shares) and shares[0] < 5
    # The modes are counted exactly; a cloze item is at most as long as it is counted.
    modes = made.progress.total - 3 * made.tokens_per_item()
    assert modes <= made.progress.done <= made.progress.total
    assert "run, step 12: " in lines[0] and lines[0].endswith("s left")


def stand_in(model, tokens: torch.Tensor) -> probe.Probe:
    """A probe of a function from tokens to logits."""
    made = object.__new__(probe.Probe)
    made.model, made.config, made.batches = model, JobConfig(), [tokens]
    made.bytes = torch.ones(8, dtype=torch.int64)
    made.sparsity = Sparsity(made.config, {}, [], [])
    made.progress = None
    return made


def test_calibration():
    """Half of the tokens predicted with 0.9, a third of these wrongly; the other half with 0.5, all rightly."""
    tokens = torch.tensor([[0, 1, 1, 2, 1, 1, 1]])

    def model(inputs):
        probabilities = torch.full((1, 6, 8), 0.1 / 7)
        probabilities[:, :3, 1] = 0.9
        probabilities[:, 3:] = 0.5 / 7
        probabilities[:, 3:, 1] = 0.5
        return probabilities.log()

    score = stand_in(model, tokens).score()
    assert score["accuracy"] == pytest.approx(5 / 6)
    assert score["ece"] == pytest.approx(0.5 * abs(2 / 3 - 0.9) + 0.5 * (1 - 0.5), abs=1e-6)
    assert sum(score["reliability"]["tokens"]) == 6
    loss = -(2 * torch.tensor(0.9).log() + torch.tensor(0.1 / 7).log() + 3 * torch.tensor(0.5).log()) / 6
    assert score["loss"] == pytest.approx(loss.item())


def test_what_a_model_gains_that_reads_its_next_token():
    """It says 0.9 to the token that comes next, and the last position, which has none, says nothing."""
    tokens = torch.randint(8, (6, 12), generator=torch.Generator().manual_seed(0))

    def model(inputs):
        probabilities = torch.full((*inputs.shape, 8), 0.1 / 7)
        probabilities[:, :-1].scatter_(-1, inputs[:, 1:, None], 0.9)
        return probabilities.log()

    made = stand_in(torch.nn.Identity(), tokens)
    made.logits = model
    found = made.next_token()
    gain = torch.tensor(0.9 / (0.1 / 7)).log().item()  # where the other sequence's token is another one
    share = found["next_argmax"]
    assert 0.7 < share < 1.0  # of eight tokens
    assert found["next_gain"] == pytest.approx(share * gain) == pytest.approx(found["next_logprob"])
    count = 6 * probe.CUTS
    error = gain * (share * (1 - share) / (count - 1)) ** 0.5
    assert found["next_gain_error"] == pytest.approx(error)
    # Of the first half only its last position sees what is replaced.
    far = made.leak()
    assert far["leak_gain"] == pytest.approx(gain * far["leak_argmax"]) and far["leak_argmax"] <= 1 / 5


class Characters:
    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        return [0] * add_bos + list(text.encode())


def test_cloze_items_and_a_model_that_knows_the_text(tmp_path, capsys):
    for index in range(60):
        lines = [f"word{index} = call_{line}(alpha{line}, beta) + gamma_{line % 7}  # !" for line in range(12)]
        (tmp_path / f"{index}.py").write_text("\n".join(lines))
    made = stand_in(None, torch.zeros(1, 1))
    made.config.data.sources = [Source(type="text", path=str(tmp_path))]
    made.config.data.validation_share, made.config.training.seq_len = 0.3, 256
    made.tokenizer = Characters()
    items = list(probe.cloze_items(made.config, 10))
    assert items == list(probe.cloze_items(made.config, 10)) and len(items) == 10
    for context, words in items:
        assert context.endswith("+") and words[0].startswith(" gamma_")
        assert len(set(words)) == 4 and all(word[0] == " " for word in words)
    text = "".join(path.read_text() for path in tmp_path.iterdir())

    def knows(rows):
        logits = torch.zeros(*rows.shape, 128)
        for place, row in enumerate(rows.tolist()):
            for end in range(40, len(row)):
                at = text.find(bytes(row[end - 39 : end + 1]).decode())
                if at >= 0 and at + 40 < len(text):
                    logits[place, end, ord(text[at + 40])] = 9
        return logits

    made.model = knows
    assert made.cloze(10)["accuracy"] == 1.0
    made.model = lambda rows: -knows(rows)
    assert made.cloze(10)["accuracy"] == 0.0

    shapes = []
    made.model = lambda rows: shapes.append(rows.shape) or torch.zeros(*rows.shape, 128)
    made.config.training.seq_len = 8  # a word and one token before it
    assert made.cloze(10)["items"] == 10 and set(shapes) == {(4, 8)}
    made.config.training.seq_len = 7
    assert made.cloze(10)["items"] == 0
    assert "10 cloze items are left out: they have words of more than 7 tokens" in capsys.readouterr().out
    made.config.data.validation_share = 0.0
    assert made.cloze(10) == {"items": 0, "choices": 4, "accuracy": None, "standard_error": None}
