"""torchtitan's private names, which configs/titan.py alone uses and the installed release has; newer torchtitans."""

import ast
import inspect
import re
import sys
import types
from dataclasses import dataclass, fields

import pytest
import torch
from conftest import ROOT
from torch import nn
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from configs import titan
from configs.errors import ConfigError
from models.feed_forward import FeedForward as OurFeedForward
from scripts import titan_baseline


@pytest.mark.parametrize("owner, name, reason", titan.PRIVATE, ids=lambda value: getattr(value, "__name__", None))
def test_a_name_that_is_not_public_is_there_and_used(monkeypatch, owner, name, reason):
    monkeypatch.setattr(titan, "PRIVATE", [(owner, name, reason)])
    assert titan.lacking() == []


def test_what_a_release_lacks_is_named_with_its_reason(monkeypatch):
    class Uncalled:
        def _hook(self):
            pass

    private = [(HuggingFaceTokenizer, "_gone", "it was needed"), (Uncalled, "_hook", "overridden")]
    monkeypatch.setattr(titan, "PRIVATE", private)
    assert titan.lacking() == ["HuggingFaceTokenizer._gone: it was needed", "Uncalled._hook: overridden"]


def private_names(owner: type) -> set[str]:
    """Methods and attributes of torchtitan's in a class, that begin with an underscore."""
    found = set()
    for each in owner.__mro__:
        if each.__module__.startswith("torchtitan"):
            found |= {name for name in vars(each) if re.match(r"_[a-z]", name) and name != "_abc_impl"}
            found |= set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(each)))
    return found


def private_uses(text: str) -> set[str]:
    """Private names of the classes that a module takes from configs/titan.py, which it overrides or reads."""
    tree = ast.parse(text)
    taken = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "configs.titan"
        for alias in node.names
    }
    taken |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "titan"
    }
    classes = [value for name in taken if inspect.isclass(value := getattr(titan, name, None))]
    private = set().union(*map(private_names, classes))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return private & (names | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)})


def test_names_that_are_not_public_are_used_in_one_place():
    folders = [ROOT, *(ROOT / name for name in ("recipes", "models", "scripts"))]
    texts = {file.name: file.read_text() for folder in folders for file in folder.glob("*.py")}
    assert {name: found for name, text in texts.items() if (found := private_uses(text))} == {}
    imports = re.compile(r"^\s*(import|from) torchtitan", re.MULTILINE)
    assert [name for name, text in texts.items() if imports.search(text)] == []
    override = "from configs.titan import CheckpointManager\nclass Own(CheckpointManager):\n    def _ft_save(self): ..."
    assert private_uses(override) == {"_ft_save"}


def test_the_override_of_the_page_keeps_to_the_kernels(monkeypatch):
    """docs/torchtitan.md's file, with stand-ins for torchtitan 0.3's names: its FFN is this repository's."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "torchtitan.md").read_text(), re.DOTALL)

    class Module(nn.Module):
        @dataclass(kw_only=True)
        class Config:
            pass

    class Linear(Module):
        @dataclass(kw_only=True)
        class Config(Module.Config):
            in_features: int
            out_features: int

            def build(self):
                return nn.Linear(self.in_features, self.out_features, bias=False)

    class FeedForward(Module):
        @dataclass(kw_only=True)
        class Config(Module.Config):
            w1: Linear.Config
            w2: Linear.Config
            w3: Linear.Config

    def derive(source, target, **deltas):
        names = {field.name for field in fields(target)}
        assert deltas.keys() <= names
        return target(**{name: getattr(source, name) for name in names & vars(source).keys()} | deltas)

    def override(*, target, exact, description):
        assert target is FeedForward.Config and exact and description
        return lambda factory: factory

    for name, content in {
        "config": {"derive": derive, "override": override},
        "models.common.feed_forward": {"FeedForward": FeedForward},
        "models.common.linear": {"Linear": Linear},
        "protocols.module": {"Module": Module},
    }.items():
        module = types.ModuleType(f"torchtitan.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"torchtitan.{name}", module)
    names: dict = {"__name__": "sparse_titan"}
    exec(code.replace("slots=True", "slots=False"), names)

    torch.manual_seed(0)
    linear = {
        f"w{i}": Linear.Config(in_features=a, out_features=b) for i, a, b in ((1, 32, 64), (2, 64, 32), (3, 32, 64))
    }
    config = names["sparse_ffn"](FeedForward.Config(**linear), v=16, keep=0.5)
    ffn = names["SparseFeedForward"](config)
    assert sum(weight.numel() for weight in ffn.parameters()) == 3 * 32 * 64
    ours = OurFeedForward(32, 96, ffn.sparsity)
    ours.load_state_dict(ffn.state_dict())
    x = torch.randn(2, 32, 32)
    for sparse in (False, True):
        ffn.sparse = ours.sparse = sparse
        torch.testing.assert_close(ffn(x), ours(x), rtol=0, atol=0)
    ffn(x).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in ffn.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [("training.loss_chunk_tokens", "64"), ("training.bf16_residual", "true"), ("optimizer.moments", "bfloat16")],
)
def test_torchtitan_s_own_trainer_refuses_keys_that_it_would_not_heed(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not for torchtitan's own trainer"):
        titan_baseline.main(["--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", f"--{key}", value])
