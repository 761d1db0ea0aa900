"""Commands and keys on the pages: README's are run, those of all pages are accepted by what they call.

Those of docs/data.md are run too, and by tests/test_study.py those of docs/own_data.md.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT, fork, merge

from configs import schema
from configs.loader import load_config
from recipes.check import check_keys
from scripts.make_tokens import INTERRUPTS

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
NEEDS = re.compile(r"#.*\bneeds ")
# The file of metrics, a key that is said to be gone, and one of newer torchtitans.
OTHERS = {"metrics.jsonl", "activations.budget", "training.disable_cuda_graphs"}
STAND_INS = ("python", "torchrun", "tensorboard", "ruff", "mypy", "pytest")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_each_picture_is_shown_on_a_page():
    """Of those that git has: a study's command draws more, which a page need not show."""
    git = subprocess.run(["git", "ls-files", "*.png"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("no checkout of git")
    links = [(page.parent, link) for page in PAGES for link in re.findall(r"\(([^()\s]+\.png)\)", page.read_text())]
    assert set(git.stdout.split()) - {os.path.relpath(folder / link, ROOT) for folder, link in links} == set()


def perform(call: list[str], tiny: list[str]) -> None:
    """Run a command of the README in this process or, if it trains, as a tiny job in a forked one."""
    match call:
        case ["python", "-m", "pip" | "uv", *_] | ["python", "-c", _]:
            pass  # tests/test_setup.py
        case ["ruff" | "mypy" | "pytest", *_]:
            assert shutil.which(call[0], path=Path(sys.executable).parent)  # the checks that this test is one of
        case ["tensorboard", "--logdir", folder]:
            from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

            events = EventMultiplexer().AddRunsFromDirectory(folder).Reload()
            assert any("loss" in tag for run in events.Runs().values() for tag in run["scalars"])
        case ["python", "-m", module, *words] if module.startswith("scripts."):
            run_script(module, words)
        case ["python", "train.py", *words] | ["torchrun", "--nproc_per_node=1", "train.py", *words]:
            if not {"--check", "--help"} & set(words):
                pairs = zip(tiny[::2], tiny[1::2], strict=True)
                words = words + [word for pair in pairs if pair[0] not in words for word in pair]
            result = fork(*words, processes=int(call[0] == "torchrun"))
            assert result.returncode == 0, result.stdout + result.stderr
            print(result.stdout)
        case _:
            raise AssertionError(f"{shlex.join(call)}: run it here, or say on its line what it needs")


def stand_in(file: Path, calls: Path, runs_code: bool = False) -> None:
    """Write a program that appends its call to a file, a JSON list a line; with `runs_code` it runs `python -c`."""
    run = f"if sys.argv[1] == '-c': os.execv('{sys.executable}', sys.argv)\n" if runs_code else ""
    write = f"open('{calls}', 'a').write(json.dumps(['{file.name}', *sys.argv[1:]]) + '\\n')\n"
    file.unlink(missing_ok=True)
    file.write_text(f"#!{sys.executable} -IS\nimport json, os, sys\n{run}{write}")
    file.chmod(0o755)


def perform_script(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's script with a folder as outputs/: first bash, then the calls of Python that it makes."""
    (folder / "bin").mkdir()
    calls = folder / "calls"
    stand_in(folder / "bin" / "python", calls, runs_code=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "-euc", script.replace("outputs/", f"{folder}/")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=True)
    monkeypatch.chdir(ROOT)
    for line in calls.read_text().splitlines():
        perform(json.loads(line), [])


def run_script(module: str, words: list[str]) -> None:
    """Call the main function of a script with a command line."""
    main = getattr(importlib.import_module(module), "estimate" if module == "scripts.estimate" else "main")
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        status = main(words) if inspect.signature(main).parameters else main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not isinstance(status, int) or status == 0


def test_the_commands_of_the_readme(tiny, tmp_path, monkeypatch, capsys):
    """Every command of the README, but for those whose line says what they need.

    bash runs the blocks in a checkout of the shell scripts, where stand-ins write down each call of a program. These
    calls are then made here, with this test's folder in the place of outputs/, and training is a tiny job.
    """
    venv.create(tmp_path / ".venv")
    (tmp_path / "scripts").mkdir()
    for path in [*ROOT.glob("scripts/*.sh"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for name in STAND_INS:
        stand_in(tmp_path / ".venv" / "bin" / name, tmp_path / "calls")
    blocks = BASH.findall((ROOT / "README.md").read_text())
    script = "".join(line for line in "".join(blocks).splitlines(keepends=True) if not NEEDS.search(line))
    kept = {name: value for name, value in os.environ.items() if name not in ("TORCH", "PYTHON")}
    path = f"{tmp_path / '.venv' / 'bin'}:{os.environ['PATH']}"
    ran = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=kept | {"PATH": path}, capture_output=True)
    assert ran.returncode == 0, ran
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    monkeypatch.chdir(ROOT)
    tiny = merge(tiny, ["--metrics.enable_tensorboard", "true"])
    outputs = tmp_path / "outputs"
    for call in calls:
        call = [re.sub("^outputs/", f"{outputs}/", word) for word in call]
        if "train.py" in call and "--job.dump_folder" not in call:
            call += ["--job.dump_folder", str(outputs / "debug")]
        perform(call, tiny)
    for made in ("debug/plot.png", "groups/run.json", "debug-hf/model.safetensors", "imported/continue.toml"):
        assert (outputs / made).is_file(), made
    assert "perplexity" in capsys.readouterr().out


def test_the_commands_of_the_page_on_data(tmp_path, monkeypatch, capsys):
    """As they stand, in another folder."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    size = "--tokenizer.vocab_size 512"
    assert size in block
    script = block.replace(size, f"{size} --tokenizer.cache_folder {tmp_path}/cache")
    perform_script(script, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "source-0: every file is as it was written" in said
    assert "source 1 of 1: tokens: 1 files, 900 documents" in said
    assert (tmp_path / "notes_run" / "run.json").is_file()


def test_a_program_ends_quietly_where_its_output_is_cut_off():
    """As `python -m scripts.estimate ... | head` cuts it."""
    program = "import scripts\nfor _ in range(100_000): print('many lines')"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("many lines\n141\n", "")


def test_the_study_of_one_s_own_data_can_be_made_small_as_the_page_says(tmp_path):
    text = (ROOT / "docs" / "own_data.md").read_text()
    (study,) = re.findall(r"<<'EOF'\n(.*?)EOF\n", text, re.DOTALL)
    (advice,) = re.findall(r"On a CPU first change four lines of\s+the study: (.*?)\.\n", text, re.DOTALL)
    lines = re.findall("`(.*?)`", advice)
    assert len(lines) == 4
    for line in lines:
        study, changed = re.subn(rf"^{line.split(' = ')[0]} = .*$", line, study, flags=re.MULTILINE)
        assert changed == 1, line
    (tmp_path / "study.toml").write_text(study.replace("outputs/mine", str(ROOT / "docs")))
    run_script("scripts.study", [str(tmp_path), "--list"])


def test_the_files_of_the_readme(tmp_path):
    """The excerpts of a configuration and of a recipe are accepted as they stand."""
    excerpt, recipe = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "job.toml").write_text(excerpt)
    (tmp_path / "mine.toml").write_text(recipe)
    config, _ = load_config(["--config", str(tmp_path / "job.toml"), "--recipe", str(tmp_path / "mine.toml")])
    config.data.sources[0].path = str(ROOT / "docs")
    args, _ = check_keys(config, 1)
    assert args.n_layers == 16 and args.sparsity.fp8


class AcceptedError(Exception):
    """A script's parser has read its command line."""


def split_words(line: str) -> list[str] | None:
    """The words and operators of a shell's line; None if a quotation does not end in it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:
        return None


def commands(page: Path) -> list[list[str]]:
    """The simple commands of a page's bash blocks, but for those of an earlier commit."""
    found = []
    for block in BASH.findall(page.read_text()):
        if re.match("# At commit", block):
            continue
        text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block, flags=re.DOTALL).replace("\\\n", " ")
        lines = text.splitlines()
        while lines:
            line, words = lines.pop(0), list[str]()
            while (split := split_words(line)) is None:  # a quotation goes on in the next line
                line += "\n" + lines.pop(0)
            for word in [*split, ";"]:
                if set(word) <= set("();<>|&"):
                    found += [words] if words else []
                    words = []
                else:
                    words.append(word)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if BASH.search(page.read_text())], ids=name_of)
def test_commands_of_the_pages_are_accepted(page, monkeypatch):
    """What they call is there, and has the options and keys that they give."""
    for method in ("parse_args", "parse_known_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def accept(self, args=None, namespace=None, parse=parse):
            raise AcceptedError(parse(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, method, accept)
    monkeypatch.chdir(ROOT)
    made = set(re.findall(r"> (\S+)", page.read_text()))  # by the page's own commands
    for words in commands(page):
        text = shlex.join(words)
        if {"...", "NAME"} & set(words) or made & set(words):
            continue
        for word in words:
            if re.match(r"(configs|recipes|scripts|docs|tests|kernels|models)/[\w./]+$", word):
                assert (ROOT / word).exists() or "--out" in words, f"{text}: no {word}"
        modules = [word for word in words if re.match(r"scripts[./]\w+(\.py)?$", word)]
        if "train.py" in words:
            given = words[words.index("train.py") + 1 :]
            if "--help" not in given and not any(word.startswith("outputs/") for word in given[:2]):
                load_config(given)
        elif modules and words[0] == "python":
            given = words[words.index(modules[0]) + 1 :]
            with pytest.raises(AcceptedError) as accepted:
                run_script(modules[0].removesuffix(".py").replace("/", "."), given)
            read = accepted.value.args[0]
            keys = [word for word in read[1] if not word.startswith("$")] if isinstance(read, tuple) else []
            if keys:
                load_config(keys)


def keys_of(cls: type, prefix: str = "") -> set[str]:
    """The names of a configuration's keys and sections, such as "training.steps"."""
    names = set()
    for field in dataclasses.fields(cls):
        names.add(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names |= keys_of(field.type, f"{prefix}{field.name}.")
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_on_the_pages_are_there(page):
    """What stands in backticks and begins with a section's name is a key of that section."""
    keys = keys_of(schema.JobConfig) | OTHERS
    sections = {key for key in keys if "." not in key} - {"recipe"}
    named = set(re.findall(r"`(?:--)?([a-z_]+\.[a-z_0-9.]+)(?: = [^`]*)?`", page.read_text()))
    assert [name for name in sorted(named) if name.split(".")[0] in sections and name not in keys] == []
