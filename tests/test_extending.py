"""The toy pattern of docs/extending.md, taken from the page: registered, trained, refused, against the reference."""

import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT, losses
from torch.testing import assert_close

import kernels.feed_forward
from configs.errors import ConfigError
from kernels import MASKED, FeedForwardSparsity, Shape, choose, sparse_feed_forward

HALVES = ("--activations.pattern", "halves", "--activations.v", "16", "--activations.g", "64")  # g: the default
SHORT = '[{mode = "dense", end = 3}, {mode = "sparse"}]'


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """The page's module, with its family registered as the page says."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    (tmp_path / "halves_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("halves_of_the_page")
    monkeypatch.setattr(kernels.feed_forward, "FAMILIES", [*kernels.feed_forward.FAMILIES, module.HALVES])
    yield module
    del sys.modules["halves_of_the_page"]


@pytest.mark.parametrize("tokens", [48, 41])
def test_the_family_computes_what_the_reference_does(halves, tokens):
    rand = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=rand, dtype=torch.float64) for s in ((tokens, 12), (32, 12), (12, 32))]
    x, w1, w2 = (each.requires_grad_() for each in inputs)
    order, results = torch.randperm(tokens, generator=rand), []
    for family in (halves.HALVES, MASKED):
        y = sparse_feed_forward(x, w1, w2, FeedForwardSparsity(halves.Halves(16)), order=order, family=family)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w1, w2))))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_the_pattern_trains_on_the_reference_and_is_refused_where_it_does_not_fit(halves, train, tmp_path):
    words = (*HALVES, "--training.steps", "5", "--schedule.phases", SHORT, "--schedule.decay_with_tail", "false")
    by_reference = train(tmp_path / "reference", *words, recipe="groups_quarter")
    with kernels.prefer(halves.HALVES):
        by_family = train(tmp_path / "family", *words, recipe="groups_quarter")
    assert [row["phase"] for row in by_reference.values()] == ["dense"] * 3 + ["sparse"] * 2
    assert losses(by_family) == pytest.approx(losses(by_reference), rel=1e-4)
    assert 0.3 < by_reference[5]["energy_kept"] < 1
    with pytest.raises(ConfigError, match=r"activations.v = 16: an odd hidden_dim = 255 has no halves; change it"):
        train(
            tmp_path / "odd", *words, "--model.hidden_dim", "255", "--router.enable", "false", recipe="groups_quarter"
        )
    with pytest.raises(ConfigError, match=r'activations.keep = 0.5 is not read by pattern = "halves", which reads v'):
        train(tmp_path / "keep", *words, "--activations.keep", "0.5", recipe="groups_quarter")


def test_the_pattern_is_chosen_on_a_gpu_and_without_its_family_runs_on_the_reference(halves, monkeypatch):
    where = Shape(192, 512), torch.device("cuda"), torch.bfloat16
    sparsity = FeedForwardSparsity(halves.Halves(16))
    assert choose(sparsity, *where, here=False) == (halves.HALVES, "")
    family, reason = choose(FeedForwardSparsity(halves.Halves(16), (1,)), *where, here=False)
    assert family is MASKED and reason == "halves need dense weights"
    monkeypatch.setattr(kernels.feed_forward, "FAMILIES", kernels.feed_forward.FAMILIES[:-1])
    assert choose(sparsity, *where, here=False) == (MASKED, "no family has kernels for this pattern")
