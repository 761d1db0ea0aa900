"""What may change when a run resumes, what is refused; nothing spoilt is saved, and no code of a checkpoint runs."""

import io
import json
import pickle
import re
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch

import recipes.trainer
from configs.errors import ConfigError
from configs.safe_load import _Pickle
from recipes.restore import find_checkpoint
from recipes.trainer import SparseTrainer


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 6, made once; every test gets its own copy."""
    made: list[Path] = []

    def copy(train, folder: Path) -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("stopped") / "run")
            train(made[0], stop_after=6)
        shutil.copytree(made[0], folder)
        return folder

    return copy


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("model.n_layers", "1", "the model's n_layers = 1, but the run in"),
        ("model.n_heads", "4", "the model's n_heads = 4"),
        ("model.rope_theta", "100", "the model's rope_theta = 100"),
        ("data.seed", "5", "data.seed = 5"),
        ("data.validation_share", "0.4", "data.validation_share = 0.4"),
        ("debug.seed", "3", "debug.seed = 3"),
        ("training.seq_len", "64", "training.seq_len = 64"),
        ("activations.n", "4", "activations.n = 4"),
        ("weights.pattern", "none", 'weights.pattern = "none"'),
        ("schedule.dense_layers", "1", "schedule.dense_layers = 1"),
    ],
)
def test_another_run_is_refused_and_nothing_is_lost(stopped, train, tmp_path, key, value, said):
    run = stopped(train, tmp_path / "run")
    kept = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file() and file.name != ".lock"}
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        train(run, f"--{key}", value)
    assert "give the run's own value" in str(error.value)
    assert ("--checkpoint.change_recipe" in str(error.value)) == key.startswith(("activations", "weights", "schedule"))
    assert {name: (run / name).read_bytes() for name in kept} == kept


def test_a_run_of_a_release_that_counted_bytes_otherwise_goes_on(stopped, train, tmp_path):
    run = stopped(train, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    about["corpus"]["file_bytes"] += 1
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"data.sources: file_bytes"):
        train(run)
    del about["corpus"]["files_not_read"]
    (run / "run.json").write_text(json.dumps(about))
    assert max(train(run)) == 12


def test_a_finished_run_with_another_recipe_is_not_called_complete(train, tmp_path):
    train(tmp_path, "--training.steps", "9")
    with pytest.raises(ConfigError, match=r"but the run in .* has .*: give the run's own value"):
        train(tmp_path, "--training.steps", "9", recipe="groups_quarter")


def test_other_documents_are_refused_and_the_same_ones_elsewhere_are_not(stopped, train, tmp_path, corpus):
    run, moved = stopped(train, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(corpus, moved)
    source = f'[{{type = "text", path = "{moved}/*.py"}}]'
    assert max(train(run, "--data.sources", source, stop_after=7)) == 7
    shutil.copytree(corpus, tmp_path / "more")
    (tmp_path / "more" / "more.py").write_text("x = 1\n")
    source = source.replace("moved", "more")
    with pytest.raises(ConfigError, match=r"data.sources: (documents|file_bytes) = "):
        train(run, "--data.sources", source)


def test_the_rate_that_is_given_holds_from_the_next_step(stopped, train, tmp_path):
    run = stopped(train, tmp_path / "run")
    rows = train(run, "--optimizer.lr", "1e-4", "--optimizer.weight_decay", "0.5", stop_after=8)
    assert rows[6]["lr"] > 1e-3 and all(0 < rows[step]["lr"] <= 1e-4 for step in (7, 8))
    assert json.loads((run / "run.json").read_text())["config"]["optimizer"]["lr"] == 1e-4


def test_another_recipe_can_be_asked_for(stopped, train, tmp_path):
    run = stopped(train, tmp_path / "run")
    rows = train(run, "--checkpoint.change_recipe", "true", recipe="groups_quarter")
    assert json.loads((run / "run.json").read_text())["config"]["activations"]["pattern"] == "groups"
    assert rows[8]["phase"] == "sparse"


@pytest.mark.parametrize("spoilt", ["weights", "moments"])
def test_what_a_step_between_logged_ones_spoils_is_not_saved_by_a_signal(train, tmp_path, monkeypatch, spoilt):
    original = SparseTrainer.train_step

    def train_step(self, batches):
        original(self, batches)
        if self.step == 6:
            (optimizer,) = self.optimizers
            weight = optimizer.param_groups[0]["params"][0]
            target = weight if spoilt == "weights" else optimizer.state[weight]["exp_avg_sq"]
            target.data.view(-1)[3] = torch.inf
            self.interrupted = True

    monkeypatch.setattr(SparseTrainer, "train_step", train_step)
    with pytest.raises(ConfigError, match=r"not finite at step 6: .* the newest checkpoint is .*step-4"):
        train(tmp_path, "--metrics.log_freq", "100", "--validation.freq", "100")
    assert (tmp_path / "checkpoint" / "latest").read_text() == "step-4"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_full_disk_leaves_what_the_next_resume_reads(stopped, train, tmp_path, monkeypatch):
    run, describe = stopped(train, tmp_path / "run"), SparseTrainer._describe_run
    before = {name: (run / name).read_bytes() for name in ("run.json", "tokenizer/tokenizer.json")}
    (run / "tokenizer" / "vocab.json").write_text("{}")

    def on_a_full_disk(self, *arguments) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            describe(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    for fits in ((), ("copy_tokenizer",)):
        with monkeypatch.context() as patch:
            patch.setattr(SparseTrainer, "_describe_run", on_a_full_disk)
            for name in fits:
                patch.setattr(recipes.trainer, name, lambda *_: None)
            with pytest.raises(ConfigError, match=r"job.dump_folder = .* cannot be written \(File too large\)"):
                train(run)
        assert {name: (run / name).read_bytes() for name in before} == before
    train(run)
    assert not (run / "tokenizer" / "vocab.json").exists()
    assert not [file for file in (run / "tokenizer").iterdir() if file.name.startswith(".")]


def test_tensorboard_has_every_step_once(train, tmp_path):
    """As metrics.jsonl has, also after a resume from an older checkpoint; an earlier run's points are set aside."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def steps():
        files = sorted((tmp_path / "tb").rglob("*tfevents*"))
        events = [event for file in files for event in EventFileLoader(str(file)).Load()]
        return sorted(event.step for event in events for value in event.summary.value if value.tag == "loss")

    words = "--metrics.enable_tensorboard", "true", "--metrics.log_freq", "1"
    train(tmp_path, *words, stop_after=6)
    assert steps() == list(range(1, 7))
    for step in (5, 6):
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    (file,) = (tmp_path / "tb").rglob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-5])  # as a kill may leave it
    train(tmp_path, *words)
    assert steps() == list(range(1, 13))
    shutil.rmtree(tmp_path / "checkpoint")
    train(tmp_path, *words, "--training.steps", "9")
    assert steps() == list(range(1, 10))
    assert len(list((tmp_path / "tb").rglob("*earlier-run*"))) == 2


