"""scripts/setup.sh and those that source it, with stand-ins for programs that write down how they are called."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_conftest import RERUNS


@pytest.fixture
def checkout(tmp_path):
    """A checkout of the scripts: `run(script, *words, **environment)` returns what was called since."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("scripts/setup.sh", "scripts/train_debug.sh", "scripts/test.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("python", "torchrun", "ruff", "mypy", "pytest"):
        stand_in = tmp_path / ".venv" / "bin" / name
        stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/calls"\n')
        stand_in.chmod(0o755)

    def run(script, *words, **environment):
        (tmp_path / "calls").write_text("")
        kept = {name: value for name, value in os.environ.items() if name not in ("TORCH", "PYTHON")}
        command = ["bash", str(tmp_path / "scripts" / script), *words]
        subprocess.run(command, env=kept | environment, check=True, capture_output=True, timeout=60)
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_another_torch_is_installed_and_stays(checkout, tmp_path):
    def installs(**environment):
        called = checkout("setup.sh", **environment)
        return [call.split(" --requirements - ")[1] for call in called if "uv pip install" in call]

    assert installs() == ["torch==2.13.0 --editable .[dev]"]
    assert installs() == []
    assert installs(TORCH="torch==2.11.0") == ["torch==2.11.0 --editable .[dev]"]
    assert installs(TORCH="torch==2.11.0") == installs() == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert installs() == ["torch==2.11.0 --editable .[dev]"]


CONFIGURED = r"""
:env:.cert='/etc/ssl/ca.crt'
:env:.extra-index-url='\nfile:///one/simple\nhttps://user:word=1@two/simple'
:env:.index-url='https://environment/simple'
download.index-url='https://download/simple'
global.extra-index-url='https://overridden/simple'
global.find-links='/wheels'
global.index-url='https://global/simple'
install.constraint='/etc/constraints.txt'
"""


READ = """
--index-url https://environment/simple
--extra-index-url file:///one/simple
--extra-index-url https://user:word=1@two/simple
--find-links /wheels
--constraint /etc/constraints.txt
"""


@pytest.mark.parametrize("configured, read", [(CONFIGURED, READ), ("global.no-index='true'", "")], ids=["uv", "pip"])
def test_uv_looks_where_pip_would_look(checkout, tmp_path, configured, read):
    """Or, where pip is configured to ask no index, does not install."""
    python, requirements = tmp_path / ".venv" / "bin" / "python", tmp_path / "requirements"
    requirements.touch()
    says = f"*config*) cat <<'END'\n{configured.strip()}\nEND\n;;"
    uv = f'*uv\\ pip*) cat >"{requirements}";;'
    imports = "*import\\ torch*|*import\\ pip*) ;;"
    python.write_text(f'#!/bin/bash\ncase "$*" in\n{says}\n{uv}\n{imports}\n-c*) exec {sys.executable} "$@";;\nesac\n')
    checkout("setup.sh")
    assert requirements.read_text().strip() == read.strip()


def test_after_an_interrupted_installation_the_torch_from_before_is_installed(checkout, tmp_path):
    """A torch that cannot be installed would otherwise be tried for ever."""
    python = tmp_path / ".venv" / "bin" / "python"
    works = python.read_text()
    for before in ({}, {"TORCH": "torch==2.11.0"}):
        checkout("setup.sh", **before)
        for fails in ("*torch==2.99*) kill $PPID", "*\\ install\\ *) exit 1"):
            python.write_text(f'{works}case "$*" in {fails};; esac\n')
            with pytest.raises(subprocess.CalledProcessError):
                checkout("setup.sh", TORCH="torch==2.99")
            python.write_text(works)
            assert any(before.get("TORCH", "torch==2.13.0") in call for call in checkout("setup.sh"))
            assert not any("torch==" in call for call in checkout("setup.sh"))


@pytest.mark.parametrize("there", ["no .venv", "a link to nothing"])
def test_a_venv_without_a_python_is_made_anew(checkout, tmp_path, there):
    """And what was installed with the Python that is gone is installed again."""
    checkout("setup.sh")
    python, made = tmp_path / ".venv" / "bin" / "python", tmp_path / "made"
    python.rename(made)
    if there == "no .venv":
        (tmp_path / ".venv").rename(tmp_path / "away")
    else:
        python.symlink_to(tmp_path / "gone")
    makes = f'rm -rf .venv && mkdir -p .venv/bin && cp "{made}" .venv/bin/python'
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$*" != "-m venv --clear .venv" ] || {{ {makes}; }}\n')
    (tmp_path / "python").chmod(0o755)
    assert any("torch==2.13.0" in call for call in checkout("setup.sh", PYTHON="./python"))


