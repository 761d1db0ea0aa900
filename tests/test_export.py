"""From a training checkpoint to Hugging Face and back: the same model in transformers, in generation and in a new run.

The tiny job's models have grouped-query attention, four query heads on two key-value heads.
"""

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fork, merge, rows
from packaging.version import Version

import kernels
from configs.errors import ConfigError
from configs.loader import load_config
from models.hugging_face import import_transformers
from models.llama import Llama, llama_args
from models.relufication import relufy
from recipes.check import check_config
from recipes.data import validation_sequences
from recipes.restore import check_initial_model, find_checkpoint
from recipes.tokenizer import load_tokenizer
from recipes.trainer import SparseTrainer
from scripts import check_llama_cpp, check_vllm, evaluate, export_gguf, export_hf, generate, import_hf

HEADS = ("--model.n_heads", "4", "--model.n_kv_heads", "2")
DENSE = ("--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false")
SWIGLU = ("--model.name", "llama_swiglu", *DENSE)
# As large runs are: blocks wrapped twice, which their parameters' names must not show.
WRAPPED = (
    *("--compile.enable", "true", "--compile.components", "model", "--compile.backend", "aot_eager"),
    *("--activation_checkpoint.mode", "full"),
)
IDS = torch.arange(384).remainder(380).view(12, 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run, which also holds the trainer's own logits of IDS; each is trained once."""
    known: dict[tuple, Path] = {}

    def get(train, *words: str, recipe: str = "venom_2of16") -> Path:
        if words not in known:
            folder = tmp_path_factory.mktemp("trained")
            close = SparseTrainer.close

            def keep_logits(trainer):
                (model,) = trainer.model_parts
                with torch.no_grad():
                    torch.save(model.eval()(IDS), folder / "logits.pt")
                close(trainer)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SparseTrainer, "close", keep_logits)
                train(folder, *HEADS, *words, recipe=recipe)
            known[words] = folder
        return known[words]

    return get


@pytest.fixture
def script(monkeypatch):
    """Run a script's main in this process: `script(module, *words)`."""

    def run(module, *words) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    "words, recipe, architecture",
    [
        ((), "venom_2of16", "ArceeForCausalLM"),
        (WRAPPED, "venom_2of16", "ArceeForCausalLM"),
        (SWIGLU, "dense", "LlamaForCausalLM"),
    ],
)
def test_transformers_computes_the_trainers_logits(train, trained, script, tmp_path, words, recipe, architecture):
    run = trained(train, *words, recipe=recipe)
    script(export_hf, run, tmp_path / "hf", "--dtype", "float32")
    model, info = import_transformers().AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=False, output_loading_info=True
    )
    assert type(model).__name__ == architecture and model.dtype == torch.float32
    assert not any(info.values())
    assert model.config.num_key_value_heads == 2 and model.config.max_position_embeddings == 32
    with torch.no_grad():
        logits = model(IDS).logits
    assert (logits - torch.load(run / "logits.pt")).abs().max() < 1e-4
    # RoPE's permutation is what makes them equal: without it they are not.
    weights = find_checkpoint(str(run)).weights()
    for name in ("q", "k"):
        layer = model.model.layers[0].self_attn.get_parameter(f"{name}_proj.weight")
        assert not torch.equal(layer, weights[f"layers.0.attention.w{name}.weight"])


def test_bfloat16_and_the_tokenizer_of_an_export(train, trained, script, tmp_path):
    run = trained(train)
    script(export_hf, run / "checkpoint" / "step-8", tmp_path / "hf", "--dtype", "bfloat16")
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def f(x):\n    return x , 3"
    own = load_tokenizer(str(run / "tokenizer"))
    ids = tokenizer(text)["input_ids"]
    assert ids == own.encode(text, add_bos=True) and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (own.bos_id, own.eos_id)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        script(export_hf, run, tmp_path / "hf")


