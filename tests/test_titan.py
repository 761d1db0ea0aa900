"""torchtitan's names that are not public: the installed release has each, and configs/titan.py alone uses them."""

import ast
import inspect
import re

import pytest
from conftest import ROOT
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from configs import titan


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
