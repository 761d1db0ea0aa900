"""precision.qat: the last phase rounds weights as `scripts.evaluate --quantize` does, and loses less by it."""

import pytest
import torch
from conftest import fork, losses, merge, rows
from test_pipeline import FOUR_LAYERS, PIPELINE
from test_pipeline import run as run_pipeline
from test_train import DENSE, LAST_STEP

from configs.errors import ConfigError
from configs.loader import load_config
from models.llama import Llama, llama_args
from recipes.check import check_keys
from recipes.qat import prepare_qat, set_fake_quantization
from recipes.watchdog import Watchdog
from scripts.evaluate import quantize


@pytest.mark.parametrize(("kind", "tolerance"), [("int4", 0.0), ("int8", 1e-5)])
def test_the_layers_compute_what_quantised_ones_do(kind, tolerance):
    def model() -> Llama:
        torch.manual_seed(0)
        model = Llama(llama_args("debug", n_layers=2, dim=64, n_heads=2, n_kv_heads=1, hidden_dim=96, vocab_size=50))
        with torch.no_grad():
            model.init_weights()
            for parameter in model.layers.parameters():  # the initial weights are too small to tell
                if parameter.ndim == 2:
                    parameter.normal_(std=0.2)
        return model

    tokens = torch.arange(24).reshape(2, 12)
    plain, quantised, trained = model(), model(), model()
    names = list(trained.state_dict())
    prepare_qat(trained, kind)
    assert list(trained.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(trained(tokens), plain(tokens), rtol=0, atol=0)
        quantize(quantised.layers, kind)  # the head stays
        set_fake_quantization([trained], True)
        torch.testing.assert_close(trained(tokens), quantised(tokens), rtol=tolerance, atol=tolerance)
        assert (trained(tokens) - plain(tokens)).abs().max() > 1e-2
    # The gradient of a weight that is rounded within its range is that of the rounded one.
    trained(tokens).sum().backward()
    weight = trained.layers["0"].feed_forward.w2.weight
    assert weight.grad.count_nonzero() > 0.9 * weight.numel()


def test_the_last_phase_rounds_and_resumes_exactly(train, tmp_path, capsys):
    """The last phase begins at step 9. The steps before it are a plain run's; a resume within it is exact."""
    words = ("--precision.qat", "int4", "--validation.freq", "4")
    plain = train(tmp_path / "plain", *words[2:])
    whole = train(tmp_path / "whole", *words)
    said = capsys.readouterr().out
    for stop in (9, None):
        resumed = train(tmp_path / "resumed", *words, stop_after=stop)
    assert losses(resumed) == losses(whole)
    assert {s: losses(whole)[s] for s in range(1, 9)} == {s: losses(plain)[s] for s in range(1, 9)}
    assert losses(whole)[LAST_STEP] != losses(plain)[LAST_STEP]
    assert {step for step, row in whole.items() if "val_loss_quantised" in row} == {LAST_STEP}
    last, again = whole[LAST_STEP], resumed[LAST_STEP]
    assert last["val_loss_quantised"] == again["val_loss_quantised"] != last["val_loss"] == again["val_loss"]
    assert last["nonzero_share"] == again["nonzero_share"]
    assert "step 9: weights of the blocks' linear layers are rounded to int4" in said
    assert f"({last['val_loss_quantised']:.4f} int4)" in said
    assert f"validation loss with weights rounded to int4: {last['val_loss_quantised']:.4f}" in said
    with pytest.raises(ConfigError, match=r'precision.qat = "none", but the run in .* has "int4"'):
        train(tmp_path / "whole", *words[2:], "--training.steps", "14")


def test_a_compiled_run_with_recomputed_activations_is_the_eager_one(train, tmp_path, monkeypatch):
    watched, watch = [], Watchdog.watch
    monkeypatch.setattr(Watchdog, "watch", lambda *args, **more: [watched.append(args[1:]), watch(*args, **more)])
    torch._dynamo.reset()
    words = ("--precision.qat", "int4", *DENSE, "--training.steps", "2")
    compiled = ("--compile.enable", "true", "--compile.backend", "aot_eager", "--activation_checkpoint.mode", "full")
    run = train(tmp_path / "compiled", *words, *compiled, recipe="dense")
    eager = train(tmp_path / "eager", *words, recipe="dense")
    assert run[1]["graphs_compiled"] > 0
    assert ("the validation of step 2 with rounded weights", True) in watched  # the limit of what compiles
    assert losses(run) == pytest.approx(losses(eager), rel=1e-5)
    assert run[2]["val_loss_quantised"] == pytest.approx(eager[2]["val_loss_quantised"], rel=1e-5)


def test_shards_and_pipeline_stages_round_as_one_process_does(tiny, train, tmp_path):
    """Under FSDP2 the layers see whole weights; a stage of a pipeline has the layers of its part of the model."""
    words = ("--precision.qat", "int4", *DENSE, *FOUR_LAYERS, "--training.steps", "4")
    one = train(
        tmp_path / "one",
        *words,
        *("--training.local_batch_size", "1", "--training.global_batch_size", "4"),
        recipe="dense",
    )
    assert one[4]["val_loss_quantised"] != one[4]["val_loss"]
    stages = run_pipeline(tiny, tmp_path / "stages", "dense", *words, *PIPELINE)
    shards = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    shards = merge(tiny, [*words, *shards, "--job.dump_folder", str(tmp_path / "shards")])
    result = fork("--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *shards, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    for run in (stages, rows(tmp_path / "shards")):
        # Sums of another order let a few weights round to the other neighbour: the third loss differs by 1e-5.
        assert losses(run) == pytest.approx(losses(one), rel=1e-4)
        assert run[4]["val_loss_quantised"] == pytest.approx(one[4]["val_loss_quantised"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedule.phases", '[{mode = "sparse"}]'), "is for the last phase, and that is sparse"),
        (("--training.steps", "4"), "that is sparse in .* with training.steps = 4: .* a dense phase of a step or more"),
        (("--model.name", "llama_moe_relu2", "--model.flavor", "moe_debug"), "not supported for experts"),
        (("--parallelism.tensor_parallel_degree", "2"), "tensor_parallel_degree = 2, whose shards cut the rows"),
        (("--model.converters", '["quantize.linear.float8"]'), "replace the same layers: set one"),
        (("--model.hidden_dim", "336", "--router.enable", "false"), "do not divide model.hidden_dim = 336"),
    ],
)
def test_what_it_does_not_go_with_is_refused(words, message):
    command = ["--config", "configs/debug.toml", "--recipe", "columns_quarter", "--precision.qat", "int4", *words]
    with pytest.raises(ConfigError, match=message):
        check_keys(load_config(command)[0], 2)
