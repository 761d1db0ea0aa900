"""Evaluation of a tiny run: scores of a text, quantised weights, sparse inference, and a task without a network."""

import gzip
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kernels
from configs.errors import ConfigError
from configs.loader import load_config
from kernels import FeedForwardSparsity, Groups, Preceding, Venom
from kernels.groups.ffn import TILE_GROUPS
from models.feed_forward import FeedForward, inference_modes
from recipes import progress
from recipes.mixture import load_corpus
from recipes.restore import find_checkpoint
from recipes.tokenizer import load_tokenizer
from scripts import evaluate, export_hf, generate, import_hf
from scripts.evaluate import PAPER_TASKS, local_items


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny run, trained once, by recipe."""
    known: dict[str, Path] = {}

    def get(train, recipe: str, *words: str) -> Path:
        if recipe not in known:
            known[recipe] = tmp_path_factory.mktemp(recipe)
            train(known[recipe], *words, "--checkpoint.interval", "2", recipe=recipe)
        return known[recipe]

    return get


@pytest.fixture
def run(folders, train):
    """A run of column groups in blocks of 16 tokens, half its sequences' length."""
    return folders(train, "groups_quarter", "--activations.v", "16")


@pytest.fixture
def text(corpus):
    return sorted(map(str, corpus.glob("00*.py")))


@pytest.fixture
def evaluated(monkeypatch):
    """Run the script in this process and return the row it added: `evaluated(folder, *words)`."""

    def get(folder: Path, *words: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), *words])
        evaluate.main()
        return json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])

    return get