def test_a_run_lives_in_any_folder_that_the_file_system_has(train, corpus, tmp_path, monkeypatch):
    """Spaces, other scripts, a symbolic link, a relative name and a long one; the path of the corpus as well."""
    real = tmp_path / "ein Ordner, 训练 «é»" / ("n" * 200)
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    shutil.copytree(corpus, real / "mein Korpus ü")
    source = f'[{{type = "text", path = "{real}/mein Korpus ü"}}]'
    train(real / "run", "--data.sources", source, stop_after=6)
    monkeypatch.chdir(tmp_path)
    resumed = train(Path("link") / "run", "--data.sources", source.replace(str(real), str(tmp_path / "link")))
    assert sorted(resumed) == list(range(1, 13))
    assert find_checkpoint("link/run").step == 12
    with pytest.raises(ConfigError, match=r"job.dump_folder = .* cannot be made"):
        train(tmp_path / ("n" * 300))


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.file)!r}).touch()",)


def test_no_code_of_a_checkpoint_runs(train, tmp_path):
    run, ran = tmp_path / "run", tmp_path / "ran"
    train(
        run, "--training.steps", "4", "--schedule.phases", '[{mode = "dense"}]', "--schedule.decay_with_tail", "false"
    )
    folder = run / "checkpoint" / "step-4"
    assert find_checkpoint(str(run)).weights()
    made = pickle.dumps(Payload(ran))
    (folder / ".metadata").write_bytes(made)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][".metadata"] = {"size": len(made), "crc32": zlib.crc32(made)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused = r"names builtins.eval, which no checkpoint needs: it is not read"
    with pytest.raises(ConfigError, match=refused):
        find_checkpoint(str(run)).weights()
    with pytest.raises(ConfigError, match=refused):
        train(tmp_path / "other", "--checkpoint.initial_load_path", str(folder))
    assert not ran.exists()


def test_byte_entries_of_a_checkpoint_hold_plain_values_alone(tmp_path):
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    stored = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), stored)
    stored.seek(0)
    planner = DefaultLoadPlanner()
    planner.flatten_state_dict, planner.state_dict = False, {}
    item = type("Item", (), {"dest_index": type("Index", (), {"fqn": "train_state.step"})})
    with pytest.raises(ConfigError, match=r"train_state.step holds more than tensors and plain values"):
        planner.load_bytes(item, stored)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match=r"names os\.system"):
        _Pickle.load(io.BytesIO(b"cos\nsystem\n."))


def test_a_renamed_checkpoint_and_a_damaged_pointer_are_one_message(stopped, train, tmp_path):
    run = stopped(train, tmp_path / "run")
    shutil.copytree(run / "checkpoint" / "step-6", run / "checkpoint" / "step-6-backup")
    with pytest.raises(ConfigError, match=r"step-6-backup: a checkpoint's folder is named step-N"):
        find_checkpoint(str(run / "checkpoint" / "step-6-backup"))
    pointer = run / "checkpoint" / "latest"
    pointer.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"latest is damaged: name a checkpoint itself"):
        find_checkpoint(str(run))
    pointer.unlink()
    pointer.mkdir()
    with pytest.raises(ConfigError, match=r"latest is damaged: name a checkpoint itself"):
        find_checkpoint(str(run))
