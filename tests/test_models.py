"""The model: a plain Llama when dense, the same parameters when sparse, two steps of every job on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, family_named
from torch import Tensor
from torch._dynamo.utils import counters

from configs.errors import ConfigError
from configs.loader import load_config
from kernels import FeedForwardSparsity, Groups, Shape, Venom, activation_clusters, token_clusters
from models.attention import rotate
from models.llama import FLAVORS, Llama, llama_args
from recipes.check import check_config
from recipes.sparsity import Sparsity, _apart

SMALL = {
    "dim": 48,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "hidden_dim": 160,
    "vocab_size": 97,
    "max_seq_len": 24,
}


def build(**changes) -> Llama:
    torch.manual_seed(0)
    model = Llama(llama_args("debug", **(SMALL | changes)))
    with torch.no_grad():
        model.init_weights()
    return model


def plain_llama(weights: dict[str, Tensor], tokens: Tensor, heads: int, kv_heads: int, swiglu: bool) -> Tensor:
    """Llama in plain PyTorch: RMSNorm, RoPE on pairs of neighbours, grouped queries, a gated or a squared-ReLU FFN."""

    def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale

    def rope(x: Tensor) -> Tensor:  # [B, heads, S, head_dim]
        width = x.shape[-1]
        angles = torch.arange(x.shape[-2])[:, None] * 500000.0 ** (-torch.arange(0, width, 2) / width)
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)

    x = weights["tok_embeddings.weight"][tokens]
    batch, length, dim = x.shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for layer in range(layers):
        block = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        a = rms_norm(x, block["attention_norm.weight"])
        q, k, v = (
            (a @ block[f"attention.w{name}.weight"].T).view(batch, length, count, dim // heads).transpose(1, 2)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rope(q), rope(k)
        k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / (dim // heads) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        a = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        x = x + a @ block["attention.wo.weight"].T
        a = rms_norm(x, block["ffn_norm.weight"])
        up = a @ block["feed_forward.w1.weight"].T
        h = F.silu(up) * (a @ block["feed_forward.w3.weight"].T) if swiglu else up.clamp_min(0) ** 2
        x = x + h @ block["feed_forward.w2.weight"].T
    return rms_norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize("swiglu", [False, True])
def test_the_dense_model_is_a_plain_llama(swiglu):
    model = build(swiglu=swiglu)
    tokens = torch.randint(SMALL["vocab_size"], (2, SMALL["max_seq_len"]))
    expected = plain_llama(model.state_dict(), tokens, SMALL["n_heads"], SMALL["n_kv_heads"], swiglu)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clusters", [0, 10])
def test_a_pattern_that_keeps_everything_changes_nothing(clusters):
    """Keep share 1: the sparse path, router included, computes the dense function and gradients."""
    model = build(sparsity=FeedForwardSparsity(Groups(v=8, g=16, keep=1.0), clusters=clusters))
    tokens = torch.randint(SMALL["vocab_size"], (2, SMALL["max_seq_len"]))
    results = []
    for sparse in (False, True):
        for feed_forward in model.feed_forwards().values():
            feed_forward.sparse = sparse
            torch.nn.init.normal_(feed_forward.centroids)
        model.zero_grad()
        logits = model(tokens)
        logits.logsumexp(-1).mean().backward()
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-4)


def test_the_state_dict_does_not_depend_on_the_recipe():
    sparse = build(sparsity=FeedForwardSparsity(Venom(8, 2, 16), (1, 3), clusters=10))
    assert list(sparse.state_dict()) == list(build().state_dict())


def test_counts_in_evaluation_mode_are_those_of_the_activations():
    pattern = Venom(8, 2, 16)
    model = build(n_layers=1, sparsity=FeedForwardSparsity(pattern))
    (feed_forward,) = model.feed_forwards().values()
    feed_forward.sparse = True
    x = torch.randn(2, SMALL["max_seq_len"], SMALL["dim"])
    feed_forward(x)
    assert not feed_forward.activity.any()  # training mode counts nothing
    feed_forward.eval()
    feed_forward(x)
    h = (x.flatten(0, 1) @ feed_forward.w1.weight.T).relu() ** 2
    kept = h * pattern.mask(h)
    expected = [h.numel(), (h != 0).sum(), (h**2).sum(), (kept**2).sum()]
    torch.testing.assert_close(
        feed_forward.activity, torch.tensor([float(value.detach()) for value in map(torch.as_tensor, expected)])
    )


def test_flops_left_by_a_pattern():
    assert FeedForwardSparsity().flops_share(768) == 1
    assert FeedForwardSparsity(weight_products=(1,)).flops_share(768) == pytest.approx((0.5 + 5) / 6)
    assert FeedForwardSparsity(Venom(64, 2, 16), (1, 3)).flops_share(768) == pytest.approx((0.5 + 5 / 8) / 6)
    assert FeedForwardSparsity(Groups(128, 64, 0.25)).flops_share(768) == pytest.approx((1 + 5 / 4) / 6)
    assert FeedForwardSparsity(Groups(128, 64, 0.125)).flops_share(768) == pytest.approx((1 + 5 * 2 / 12) / 6)


def test_flops_that_a_family_executes():
    def share(name, *sparsity):
        spec = FeedForwardSparsity(*sparsity)
        return family_named(name, spec).cost(spec, Shape(64, 1024)).executed_share

    quarter, venom = Groups(128, 128, 0.25), Venom(128, 2, 16)
    assert share("reference", quarter) == 1
    assert share("groups", quarter) == pytest.approx((1 + 5 / 4) / 6)
    assert share("groups", quarter, (1, 3)) == pytest.approx((0.5 + 5 / 4) / 6)
    # Product (1) for what chooses, and then of what is kept; 2:4 weights are read with their zeros.
    assert share("columns", Groups(1024, 1, 0.25, sample=8)) == pytest.approx((1 / 8 + 6 / 4) / 6)
    assert share("columns", Groups(1024, 1, 0.25), (1, 3)) == pytest.approx((1 + 6 / 4) / 6)
    assert share("venom", venom, (1,)) == pytest.approx((0.5 + 3 / 4 + 2) / 6)  # four columns, whatever n
    assert share("venom", venom) == pytest.approx((1 + 3 / 4 + 2) / 6)
    assert share("two_four", None, (1, 3)) == pytest.approx(5 / 6)
    assert share("two_four", None, (1,)) == pytest.approx(5.5 / 6)
    assert share("two_four", Venom(1, 2, 4)) == pytest.approx((1 + 0.5 + 1 + 1 + 0.5 + 1) / 6)
    # The whole neurons are computed twice, cut with all others and dense.
    assert share("two_four", Venom(1, 2, 4), (1, 3), True) == pytest.approx((4 * 0.5 + 2 * 0.55) / 6)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("job", sorted((ROOT / "configs").glob("[!m]*.toml")), ids=lambda path: path.stem)
def test_every_job_takes_a_dense_and_a_sparse_step_on_the_meta_device(job, recipe):
    """Shapes of the real micro-batch and dtypes of the real step, without memory; two layers stand for all."""
    words = ["--config", str(job), "--recipe", str(recipe), "--model.n_layers", "2", "--schedule.dense_layers", "0"]
    config, _ = load_config(words)
    args, _ = check_config(config)
    args.vocab_size = config.tokenizer.vocab_size
    with torch.device("meta"):
        model = Llama(args)
        tokens = torch.zeros(config.training.local_batch_size, config.training.seq_len, dtype=torch.int64)
    for sparse in (False, True):
        for feed_forward in model.feed_forwards().values():
            feed_forward.sparse = sparse
        logits = model(tokens)
        logits.float().logsumexp(-1).mean().backward()
        assert logits.shape == (*tokens.shape, args.vocab_size)
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_flavors_have_the_sizes_they_are_named_for():
    sizes = {"160m": 0.16e9, "400m": 0.4e9, "1b": 1.0e9, "7b": 6.0e9, "7b-slice": 1.3e9}
    with torch.device("meta"):
        for flavor, size in sizes.items():
            model = Llama(llama_args(flavor, vocab_size=32768))
            assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(size, rel=0.15), flavor
    assert set(sizes) | {"debug"} == {name for name in FLAVORS if not name.startswith("moe_")}  # tests/test_experts.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_is_torchtitan_s(dtype):
    from torchtitan.models.llama3.model.model import apply_rotary_emb

    x, dy = torch.randn(2, 5, 3, 16).to(dtype).requires_grad_(), torch.randn(2, 5, 3, 16).to(dtype)
    angles = torch.outer(torch.arange(5.0), torch.rand(8))
    freqs_cis = torch.polar(torch.ones_like(angles), angles)
    expected, _ = apply_rotary_emb(x, x, freqs_cis)
    positions = torch.arange(5).flip(0).expand(2, -1)
    torch.testing.assert_close(rotate(x.flip(1), freqs_cis, positions).flip(1), rotate(x, freqs_cis))
    actual = rotate(x, freqs_cis)
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (actual, expected)), **close)


@pytest.mark.parametrize("clusters", [1, 2, 3, 16, 36, 72, 256])
def test_apart_are_clusters_that_are_alike(clusters):
    order = _apart(clusters)
    assert sorted(order.tolist()) == list(range(clusters))
    if clusters >= 16:  # any 16 in a row, a block of Venom, are spread over all of them
        for window in order.unfold(0, 16, 1):
            assert window.sort().values.diff().min() >= max(1, clusters // 64)


def test_what_stays_dense_is_neither_clustered_nor_cut():
    torch.manual_seed(0)
    words = ["--config", "configs/debug.toml", "--recipe", "recipes/venom_2of16.toml", "--schedule.dense_layers", "3"]
    config, _ = load_config(words)
    args, spans = check_config(config)
    args.vocab_size, tokens = 64, torch.randint(64, (2, 48))
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
        ffns = list(model.feed_forwards().values())
        old = [ffn.w1.weight.clone() for ffn in ffns]
        sparsity = Sparsity(config, model.feed_forwards(), [], spans)
        sparsity.enter(spans[1].start + 1, lambda: model(tokens))
        assert [ffn.sparse for ffn in ffns] == [False, False, False, True]
        assert [torch.equal(ffn.w1.weight, weight) for ffn, weight in zip(ffns, old, strict=True)] == [True] * 3 + [
            False
        ]
        sparsity.run_as(FeedForwardSparsity(Venom(1, 2, 4)))  # inference in another mode keeps to it
        assert [ffn.sparse for ffn in ffns] == [False, False, False, True]
        with sparsity.dense():
            assert not any(ffn.sparse for ffn in ffns)
        assert [len(masks) for masks in sparsity.weight_masks()] == [0, 0, 0, 2]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sparse_phase_clusters_neurons_by_the_activations_of_its_first_tokens(compiled, monkeypatch):
    monkeypatch.setattr("recipes.sparsity.TOGETHER", 3)  # of four layers
    torch.manual_seed(0)
    config, _ = load_config(["--config", "configs/debug.toml", "--recipe", "recipes/groups_quarter.toml"])
    args, spans = check_config(config)
    args.vocab_size, tokens = 64, torch.randint(64, (2, 48))
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
        for key, block in model.layers.items() if compiled else ():
            model.layers.register_module(key, torch.compile(block, backend="eager", fullgraph=True))
        expected, read = model(tokens), []
        ffns = list(model.feed_forwards().values())
        old = [ffn.w1.weight.clone() for ffn in ffns]
        sparsity = Sparsity(config, model.feed_forwards(), [], spans)
        with pytest.raises(ValueError, match="give the step's forward pass"):
            sparsity.enter(spans[1].start + 1)
        graphs = counters["stats"]["unique_graphs"]
        hooks = [ffn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1))) for ffn in ffns]
        assert sparsity.enter(spans[1].start + 1, lambda: model(tokens))
        for hook in hooks:
            hook.remove()
        assert len(read) == len(ffns) and all(ffn.sparse for ffn in ffns)
        assert counters["stats"]["unique_graphs"] == graphs
        for index, (ffn, x, weight) in enumerate(zip(ffns, read, old, strict=True)):
            seed = (spans[1].start + 1) * 1_009 + index
            order, centroids = activation_clusters(x, weight, config.router.cluster_size, seed=seed)
            assert torch.equal(ffn.w1.weight, weight[order]) and torch.equal(ffn.centroids, centroids)
            assert not ffn._forward_pre_hooks
        with sparsity.dense():
            torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("recipe", ["columns_quarter", "groups_quarter"])
def test_a_sparse_phase_clusters_the_tokens_of_its_first_step(recipe):
    """Groups of neurons need an order of the neurons beside it; single neurons stay where they are."""
    torch.manual_seed(0)
    keys = ("--router.token_clusters", "8", "--activations.v", "32")
    config, _ = load_config(["--config", "configs/debug.toml", "--recipe", f"recipes/{recipe}.toml", *keys])
    args, spans = check_config(config)
    args.vocab_size, tokens = 64, torch.randint(64, (2, 48))
    model, read = Llama(args), []
    with torch.no_grad():
        model.init_weights()
        ffns = [ffn for ffn in model.feed_forwards().values() if not ffn.always_dense]
        old = [ffn.w1.weight.clone() for ffn in ffns]
        sparsity = Sparsity(config, model.feed_forwards(), [], spans)
        hooks = [ffn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1))) for ffn in ffns]
        sparsity.enter(spans[1].start + 1, lambda: model(tokens))
        for hook in hooks:
            hook.remove()
        for index, (ffn, x, weight) in enumerate(zip(ffns, read, old, strict=True)):
            seed = (spans[1].start + 1) * 1_009 + args.dense_layers + index
            assert torch.equal(ffn.centroids, token_clusters(x, 8, seed=seed))
            order, _ = activation_clusters(x, weight, config.router.cluster_size, seed=seed)
            expected = weight if recipe == "columns_quarter" else weight[order]
            assert torch.equal(ffn.w1.weight, expected)
        model(tokens)
    config.router.token_clusters = 16
    assert sparsity.prepares(spans[1].start + 2)


def test_clusters_of_tokens_need_no_width_that_clusters_of_neurons_divide():
    keys = ("--recipe", "columns_quarter", "--activations.v", "512", "--model.hidden_dim", "1000")
    with pytest.raises(ConfigError, match=r"router.cluster_size = 64 does not divide model.hidden_dim = 1000"):
        check_config(load_config(["--config", "debug", *keys])[0])
    check_config(load_config(["--config", "debug", *keys, "--router.token_clusters", "8"])[0])
