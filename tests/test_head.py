"""The loss that the head computes chunk by chunk is the plain one, in every kind of run; the residual stream in bf16.

In float32 the two differ by the order in which sums are added. In bf16 both round the logits, their gradient and the
products once, so both are compared with float64.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import fork, losses, merge, rows
from test_pipeline import FOUR_LAYERS, PIPELINE, assert_equal
from test_pipeline import run as run_pipeline
from test_train import DENSE, LAST_STEP

from configs.errors import ConfigError
from configs.loader import load_config
from configs.titan import IGNORE_INDEX
from models.head import Head, linear_cross_entropy, losses_and_gradient
from models.llama import Llama, llama_args
from recipes.check import check_keys

CHUNKS = ("--training.loss_chunk_tokens", "48")  # does not divide the tokens of a micro-batch


def operands(tokens, dim, vocabulary, device="cpu", ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=generator)
    weight = 3 * torch.randn(vocabulary, dim, generator=generator) / dim**0.5
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return x.to(device), weight.to(device), labels.to(device)


def exact(x, weight, labels, scale):
    """Loss and gradients in float64, of the operands as they are."""
    x, weight = (each.detach().double().requires_grad_() for each in (x, weight))
    loss = F.cross_entropy(x @ weight.mT, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    (loss * scale).backward()
    return loss, x.grad, weight.grad


@pytest.mark.parametrize(
    ("tokens", "dim", "vocabulary", "chunk"), [(64, 16, 96, 16), (37, 8, 51, 10), (5, 4, 7, 64), (9, 4, 7, 1)]
)
def test_chunks_give_the_plain_loss_and_its_gradients(tokens, dim, vocabulary, chunk):
    x, weight, labels = operands(tokens, dim, vocabulary)
    expected = exact(x, weight, labels, 0.01)
    for each in (x, weight):
        each.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, chunk)
    assert loss.dtype == torch.float32
    (0.01 * loss).backward()
    for found, wanted in zip((loss, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    assert not x.grad[labels == IGNORE_INDEX].any()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, labels, chunk), loss)


def test_tokens_without_labels_have_no_loss_and_a_second_backward_is_refused():
    x, weight, labels = operands(12, 4, 8, ignored=1.0)
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, 5)
    loss.backward(retain_graph=True)
    assert loss == 0 and not weight.grad.any()
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_logits_are_never_whole():
    """Nothing of the size of all logits is computed, in either pass."""
    tokens, vocabulary, chunk = 64, 100, 16

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, torch.Tensor) and each.shape[-1:] == (vocabulary,):
                    self.largest = max(self.largest, each.numel())
            return out

    x, weight, labels = operands(tokens, 4, vocabulary)
    for each in (x, weight):
        each.requires_grad_()
    with Sizes() as seen:
        linear_cross_entropy(x, weight, labels, chunk).backward()
    assert seen.largest == chunk * vocabulary


def test_a_chunk_s_gradient_is_gone_before_the_next_logits():
    known = []

    def compute(logits, labels):
        known.append(weakref.ref(logits))
        assert sum(each() is not None for each in known) == 1
        gradient = torch.zeros_like(logits)
        known.append(weakref.ref(gradient))
        return logits.sum(), gradient

    x, weight, labels = operands(12, 4, 8)
    weight.requires_grad_()
    linear_cross_entropy(x, weight, labels, 4, compute).backward()
    assert len(known) == 6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [True, False])  # weights in float32, as on one GPU; in bf16, as under FSDP2
def test_bf16_is_as_exact_as_the_plain_loss(device, autocast):
    x, weight, labels = operands(600, 64, 1000, device)
    x, weight = (each.bfloat16().float() if autocast else each.bfloat16() for each in (x, weight))
    expected = exact(x, weight, labels, 1 / 600)
    errors = {}
    compute = torch.compile(losses_and_gradient) if device == "cuda" else losses_and_gradient
    for name in ("plain", "chunks"):
        mine = [each.detach().requires_grad_() for each in (x, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            if name == "plain":
                logits = F.linear(*mine).float()
                loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
            else:
                loss = linear_cross_entropy(*mine, labels, 256, compute)
        (loss / 600).backward()
        assert [each.grad.dtype for each in mine] == [each.dtype for each in mine]
        found = loss, *(each.grad for each in mine)
        errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert max(errors["plain"]) < 0.01
    for mine, plain in zip(errors["chunks"], errors["plain"], strict=True):
        assert mine < 1.1 * plain + 1e-5


def test_the_model_gives_logits_or_the_loss():
    with torch.random.fork_rng(), torch.no_grad():
        model = Llama(llama_args("debug", n_layers=1, dim=16, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=50))
        model.init_weights()
    assert isinstance(model.output, Head)
    model.output.chunk = 7
    tokens = torch.arange(24).reshape(2, 12)
    logits = model(tokens)
    assert logits.shape == (2, 12, 50)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, labels=tokens), expected)
    assert model(tokens).shape == logits.shape  # labels are of one call


def test_runs_with_chunks_follow_plain_ones(train, tmp_path):
    """Through phases, validation and gradient accumulation; a resume is exact, and may change the chunk."""
    words = ("--training.local_batch_size", "2", "--training.global_batch_size", "4")
    plain = train(tmp_path / "plain", *words, recipe="columns_quarter")
    for stop in (6, None):
        chunks = train(tmp_path / "chunks", *words, *CHUNKS, recipe="columns_quarter", stop_after=stop)
    whole = train(tmp_path / "whole", *words, *CHUNKS, recipe="columns_quarter")
    assert losses(chunks) == losses(whole)
    for step, row in plain.items():
        for name in {"loss", "grad_norm", "val_loss", "val_loss_sparse"} & row.keys():
            assert whole[step][name] == pytest.approx(row[name], rel=1e-4), (step, name)
    assert whole[LAST_STEP]["loss"] < whole[1]["loss"] - 0.3


def test_shards_compute_the_loss_of_their_chunks(tiny, train, tmp_path):
    one = train(tmp_path / "one", *DENSE, *CHUNKS, recipe="dense")
    words = ("--training.local_batch_size", "2", "--training.global_batch_size", "4", *DENSE, *CHUNKS)
    words = merge(tiny, [*words, "--job.dump_folder", str(tmp_path / "two")])
    result = fork("--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *words, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    two = rows(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two[LAST_STEP]["val_loss"] == pytest.approx(one[LAST_STEP]["val_loss"], rel=1e-4)


def test_the_last_stage_of_a_pipeline_computes_the_loss(tiny, train, tmp_path):
    words = (*DENSE, *FOUR_LAYERS, *CHUNKS, "--training.steps", "4")
    one = train(
        tmp_path / "one",
        *words,
        "--training.local_batch_size",
        "1",
        "--training.global_batch_size",
        "4",
        recipe="dense",
    )
    assert_equal(run_pipeline(tiny, tmp_path / "two", "dense", *words, *PIPELINE), one)


def test_the_compiled_loss_is_the_eager_one(train, tmp_path):
    torch._dynamo.reset()
    words = (*DENSE, *CHUNKS, "--training.steps", "2")
    compiled = ("--compile.enable", "true", "--compile.components", "loss", "--compile.backend", "aot_eager")
    run = train(tmp_path / "compiled", *words, *compiled, recipe="dense")
    assert run[1]["graphs_compiled"] > 0
    assert losses(run) == pytest.approx(losses(train(tmp_path / "eager", *words, recipe="dense")), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parallelism.tensor_parallel_degree", "2"), "tensor_parallel_degree = 2, which shards the logits"),
        (("--model.converters", '["quantize.linear.float8"]'), 'add "output" to quantize.linear.float8.filter_fqns'),
    ],
)
def test_what_the_head_cannot_do_is_refused(words, message):
    config, _ = load_config(["--config", "configs/debug.toml", *CHUNKS, *words])
    with pytest.raises(ConfigError, match=message):
        check_keys(config, 2)
    if "converters" in words[0]:
        config.quantize.linear.float8.filter_fqns = ["attention", "output"]
        check_keys(config, 1)


def test_the_residual_stream_can_be_bf16_on_one_device(train, tmp_path):
    """Beside the blocks that FSDP2 would run: products are in bf16 in both runs, and so is the stream in one."""
    kinds = {}

    def watch(module, inputs, output):
        kinds[module] = output.dtype

    words = (*DENSE, "--training.mixed_precision_param", "bfloat16", "--training.steps", "8")
    runs = {}
    for name in ("float32", "bf16"):
        kinds.clear()
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: watch(module, inputs, output) if hasattr(module, "attention") else None
        )
        runs[name] = train(tmp_path / name, *words, "--training.bf16_residual", json_of(name == "bf16"), recipe="dense")
        handle.remove()
        assert set(kinds.values()) == {torch.bfloat16 if name == "bf16" else torch.float32}
    assert losses(runs["bf16"]) == pytest.approx(losses(runs["float32"]), rel=0.01)
    assert losses(runs["bf16"]) != losses(runs["float32"])


def json_of(value: bool) -> str:
    return str(value).lower()