def test_large_weights_are_sharded(train, trained, script, tmp_path, monkeypatch):
    save = export_hf.save_torch_state_dict
    monkeypatch.setattr(export_hf, "save_torch_state_dict", lambda *args: save(*args, max_shard_size="60KB"))
    run = trained(train)
    script(export_hf, run, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = import_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert (model(IDS).logits - torch.load(run / "logits.pt")).abs().max() < 1e-4


def test_a_round_trip_is_bit_equal_and_a_run_goes_on_from_it(train, trained, script, tmp_path, capsys):
    run = trained(train)
    script(export_hf, run, tmp_path / "hf")
    with pytest.raises(ConfigError, match="dense_layers = 3 leaves none of the 2 layers"):
        script(import_hf, tmp_path / "hf", tmp_path / "imported", "--recipe", "columns_half")
    assert not (tmp_path / "imported").exists()
    script(import_hf, tmp_path / "hf", tmp_path / "imported")
    said = capsys.readouterr().out
    assert "recipe: dense, since columns_half leaves 3 layers dense, of 2" in said
    assert "sparse: nothing, by recipes/dense.toml" in said
    before, after = (find_checkpoint(str(folder)) for folder in (run, tmp_path / "imported"))
    state = after.weights()
    assert all(torch.equal(value, state[name]) for name, value in before.weights().items())
    script(export_hf, tmp_path / "imported", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "hf")

    words = ("--checkpoint.initial_load_path", str(tmp_path / "imported" / "checkpoint" / "step-0"))
    tokenizer = ("--tokenizer.path", str(tmp_path / "imported" / "tokenizer"))
    first = train(tmp_path / "on", *HEADS, *DENSE, *words, *tokenizer, "--training.steps", "2", recipe="dense")[1]
    assert first["loss"] < rows(run)[12]["loss"] + 0.3 < rows(run)[1]["loss"]
    for key, value in (("n_heads", "2"), ("rope_theta", "10000.0"), ("hidden_dim", "512")):
        with pytest.raises(ConfigError, match=f"is a model of {key} = .* but model.{key} = "):
            train(tmp_path / key, *merge([*HEADS, *words, *tokenizer], [f"--model.{key}", value]))
    with pytest.raises(ConfigError, match=r"has a vocabulary of 384 tokens.*set tokenizer.path"):
        train(tmp_path / "other", *HEADS, *words, "--tokenizer.vocab_size", "320")


def test_a_checkpoint_of_two_ranks_is_put_together(tiny, script, tmp_path):
    half = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    words = merge(tiny, [*HEADS, *half, *DENSE, "--training.steps", "4", "--job.dump_folder", str(tmp_path / "run")])
    result = fork("--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *words, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "run" / "checkpoint" / "step-4"
    assert len({file.name[:3] for file in folder.glob("*.distcp")}) == 2
    script(export_hf, folder, tmp_path / "hf")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = find_checkpoint(str(folder)).config
    ids = validation_sequences(load_tokenizer(str(tmp_path / "run" / "tokenizer")), config)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(rows(tmp_path / "run")[4]["val_loss"], abs=1e-5)


def test_a_checkpoint_that_cannot_be_used_is_named(train, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(train), run)
    newest = run / "checkpoint" / "step-12"
    (tmp_path / "empty").mkdir()
    for path, reason in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "empty", "no run.json"),
        (run / "checkpoint" / "step-7", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=reason):
            find_checkpoint(str(path))
    for path in (run, run / "checkpoint", newest):
        assert find_checkpoint(str(path)).folder == newest.resolve()

    data = next(newest.glob("*.distcp"))
    kept = data.read_bytes()
    data.write_bytes(kept[:-100])
    with pytest.raises(ConfigError, match=r"step-12 is not usable .* beside it: .*step-4.*step-8"):
        find_checkpoint(str(run))
    data.write_bytes(kept)
    (newest / "manifest.json").rename(newest / "gone")
    with pytest.raises(ConfigError, match="ended before it was saved entirely"):
        find_checkpoint(str(run))
    (newest / "gone").rename(newest / "manifest.json")

    values = json.loads((run / "run.json").read_text())
    del values["config"]["training"]["mixed_precision_param"]  # as in an older release, which computed in bfloat16
    (run / "run.json").write_text(json.dumps(values))
    assert find_checkpoint(str(run)).config.training.mixed_precision_param == "bfloat16"
    values["config"]["model"]["hidden_dim"] = 512
    (run / "run.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"does not hold the model that .*run.json describes"):
        find_checkpoint(str(run)).weights()
    values["config"]["model"]["hidden_dims"] = 512
    (run / "run.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"run.json: unknown key model.hidden_dims; did you mean model.hidden_dim\?"):
        find_checkpoint(str(run))
    (run / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run.json cannot be read"):
        find_checkpoint(str(run))


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
SHORTENED = LLAMA3 | {"factor": 0.5}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "mistral"}, "model_type = mistral"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = yarn"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is no part of this model"),
        ({"num_hidden_layers": 3}, "layers.2.* is missing"),
        ({"intermediate_size": 128}, r"w1.weight is \(256, 32\), but config.json makes it \(128, 32\)"),
        ({"vocab_size": 300}, "its tokenizer has 384 tokens, its embedding only 300"),
        (
            {"num_key_value_heads": None},
            r"its weights do not fit config.json \(shape .* is invalid",
        ),  # as many as heads
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 .* a divisor of num_attention_heads = 4"),
        ({"rope_parameters": 5}, "rope_parameters = 5 is no object"),
        ({"rope_parameters": SHORTENED}, "config.json: factor = 0.5 is no model of this trainer"),
        ({"max_position_embeddings": "x"}, 'max_position_embeddings = "x" is no number'),
        ({"hidden_size": -32}, "hidden_size = -32 is no number above 0"),
    ],
)
def test_a_folder_that_is_no_model_of_ours_is_refused(train, trained, script, tmp_path, values, message):
    script(export_hf, trained(train), tmp_path / "hf")
    edit(tmp_path / "hf", **values)
    with pytest.raises(ConfigError, match=message):
        script(import_hf, tmp_path / "hf", tmp_path / "out", "--recipe", "dense")
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_folder_are_named(train, trained, script, tmp_path):
    script(export_hf, trained(train), tmp_path / "hf")
    for name, content, message in (
        ("model.safetensors.index.json", "[]", "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "lists 5, which is no file beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../hf/model.safetensors"}}', "is no file beside it"),
        ("config.json", "[]", "config.json holds no object"),
        ("tokenizer.json", "{}", "tokenizer.json describes no model"),
        ("tokenizer.json", None, r"tokenizer.json is missing, and tokenizer.model is not read.*save_pretrained"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "hf", folder)
        (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            script(import_hf, folder, tmp_path / "out", "--recipe", "dense")
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match='--data "" names nothing to train on'):
        script(import_hf, tmp_path / "hf", tmp_path / "out", "--data", "")
    # Nothing is left behind, so the same command works once the folder has been mended.
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    script(import_hf, tmp_path / "hf", tmp_path / "out", "--recipe", "dense")
    assert find_checkpoint(str(tmp_path / "out")).step == 0


def test_a_run_json_of_another_size_is_one_message(train, trained, script, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained(train), run)
    own = json.loads((run / "run.json").read_text())
    large = {**own["config"], "model": {**own["config"]["model"], "dim": 10**9}}
    for change, message in (
        ({"config": "abc"}, "config is no object"),
        ({"vocabulary": -5}, "vocabulary = -5"),
        ({"vocabulary": 10**12}, "vocabulary = 1000000000000"),
        ({"config": large}, "does not hold the model"),
    ):
        (run / "run.json").write_text(json.dumps(own | change))
        with pytest.raises(ConfigError, match=rf"run.json.*{message}|{message}.*run.json"):
            script(export_hf, run, tmp_path / "hf")


SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
HEADS_OF_HF = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


# As Llama 3.1's, for a model of this size: of the wavelengths 6.3, 22, ... some stay, some mix, some are slowed down.
def pretrained(folder: Path, **values) -> Any:
    """Let transformers save a random Llama in a folder that has a tokenizer."""
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS_OF_HF, initializer_range=0.2, **values)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_the_scaled_rope_of_llama_3(train, trained, script, tmp_path, capsys):
    """Imported, exported and imported again; and refused where the keys that continue it leave the scaling out."""
    hf, again = tmp_path / "hf", tmp_path / "again"
    script(export_hf, trained(train), hf)
    ids = torch.arange(384).remainder(380).view(2, 192)
    scaled, plain = (
        pretrained(hf, rope_parameters=rope) for rope in (LLAMA3, {"rope_type": "default", "rope_theta": 5e5})
    )
    scaled.save_pretrained(hf)
    script(import_hf, hf, tmp_path / "out")
    ours, _ = find_checkpoint(str(tmp_path / "out")).model()
    with torch.no_grad():
        logits = ours(ids)
        assert (logits - scaled(ids).logits).abs().max() < 1e-4
        assert (logits - plain(ids).logits).abs().max() > 0.1
    script(export_hf, tmp_path / "out", again, "--dtype", "float32")
    config = json.loads((again / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3 and config["max_position_embeddings"] == 256
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    with torch.no_grad():
        exported = import_transformers().AutoModelForCausalLM.from_pretrained(again)
        assert (exported(ids).logits - logits).abs().max() < 1e-4
    # As older folders have it.
    edit(hf, rope_parameters=None, rope_theta=5e5, rope_scaling=config["rope_scaling"])
    script(import_hf, hf, tmp_path / "older")
    assert find_checkpoint(str(tmp_path / "older")).args == find_checkpoint(str(tmp_path / "out")).args
    # A context that is too long for a training sequence stays what an export says.
    edit(hf, max_position_embeddings=131072)
    script(import_hf, hf, tmp_path / "long")
    long = find_checkpoint(str(tmp_path / "long"))
    assert (long.args.max_seq_len, long.args.max_position_embeddings) == (2048, 131072)
    text = (tmp_path / "long" / "continue.toml").read_text()
    assert "seq_len = 2048" in text and "sequences = 8\n" in text  # a validation costs about as much as three steps
    capsys.readouterr()

    words = ["--config", str(tmp_path / "out" / "continue.toml")]
    config, _ = load_config([*words, "--model.rope_scaling.factor", "1"])
    config.training.seq_len = 256
    args, _ = check_config(config)
    args.vocab_size = 384
    with pytest.raises(ConfigError, match=r"is a model of rope_scaling = .*'factor': 8.0"):
        check_initial_model(config, args)
    for key, value, message in (
        ("factor", "0.5", "factor = 0.5 is out of bounds: at least 1.0"),
        ("high_freq_factor", "1", "high_freq_factor = 1.0 is not above low_freq_factor = 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_config(load_config([*words, f"--model.rope_scaling.{key}", value])[0])


@pytest.mark.parametrize("relufy", [False, True])
def test_the_configuration_of_an_import_continues_it(train, trained, script, tmp_path, capsys, corpus, relufy):
    """A SwiGLU model, trained on the corpus, goes on from its export: densely, or sparsely as squared ReLU."""
    run = trained(train, *SWIGLU, recipe="dense")
    script(export_hf, run, tmp_path / "hf")
    capsys.readouterr()
    for index, file in enumerate(sorted(corpus.iterdir()) * 6):  # enough for the validation of the configuration
        (tmp_path / f"{index}.py").write_text(f"# {index}\n{file.read_text()}")
    words = ["--data", tmp_path / "*.py", "--steps", "20"]
    words += ["--relufy", "--recipe", "venom_2of16"] if relufy else []
    script(import_hf, tmp_path / "hf", tmp_path / "out", *words)
    said = capsys.readouterr().out
    assert ("sparse: the FFNs, in the sparse phases of recipes/venom_2of16.toml" in said) == relufy
    assert ("Its FFNs are SwiGLU, which has no sparse mode" in said) != relufy
    assert f"--config {tmp_path / 'out' / 'continue.toml'}" in said
    found = train_as_is(tmp_path / "out" / "continue.toml", tmp_path / "out_continued")
    phases = {row["phase"] for row in found.values()}
    assert phases == ({"dense", "sparse"} if relufy else {"dense"})
    before = rows(run)[12]["val_loss"]
    assert found[20]["val_loss"] < before, (found, before)


def train_as_is(file: Path, folder: Path) -> dict[int, dict]:
    """Run a configuration file without another key."""
    result = fork("--config", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    return rows(folder)


def test_relufication_is_close_to_the_gated_ffn():
    """Closest where g is large; the naive swap, without the gate, has nothing to do with the function."""
    torch.manual_seed(0)
    args = llama_args("debug", n_layers=1, swiglu=True, vocab_size=64, max_seq_len=16, hidden_dim=192)
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
    x = F.rms_norm(torch.randn(4096, args.dim), (args.dim,)) * (norm := torch.rand(args.dim) + 0.5)
    model.layers["0"].ffn_norm.weight.data.copy_(norm)
    for std, limit in ((4.0, 0.1), (1.0, 0.35)):
        gated = model.layers["0"].feed_forward
        gated.w1.weight.data.normal_().mul_(std / gated.w1.weight.mul(norm).norm(dim=1, keepdim=True))
        state, new = relufy(model.state_dict(), args)
        ungated = Llama(new)
        ungated.load_state_dict(state)
        with torch.no_grad():
            expected, y = gated(x), ungated.layers["0"].feed_forward(x)
        assert (y - expected).norm() / expected.norm() < limit
        naive = gated.w2(F.relu(gated.w1(x)) ** 2)
        assert (naive - expected).norm() > expected.norm()


def test_tied_and_filled_up_embeddings_are_imported(tmp_path, train, trained, script):
    """As other folders have them: the head is the embedding, and both have rows that stand for no token."""
    transformers = import_transformers()
    script(export_hf, trained(train), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model.resize_token_embeddings(400)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "hf")
    script(import_hf, tmp_path / "hf", tmp_path / "out", "--recipe", "dense")
    ours, _ = find_checkpoint(str(tmp_path / "out")).model()
    with torch.no_grad():
        assert (ours(IDS) - model(IDS).logits[..., :384]).abs().max() < 1e-4

    # Of a model whose head is its own, a head that is missing has been lost.
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match=r"lm_head.weight is missing, and config.json does not set tie_word_emb"):
        script(import_hf, tmp_path / "hf", tmp_path / "other", "--recipe", "dense")
    assert not (tmp_path / "other").exists()


def test_generation_from_a_checkpoint_and_from_its_export(train, trained, script, tmp_path, capsys):
    run = trained(train)
    script(export_hf, run, tmp_path / "hf")
    capsys.readouterr()

    def text(*words) -> str:
        script(generate, *words, "--prompt", "def f", "--max-new-tokens", "8")
        return capsys.readouterr().out

    greedy = text(run, "--temperature", "0")
    assert greedy.startswith("def f") and len(greedy) > len("def f\n")
    assert text(tmp_path / "hf", "--temperature", "0") == greedy
    drawn = [text(run, "--temperature", "5", "--top-k", "0", "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    # The likeliest tokens of the trainer's own model.
    (model, _), tokenizer = find_checkpoint(str(run)).model(), load_tokenizer(str(run / "tokenizer"))
    ids = tokenizer.encode("def f", add_bos=True)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy.rstrip("\n") == tokenizer.decode(ids).rstrip("\n")
    for words, message in (
        (("--temperature", "-1"), "--temperature -1"),
        (("--temperature", "nan"), "--temperature nan is out of bounds: give 0 to 1000"),
        (("--temperature", "1e-40"), "--temperature 1e-40 is out of bounds: give 0, or 0.001"),
        (("--seed", str(2**64)), f"--seed {2**64} is out of bounds"),
        (("--device", "nothing"), "--device nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            text(run, *words)
    with pytest.raises(ConfigError, match=r"--prompt 'a.udcff' is no text in UTF-8"):
        script(generate, run, "--prompt", "a\udcff")
    for words, message in (
        ((run, "--seed=--"), "--seed=--: -- is no value"),
        (("x" * 5000,), "no such folder"),
    ):
        with pytest.raises((ConfigError, SystemExit)) as refused:
            text(*words)
        assert message in f"{refused.value}{capsys.readouterr().err}"


def test_transformers_leaves_our_kernels_alone(train, trained, tmp_path):
    """With Hugging Face's package of that name installed, transformers would import ours for it and fail."""
    from transformers.utils import import_utils

    assert Version(kernels.__version__) < Version(import_utils.KERNELS_MIN_VERSION)
    assert not import_utils.is_kernels_available()
    installed = tmp_path / f"kernels-{import_utils.KERNELS_MIN_VERSION}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Name: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    unguarded = run("-c", "import transformers.integrations.hub_kernels")
    assert "cannot import name" in unguarded.stderr and "kernels" in unguarded.stderr
    # The trainer, then generation, in one start of Python.
    programs = (
        "import train; train.main(['--config', 'debug', '--check']); from scripts import generate; generate.main()"
    )
    guarded = run("-c", programs, trained(train), "--prompt", "def f", "--max-new-tokens", 2)
    assert guarded.returncode == 0, guarded.stderr
    assert "This job can run.\ndef f" in guarded.stdout
    assert "torchao" not in guarded.stderr  # its warnings of extensions that this machine lacks


def test_an_error_is_one_line_and_status_2(tmp_path):
    result = fork(str(tmp_path / "nowhere"), "OUT", program="scripts.export_hf")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and "nowhere" in result.stderr


@pytest.mark.parametrize("fault", ["", "probability", "token"])
def test_vllm_is_held_against_transformers(tmp_path, monkeypatch, capsys, fault):
    """With a stand-in for vLLM, which is not installed here: it answers as transformers does, or with a fault."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    transformers = import_transformers()
    config = transformers.ArceeConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=1
    )
    model = transformers.ArceeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "export")

    class LLM:
        def __init__(self, model, **options):
            assert options["dtype"] == "float32"

        def generate(self, prompts, wanted):
            return [self.answer(prompt, wanted) for prompt in prompts]

        def answer(self, prompt, wanted):
            ids, at = [ord(letter) for letter in prompt], []
            for step in range(wanted.max_tokens):
                with torch.no_grad():
                    scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                place = int(fault == "token" and step == 20)
                token = scores.topk(2).indices[place].item()
                at.append({token: SimpleNamespace(logprob=scores[token].item() + 0.01 * (fault == "probability"))})
                ids.append(token)
            completion = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=at, text="...")
            return SimpleNamespace(prompt=prompt, prompt_token_ids=ids[: len(prompt)], outputs=[completion])

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    status = check_vllm.main([str(tmp_path / "export"), "--out", str(tmp_path / "out" / "vllm.json")])
    assert status == int(bool(fault))
    found = json.loads((tmp_path / "out" / "vllm.json").read_text())
    assert found["architecture"] == "ArceeForCausalLM" and len(found["rows"]) == len(check_vllm.PROMPTS)
    assert all(row["tokens"] == check_vllm.TOKENS for row in found["rows"])
    assert "vLLM 0 serves ArceeForCausalLM" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "vllm", None)
    assert check_vllm.main([str(tmp_path / "export")]) == 2
    assert "error: vllm is missing: pip install vllm" in capsys.readouterr().err
    assert check_vllm.main([str(tmp_path)]) == 2
    assert "is no export: python -m scripts.export_hf RUN" in capsys.readouterr().err


@pytest.mark.parametrize("shift", [0.0, 0.01, math.nan])
def test_llama_cpp_is_held_against_transformers(train, trained, script, tmp_path, monkeypatch, capsys, shift):
    """With a stand-in for llama.cpp's server, which is not installed here: it answers as transformers does, or not."""
    script(export_hf, trained(train), tmp_path / "hf", "--dtype", "float32")
    (tmp_path / "model.gguf").touch()
    model = import_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()

    class Server:
        asked = 0

        def __init__(self, wanted):
            assert wanted.model.path == str(tmp_path / "model.gguf")

        def handle_completions(self, request):
            ids, content, self.asked = list(request["prompt"]), [], self.asked + 1
            wrong = shift if self.asked == len(check_vllm.PROMPTS) else 0.0  # in the last answer
            for _ in range(request["max_tokens"]):
                with torch.no_grad():
                    scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(scores.argmax()))
                content.append({"id": ids[-1], "logprob": float(scores.max()) + wrong})
            return {"choices": [{"text": "...", "logprobs": {"content": content}}]}

    stand_in = SimpleNamespace(Server=Server, CommonParams=lambda: SimpleNamespace(model=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    words = ["check_llama_cpp", str(tmp_path / "hf"), str(tmp_path / "model.gguf"), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert check_llama_cpp.main() == int(bool(shift))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["architecture"] == "ArceeForCausalLM" and len(found["rows"]) == len(check_vllm.PROMPTS)
    assert "llama.cpp serves ArceeForCausalLM" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match="xllamacpp is not installed: pip install xllamacpp"):
        check_llama_cpp.main()


def test_the_converter_of_llama_cpp_is_told_how_our_tokenizer_splits(train, trained, script, tmp_path, monkeypatch):
    """With a stand-in for the converter, which asks for the rule's name as the real one does."""
    script(export_hf, trained(train), tmp_path / "hf")
    checkout = tmp_path / "llama.cpp"
    (checkout / "conversion").mkdir(parents=True)
    (checkout / "conversion" / "__init__.py").touch()
    (checkout / "conversion" / "base.py").write_text(
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer):\n"
        "        raise NotImplementedError('BPE pre-tokenizer was not recognized')\n"
    )
    converter = checkout / "convert_hf_to_gguf.py"
    converter.write_text(
        "import sys\nfrom pathlib import Path\nfrom conversion.base import TextModel\n"
        "def main():\n"
        "    Path(sys.argv[3]).write_text(TextModel().get_vocab_base_pre(None) + ' ' + sys.argv[5])\n"
    )
    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace())
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = (tmp_path / "hf", tmp_path / "model.gguf", "--llama-cpp", checkout)
    script(export_gguf, *words)
    assert (tmp_path / "model.gguf").read_text() == "gpt-2 f32"
    with pytest.raises(ConfigError, match="exists: name another file"):
        script(export_gguf, *words)
    with pytest.raises(SystemExit, match="2"):  # a folder that cannot be made
        script(export_gguf, words[0], tmp_path / "model.gguf" / "in.gguf", *words[2:])
    (tmp_path / "model.gguf").unlink()
    edited = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    edited["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"converter refuses it \(BPE pre-tokenizer was not recognized"):
        script(export_gguf, *words)
    converter.write_text(
        "import sys\nfrom pathlib import Path\n"
        "def main():\n"
        "    Path(sys.argv[3]).write_text('half')\n"
        "    raise OSError(28, 'No space left on device')\n"
    )
    with pytest.raises(ConfigError, match=r"hf cannot be converted \(.*No space left on device"):
        script(export_gguf, *words)
    assert {each.name for each in tmp_path.iterdir()} <= {"hf", "llama.cpp", "outputs"}  # and no part of a file
    shutil.rmtree(checkout / "conversion")
    for name in ("conversion", "conversion.base"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"llama\.cpp is too old, without conversion: update it"):
        script(export_gguf, *words)
    with pytest.raises(ConfigError, match=r"holds no convert_hf_to_gguf\.py"):
        script(export_gguf, *words[:2], "--llama-cpp", tmp_path)


def test_gguf_files_are_scored_and_quantised_by_llama_cpp(train, trained, script, tmp_path, monkeypatch, capsys):
    """With a stand-in for llama-cpp-python, which is not installed here: its f32 is transformers' model."""
    script(export_hf, trained(train), tmp_path / "hf", "--dtype", "float32")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()

    class Stand:
        def __init__(self, path, n_ctx, n_batch, logits_all, verbose):
            assert n_ctx == n_batch == 16 and logits_all and not verbose
            if "bad" in path:
                raise ValueError("Failed to load model from file")
            self.metadata = {"general.file_type": Path(path).read_text()}

        def reset(self):
            self.scores = None

        def eval(self, ids):
            assert self.scores is None and len(ids) <= 16
            with torch.no_grad():
                self.scores = model(torch.tensor([ids])).logits[0].numpy()

        def close(self):
            pass

    def quantise(source, out, parameters):
        assert parameters._obj.ftype == 2 and Path(source.decode()).read_text() == "0"
        Path(out.decode()).write_text("2")
        return 0

    class Parameters(ctypes.Structure):
        _fields_ = (("ftype", ctypes.c_int),)

    stand_in = SimpleNamespace(
        Llama=Stand,
        llama_model_quantize=quantise,
        llama_model_quantize_default_params=Parameters,
        LLAMA_FTYPE_MOSTLY_Q4_0=2,
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setattr(export_gguf, "convert", lambda export, out, checkout, kind: out.write_text("0"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    whole, small, bad = (tmp_path / f"{name}.gguf" for name in ("whole", "small", "bad"))
    script(export_gguf, tmp_path / "hf", whole, "--llama-cpp", tmp_path)
    script(export_gguf, tmp_path / "hf", small, "--llama-cpp", tmp_path, "--outtype", "q4_0")
    (tmp_path / "text").write_text("def main(): return 1\n" * 3)
    words = (tmp_path / "hf", "--text", tmp_path / "text", "--length", "16", "--gguf")
    script(evaluate, *words, whole, small)
    (row,) = map(json.loads, (tmp_path / "hf" / "evaluations.jsonl").read_text().splitlines())
    first, *others = row["scores"].values()
    assert list(row["scores"])[1:] == ["llama.cpp, f32", "llama.cpp, q4_0"] and "llama_cpp_python" in row["versions"]
    assert all(other["loss"] == pytest.approx(first["loss"], rel=1e-5) for other in others)
    bad.touch()
    with pytest.raises(ConfigError, match=r"bad.gguf cannot be loaded by llama.cpp \(Failed to load"):
        script(evaluate, *words, bad)
    with pytest.raises(ConfigError, match=r"gone is no file: write it with scripts.export_gguf"):
        script(evaluate, *words, "gone")
    with pytest.raises(ConfigError, match="a GGUF file has no pattern"):
        script(evaluate, tmp_path / "hf", *words[1:3], "--gguf", whole, "--pattern")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match=r"--gguf needs llama.cpp as a package: pip install llama-cpp-python"):
        script(evaluate, *words, whole)
    with pytest.raises(ConfigError, match=r"--outtype q4_0 needs llama.cpp as a package"):
        script(export_gguf, tmp_path / "hf", tmp_path / "third", "--llama-cpp", tmp_path, "--outtype", "q4_0")