def test_a_venv_without_pip_keeps_what_it_has(checkout, tmp_path):
    """One that uv has made. Where pip cannot be had, as in what an interruption has left, a person moves it away."""
    python = tmp_path / ".venv" / "bin" / "python"
    works, fails = python.read_text(), 'case "$*" in *import\\ pip*) exit 1;; *print*) echo 3.11;; esac\n'
    python.write_text(works + fails)
    calls = checkout("setup.sh")
    assert "python -m ensurepip" in calls and any("torch==2.13.0" in call for call in calls)
    python.write_text(f'{works}{fails}[ "$2" != ensurepip ] || exit 1\n')
    with pytest.raises(subprocess.CalledProcessError) as refused:
        checkout("setup.sh")
    assert refused.value.returncode == 2
    assert refused.value.stderr.decode() == "error: .venv has no pip, as one that was not finished: move it away\n"
    assert python.exists()


def test_another_python_is_refused(checkout, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'{python.read_text()}case "$2" in *print*) echo 3.10;; *exit*) exit 1;; esac\n')
    for environment, said in (
        ({"PYTHON": sys.executable}, f"PYTHON={sys.executable} is not the Python of .venv, 3.10: leave PYTHON out"),
        ({}, ".venv/bin/python is"),
    ):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            checkout("setup.sh", **environment)
        assert refused.value.returncode == 2 and said in refused.value.stderr.decode()
    python.unlink()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        checkout("setup.sh", PYTHON="python9")
    assert refused.value.stderr.decode().startswith("error: python9 is not there: set PYTHON to a Python of 3.11")


@pytest.mark.parametrize("fails", [r"*\ uv", r"*uv\ pip\ install*"], ids=["absent", "fails"])
def test_pip_installs_where_uv_does_not(checkout, tmp_path, fails):
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'{python.read_text()}case "$*" in {fails}) exit 1;; esac\n')
    called = [call for call in checkout("setup.sh") if call.endswith(" torch==2.13.0 --editable .[dev]")]
    assert called[-1].startswith("python -m pip install ")
    assert not any("install" in call for call in checkout("setup.sh"))


def test_an_installation_that_fails_ends(checkout, tmp_path):
    """Also for a reader of its output, for whom it has not ended before all that it started has."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'{python.read_text()}case "$*" in *\\ install\\ *) exit 1;; esac\n')
    with pytest.raises(subprocess.CalledProcessError):
        checkout("setup.sh")


def test_an_installation_shows_that_it_goes_on(checkout, tmp_path):
    """With pip's half second in the place of minutes, and a pause of 0.1 s in that of 15."""
    for name, lines in (("bin/sleep", "exec /bin/sleep 0.1"), (".venv/bin/python", "exec /bin/sleep 0.5")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(tmp_path / "scripts" / "setup.sh")]
    done = subprocess.run(command, env=os.environ | {"PATH": path, "PYTHON": "true"}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1].startswith("that took 0m"), done
    assert sum(line.endswith("s so far") for line in lines) >= 4


@pytest.mark.parametrize(
    "words, drawn",
    [
        ((), "outputs/debug"),
        (("--job.dump_folder", "a b"), "a b"),
        (("--training.steps", "3", "--job.dump_folder=x"), "x"),
    ],
)
def test_the_run_that_was_trained_is_drawn(checkout, words, drawn):
    calls = checkout("train_debug.sh", *words)
    assert calls[-1] == f"python -m scripts.plot {drawn}"
    assert f"train.py --config configs/debug.toml {' '.join(words)}".strip() in calls[-2]


def test_programs_keep_what_they_compile(checkout, tmp_path):
    """Where that is forbidden, as in many containers, each start of the trainer would compile thousands of modules."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'{python.read_text()}echo "${{PYTHONDONTWRITEBYTECODE-unset}}" >>"{tmp_path}/kept"\n')
    checkout("setup.sh", PYTHONDONTWRITEBYTECODE="1")
    assert set((tmp_path / "kept").read_text().split()) == {"unset"}


@pytest.mark.parametrize("fails, status", [("", 0), ("ruff", 3), ("mypy", 1), ("pytest", 3)])
def test_all_checks_have_to_pass(checkout, tmp_path, fails, status):
    if fails:
        with (tmp_path / ".venv" / "bin" / fails).open("a") as file:
            file.write("exit 3\n")
    try:
        checkout("test.sh", "tests/test_x.py")
    except subprocess.CalledProcessError as error:
        assert error.returncode == status
    else:
        assert status == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    called = [call.partition(" ")[0] for call in calls]
    assert sorted(name for name in called if name in ("mypy", "pytest", "ruff")) == (
        ["ruff"] if fails == "ruff" else ["mypy", "pytest", "ruff", "ruff"]
    )
    assert all(call.endswith(f" {RERUNS} tests/test_x.py") for call in calls if call.startswith("pytest"))
