"""Every script refuses a path or value that it cannot use in one message, before it begins."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

from configs.errors import ConfigError
from scripts import chaos, plot_kernels
from scripts.options import Parser, add_out

LONG = "x" * 300
OWN_PARSER = {"options.py", "check_vllm.py"}  # the parser itself, and a script that runs without the repository


def test_every_script_has_the_parser_that_refuses():
    for file in ROOT.glob("scripts/*.py"):
        assert "argparse.ArgumentParser(" not in file.read_text() or file.name in OWN_PARSER, file


@pytest.mark.parametrize("metavar", ["FILE", "FOLDER"])
def test_paths_that_cannot_be_used_are_named(metavar, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed" and access(path, mode))
    parser = Parser(prog="a script")
    parser.add_argument("read", nargs="*", type=Path)
    parser.add_argument("--number", type=int)
    add_out(parser, metavar, "what is written")
    other, why = ("folder", "is a folder") if metavar == "FILE" else ("file", "is no folder")
    for words, message in (
        ([LONG], "File name too long: give another path"),
        (["a", "/dev/zero"], "/dev/zero is a device"),
        (["--number=--"], "--number=--: -- is no value"),
        (["-o--"], "-o--: -- is no value"),
        (["-o=--"], "-o=--: -- is no value"),
        (["--out", LONG], "File name too long: give another path"),
        (["--out", " "], "' ' names nothing"),
        (["--out", str(tmp_path / other)], why),
        (["--out", f"{tmp_path}/new/.."], f"there is no folder {tmp_path}/new/.."),
        (["--out", f"{tmp_path}/new/../file.png"], f"there is no folder {tmp_path}/new/.."),
        (["--out", str(tmp_path / "file" / "in")], f"{tmp_path}/file is no folder"),
        (["--out", str(tmp_path / "closed" / "new" / "in")], f"{tmp_path}/closed may not be written to"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        assert message in capsys.readouterr().err, words
    for out in (
        tmp_path / "new" / "in",
        tmp_path / "folder" / ".." / "new",
        Path("/dev/null") if metavar == "FILE" else tmp_path / "folder",
    ):
        assert parser.parse_args([str(tmp_path), "--out", str(out)]).out == out


def test_files_of_other_programs_are_refused(tmp_path, capsys):
    for text in ("", "[1]", "{}", '{"seed": 0, "faults": [1]}', json.dumps({"shapes": 3})):
        (tmp_path / "kernels.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            chaos.main([str(tmp_path / "kernels.json")])
        assert "is no file of faults" in capsys.readouterr().err, text
        with pytest.raises(ConfigError, match=r"kernels\.json cannot be drawn"):
            plot_kernels.main([str(tmp_path)])
    for words, message in (
        (["--faults", "0"], "give 1 fault or more"),
        (["--only", "-1"], "give 1 fault or more"),
        (["--folder", str(tmp_path)], f"--folder {tmp_path} is not empty"),
        (["--folder", str(tmp_path / "kernels.json")], "is no folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            chaos.main([str(tmp_path / "new.json"), *words])
        assert message in capsys.readouterr().err, words
    with pytest.raises(SystemExit, match="2"):
        chaos.main([str(tmp_path)])
    assert "is a folder: name the file to write" in capsys.readouterr().err