def test_scores_are_those_of_every_token_and_byte(run, text, evaluated):
    row = evaluated(run, "--text", *text, "--batch-size", "3")
    tokenizer, (model, _) = load_tokenizer(str(run / "tokenizer")), find_checkpoint(str(run)).model()
    ids = [token for file in text for token in tokenizer.encode(Path(file).read_text(), add_bos=True, add_eos=True)]
    losses = []
    for start in range(0, len(ids) - 1, 32):
        piece = torch.tensor(ids[start : start + 33])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item())
    score = row["scores"]["exported, float32"]
    assert evaluated(run, "--text", *text, "--length", "32")["scores"]["exported, float32"] == pytest.approx(score)
    assert evaluated(run, "--text", *text, "--length", "16")["scores"]["exported, float32"]["loss"] != score["loss"]
    assert score["loss"] == pytest.approx(sum(losses) / (len(ids) - 1), rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    size = sum(Path(file).stat().st_size for file in text)
    assert row["text"]["bytes"] == size and row["text"]["tokens"] == len(ids)
    assert score["bits_per_byte"] == pytest.approx(sum(losses) / (math.log(2) * size), rel=1e-5)


def test_a_text_shorter_than_a_sequence_is_scored(run, evaluated, tmp_path):
    (tmp_path / "short.txt").write_text("x = 3\n")
    row = evaluated(run, "--text", str(tmp_path / "short.txt"))
    assert row["text"]["tokens"] < 32 and row["text"]["bytes"] == 6
    ids = torch.tensor(load_tokenizer(run / "tokenizer").encode("x = 3\n", add_bos=True, add_eos=True))
    with torch.no_grad():
        loss = F.cross_entropy(find_checkpoint(str(run)).model()[0](ids[None, :-1])[0], ids[1:])
    assert row["scores"]["exported, float32"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_text_is_read_as_the_trainer_reads_it(run, tmp_path):
    """Line ends as they are, and no byte order mark: with one, a copy of a document would not be known as such."""
    folder = tmp_path / "texts"
    folder.mkdir()
    mark = b"\xef\xbb\xbf"
    for number in range(30):
        content = f"number {number}\r\nanother\rand {'more ' * number}\n".encode()
        (folder / f"{number}-a.txt").write_bytes(content)
        (folder / f"{number}-b.txt").write_bytes(mark + content)
    files = sorted(map(str, folder.iterdir()))
    scored = evaluate.Text(files, run / "tokenizer").documents
    assert scored == [Path(file).read_bytes().removeprefix(mark).decode() for file in files]
    source = f'[{{type = "text", path = "{folder}"}}]'
    config, _ = load_config(["--config", "configs/debug.toml", "--data.sources", source])
    corpus = load_corpus(config)
    trained = [document["text"] for side in (corpus.documents, corpus.held_out()) for document in side]
    assert sorted(trained) == sorted(set(scored))
    assert sum(part.copies for part in corpus.parts) == 30


def test_an_export_without_all_of_its_weights_is_not_scored(run, text, evaluated, tmp_path, monkeypatch):
    """transformers would fill them with random numbers."""
    monkeypatch.setattr(sys, "argv", ["export_hf", str(run), str(tmp_path / "hf")])
    export_hf.main()
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, problem in (
        ({key: value for key, value in weights.items() if key != name}, "missing"),
        (weights | {"model.layers.7.mlp.up_proj.weight": weights[name].clone()}, "unexpected"),
        (weights | {name: weights[name][:-16].clone()}, "mismatched|cannot be loaded"),
    ):
        save_file(changed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=problem):
            evaluated(tmp_path / "hf", "--text", *text)
        monkeypatch.setattr(sys, "argv", ["generate", str(tmp_path / "hf"), "--prompt", "def"])
        with pytest.raises(ConfigError, match=problem):
            generate.main()
    assert not (tmp_path / "hf" / "evaluations.jsonl").exists()


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_export_runs_no_code(run, text, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_hf", str(run), str(tmp_path / "hf")])
    export_hf.main()
    folder, mark = tmp_path / "hf", tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import ArceeConfig as C, ArceeForCausalLM as M\n"
    (folder / "code.py").write_text(code)
    remote = {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config | remote))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | remote))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    evaluated(folder, "--text", *text)
    monkeypatch.setattr(evaluate, "LONGEST", 16)  # an export that takes longer texts than fit into memory
    assert (
        evaluated(folder, "--text", *text)["scores"] == evaluated(folder, "--text", *text, "--length", "16")["scores"]
    )
    monkeypatch.setattr(sys, "argv", ["generate", str(folder), "--prompt", "def", "--max-new-tokens", "2"])
    generate.main()
    (folder / "config.json").write_text(json.dumps(config | remote | {"model_type": "unheard_of"}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        evaluated(folder, "--text", *text)
    assert not mark.exists()

    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    for script in (["evaluate", str(folder), "--text", *text], ["generate", str(folder), "--prompt", "def"]):
        monkeypatch.setattr(sys, "argv", script)
        with pytest.raises(ConfigError, match="cannot be loaded"):
            {"evaluate": evaluate, "generate": generate}[script[0]].main()
    monkeypatch.setattr(sys, "argv", ["import_hf", str(folder), str(tmp_path / "imported")])
    with pytest.raises(ConfigError, match="safetensors cannot be read"):
        import_hf.main()
    assert not mark.exists()


def test_int4_is_refused_where_its_groups_do_not_divide_a_width():
    with pytest.raises(ConfigError, match="for 32 weights, which do not divide the 48 inputs of 0: use int8"):
        evaluate.quantize(torch.nn.Sequential(torch.nn.Linear(48, 4)), "int4")


@pytest.mark.parametrize("kind, levels", [("int8", 256), ("int4", 16 * 512 // 32), ("float8", 254)])
def test_quantised_weights_cost_little_and_something(run, text, evaluated, kind, levels):
    scores = evaluated(run, "--text", *text, "--quantize", kind)["scores"]
    before, after = scores["exported, float32"]["loss"], scores[f"exported, {kind} weights"]["loss"]
    assert before != after and after == pytest.approx(before, rel=0.03 if kind == "int4" else 0.01)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.lm_head = torch.nn.Linear(512, 4), torch.nn.Linear(512, 4)

    model = Model()
    head = model.lm_head.weight.detach().clone()
    evaluate.quantize(model, kind)
    assert torch.equal(model.lm_head.weight, head)
    assert all(len(row.unique()) <= levels for row in model.inner.weight.dequantize())


def test_scores_of_every_inference_mode(run, text, evaluated, folders, train, tmp_path):
    scores = evaluated(run, "--text", *text, "--pattern")["scores"]
    dense, exported = scores.pop("dense"), evaluated(run, "--text", *text)["scores"]["exported, float32"]
    assert dense["loss"] == pytest.approx(exported["loss"], rel=1e-5) and dense["energy_kept"] == 1
    assert list(scores) == ["sparse", "token", "cluster", "preceding"]
    assert all(score["loss"] != dense["loss"] and score["energy_kept"] < 1 for score in scores.values())
    kept = {name: score["energy_kept"] for name, score in scores.items()}
    assert kept["token"] > max(kept["sparse"], kept["preceding"])

    rounded = evaluated(run, "--text", *text, "--pattern", "--dtype", "bfloat16")["scores"]
    assert all(rounded[name]["loss"] != score["loss"] for name, score in {"dense": dense, **scores}.items())

    # A pattern is scored in the micro-batches that it was trained in.
    about = json.loads((run / "run.json").read_text())
    shutil.copytree(run, tmp_path / "sparse")
    about["config"]["training"]["sparse_local_batch_size"] = 1
    (tmp_path / "sparse" / "run.json").write_text(json.dumps(about))
    other = evaluated(tmp_path / "sparse", "--text", *text, "--pattern")["scores"]
    assert other.pop("dense")["loss"] == pytest.approx(dense["loss"], rel=1e-6)
    assert other["sparse"]["loss"] != scores["sparse"]["loss"]

    with pytest.raises(ConfigError, match="cuts no activations"):
        evaluated(folders(train, "weights_2of4"), "--text", *text, "--pattern")


def test_inference_modes_of_a_sparsity():
    shared = FeedForwardSparsity(Venom(64, 2, 16), (1,), clusters=4)
    # The cut along the tokens is the backward pass's, and a text may have any number of them.
    assert inference_modes(replace(shared, cut_along_tokens=True), 128) == {
        "dense": None,
        "sparse": shared,
        "dense W1": replace(shared, weight_products=()),
        "token": FeedForwardSparsity(Venom(1, 2, 16)),
        "cluster": FeedForwardSparsity(Venom(1, 2, 16), clusters=4, by_cluster=True),
        "preceding": FeedForwardSparsity(Preceding(Venom(64, 2, 16), 128)),
    }
    # A pattern that no tokens share is causal as it is, and a run without a sparse phase has nothing to cut.
    assert list(inference_modes(FeedForwardSparsity(Venom(1, 2, 4)), 128)) == ["dense", "sparse"]
    assert list(inference_modes(FeedForwardSparsity(weight_products=(1, 3)), 128)) == ["dense", "sparse"]
    assert list(inference_modes(FeedForwardSparsity(), 128)) == ["dense"]


@pytest.mark.parametrize("pattern", [Groups(1, 8, 0.25), Venom(1, 2, 8)])
def test_a_token_takes_the_choice_of_its_clusters_centroid(pattern):
    torch.manual_seed(0)
    ffn = FeedForward(16, 32, FeedForwardSparsity(pattern, clusters=4, by_cluster=True)).eval()
    ffn.centroids.copy_(F.normalize(torch.randn(4, 16), dim=1))
    ffn.sparse = True
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = ffn(x)
        for token, out in zip(x.view(-1, 16), y.view(-1, 16), strict=True):
            centroid = ffn.centroids[(ffn.centroids @ token).argmax()]
            h, wanted = ((ffn.w1.weight @ each).relu().square()[None] for each in (token, centroid))
            assert torch.allclose(out, (torch.where(pattern.mask(h, wanted), h, 0) @ ffn.w2.weight.T)[0], atol=1e-6)
    assert 0 < ffn.activity[3] < ffn.activity[2]


@pytest.mark.parametrize("pattern", [Groups(4, 8, 0.25), Groups(4, 8, 0.25, sample=2), Venom(4, 2, 8), Venom(4, 4, 8)])
def test_a_block_takes_the_choice_of_the_block_before(pattern):
    torch.manual_seed(0)
    h = torch.randn(3 * 10 - 5, 32).relu()  # sequences of 10 tokens, so blocks of 4, 4 and 2; the last sequence is cut
    mask = Preceding(pattern, 10).mask(h)
    for sequence, kept in zip(h.split(10), mask.split(10), strict=True):
        assert torch.equal(kept[:4], sequence[:4] != 0)
        for start in range(4, len(sequence), 4):
            block, chosen = sequence[start : start + 4], kept[start : start + 4]
            sums = sequence[start - 4 : start : getattr(pattern, "sample", 1)].sum(0, keepdim=True)
            assert torch.equal(chosen, pattern.mask(block, sums))
    assert not torch.equal(mask, pattern.mask(h))
    assert Preceding(pattern, 10).density(32) == pytest.approx(0.4 + 0.6 * pattern.density(32))


def test_the_local_task_runs_in_the_harness(run, text, evaluated, monkeypatch, capsys):
    documents = [Path(file).read_text() for file in text]
    items = local_items(documents, 30, 25)
    assert len(items) == 30 and items == local_items(documents, 30, 25)
    for item in items:
        assert len(set(item["choices"])) == 4 and max(map(len, item["choices"])) <= 25
        assert any(item["context"] + item["choices"][item["answer"]] in document for document in documents)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    capsys.readouterr()
    row = evaluated(run, "--text", *text, "--tasks", "local", "--limit", "30")
    out, err = capsys.readouterr()
    for name in ("text, float32", "tasks"):
        shares = [int(share) for share in re.findall(rf"^{name}: (\d+)%, about \d+m\d\ds left$", out, re.MULTILINE)]
        assert len(shares) > 2 and shares == sorted(shares) and shares[0] < 50 and shares[-1] >= 90
    assert not any(bar in err for bar in ("Running loglikelihood", "Building contexts", "bootstrap"))
    assert 0 <= row["tasks"]["local"]["acc"] <= 1 and row["tasks"]["local"]["sample_len"] == 30

    from lm_eval import tasks

    manager = tasks.TaskManager()
    assert set(PAPER_TASKS) <= set(manager.all_tasks)
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: manager)  # read once
    with pytest.raises(ConfigError, match="--tasks no_such_task is unknown"):
        evaluated(run, "--tasks", "no_such_task")


def test_what_cannot_be_evaluated_is_refused(run, text, evaluated, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    packed = gzip.compress(bytes(range(32, 127)) * 9)
    (tmp_path / "short.gz").write_bytes(packed[:40])
    (tmp_path / "spoilt.gz").write_bytes(packed[:20] + b"\xff" * 40 + packed[60:])
    for words, message in (
        (("--quantize", "int8"), "--quantize needs a text"),
        (("--length", "8"), "--length needs a text"),
        (("--tasks", "local"), "--tasks local needs a text"),
        (("--text", str(tmp_path / "none.txt")), "none.txt cannot be read"),
        (("--text", str(tmp_path / "binary")), "binary cannot be read"),
        (("--text", str(tmp_path / "short.gz")), r"short.gz cannot be read \(Compressed file ended"),
        (("--text", str(tmp_path / "spoilt.gz")), r"spoilt.gz cannot be read \(Error -3"),
        (("--text", str(tmp_path / "empty.txt")), "empty.txt is empty"),
        (("--text", *text, "--batch-size", str(2**63)), "--batch-size 9223372036854775808 is out of bounds"),
        (("--text", *text, "--limit", "0"), "--limit 0 is out of bounds"),
        (("--text", *text, "--length", "0"), "--length 0 is out of bounds"),
        (("--text", *text, "--length", "8", "--pattern"), "--length: a pattern sees .* leave out one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluated(run, *words)
    for words, message in (
        (("--text", "/dev/zero"), "/dev/zero is a device: give another path"),
        (("--text", "x" * 300), "File name too long: give another path"),
        (("--text", *text, "--gguf", "x" * 300), "File name too long: give another path"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluated(run, *words)
        assert message in capsys.readouterr().err
    spec = evaluate.importlib.util.find_spec  # transformers asks it as well
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else spec(name))
    with pytest.raises(ConfigError, match="--tasks needs lm-evaluation-harness"):
        evaluated(run, "--tasks", "arc_easy")


@pytest.mark.parametrize("stops", [KeyboardInterrupt(), ConfigError("no data")])
def test_tasks_that_stop_leave_the_scores_of_the_text(run, text, evaluated, monkeypatch, stops):
    monkeypatch.setattr(evaluate, "evaluate_tasks", lambda *_: (_ for _ in ()).throw(stops))
    before = (run / "evaluations.jsonl").read_text() if (run / "evaluations.jsonl").exists() else ""
    with pytest.raises(type(stops), match=r"no data|the tasks are not scored"):
        evaluated(run, "--text", *text, "--tasks", "local")
    (added,) = (run / "evaluations.jsonl").read_text().removeprefix(before).splitlines()
    assert "exported, float32" in json.loads(added)["scores"] and not json.loads(added)["tasks"]


@pytest.mark.parametrize("tokens", [640, 600, 128, 100])
def test_groups_chosen_by_the_block_before_run_on_the_kernels_operators(tokens):
    """Sequences of 320 tokens, so a last block of 64; compiled, the tiles of 128 x 128 and the mask are one FFN."""
    torch.manual_seed(0)
    sparsity = FeedForwardSparsity(Preceding(Groups(128, 128, 0.25), 320))
    x, w1, w2 = torch.randn(tokens, 64), torch.randn(1024, 64), torch.randn(64, 1024)
    expected = kernels.sparse_feed_forward(x, w1, w2, sparsity)
    by_groups = partial(kernels.sparse_feed_forward, family=TILE_GROUPS)
    compiled = torch.compile(by_groups, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for function in (by_groups, compiled):
            assert torch.allclose(function(x, w1, w2, sparsity), expected, rtol=1e-4, atol=1e-2)


def test_which_patterns_for_inference_have_kernels():
    def backend(pattern):
        sparsity, shape = FeedForwardSparsity(pattern), kernels.Shape(64, 1024)
        return kernels.choose(sparsity, shape, torch.device("cuda"), torch.bfloat16, here=False)[0].name

    assert backend(Preceding(Groups(128, 128, 0.25), 4096)) == "groups"
    assert backend(Preceding(Groups(64, 128, 0.25), 4096)) == backend(Preceding(Venom(128, 2, 16), 4096)) == "reference"
    assert backend(Groups(1, 128, 0.25)) == backend(Venom(1, 2, 16)) == "reference"


@pytest.mark.gpu
def test_groups_chosen_by_the_block_before_on_a_gpu():
    torch.manual_seed(0)
    pattern = Preceding(Groups(128, 128, 0.25), 1024)
    x, w1, w2 = (torch.randn(*shape).cuda().bfloat16() for shape in ((2000, 256), (2048, 256), (256, 2048)))
    h = (x @ w1.T).relu()
    h = h * h
    expected = torch.where(pattern.mask(h), h, 0).double() @ w2.T.double()
    with torch.no_grad():
        y = kernels.sparse_feed_forward(x, w1, w2, FeedForwardSparsity(pattern))
    assert (y.double() - expected).norm() < 1e-2 * expected.norm()
