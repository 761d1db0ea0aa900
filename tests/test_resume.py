"""What may change when a run resumes, what is refused; nothing spoilt is saved, and no code of a checkpoint runs."""

import contextlib
import ctypes
import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import threading
import zlib
from pathlib import Path

import pytest
import torch
from conftest import PROCESSES, fork, losses, merge, rows, run_train
from tensorboard.compat.proto.event_pb2 import Event
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

import recipes.metrics
import recipes.trainer
from configs.errors import ConfigError
from configs.loader import load_config, resolved
from configs.safe_load import _Pickle
from configs.schema import Source
from recipes.check import model_args
from recipes.data import Row
from recipes.metrics import Metrics
from recipes.restore import find_checkpoint
from recipes.resume import check_resume
from recipes.trainer import SparseTrainer

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # <linux/sched.h>


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
        ("training.mixed_precision_param", "bfloat16", 'training.mixed_precision_param = "bfloat16"'),
        ("activations.n", "4", "activations.n = 4"),
        ("weights.pattern", "none", 'weights.pattern = "none"'),
        ("schedule.dense_layers", "1", "schedule.dense_layers = 1"),
        (
            "schedule.phases",
            '[{mode = "dense", end = 9}, {end = 1.0}]',
            'schedule.phases = [{mode = "dense", end = 9}, {mode = "dense", end = 1.0}], but the run in',
        ),
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
    both = "its recipe is recipes/venom_2of16.toml, this one recipes/groups_quarter.toml; give the run's own value"
    with pytest.raises(ConfigError, match=f"but the run in .* has .*: {both}"):
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


def test_a_streamed_mixture_keeps_its_number_of_processes(tmp_path):
    """`datasets` draws its sources in another order in a worker process."""
    config, _ = load_config(["--config", "debug", "--recipe", "dense", "--job.dump_folder", str(tmp_path)])
    config.data.sources = [Source(type="hub", path=name) for name in ("org/one", "org/other")]
    corpus: dict = {"documents": None, "file_bytes": 0, "files_not_read": 0}

    def resume(workers: int, sources: int) -> None:
        config.training.dataloader.num_workers, config.data.sources = 0, config.data.sources[:sources]
        about = {"config": resolved(config), "corpus": corpus, "hardware": {"ranks": 1}}
        (tmp_path / "run.json").write_text(json.dumps(about))
        config.training.dataloader.num_workers = workers
        check_resume(config, model_args(config), corpus)

    resume(0, 2)
    with pytest.raises(
        ConfigError, match=r"num_workers = 1, but the run in .* has 0: .* mixture in another order; give"
    ):
        resume(1, 2)
    resume(1, 1)


DAMAGES = ["[]", "null", '{"config":', '"hardware": null', '"hardware": {"ranks": "two"}', '"corpus": 3']


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_json_is_one_message(tmp_path, damage):
    config, _ = load_config(["--config", "debug", "--recipe", "dense", "--job.dump_folder", str(tmp_path)])
    about = {"config": resolved(config), "corpus": {}, "hardware": {"ranks": 1}}
    if damage.startswith('"'):
        damage = json.dumps(about | json.loads(f"{{{damage}}}"))
    (tmp_path / "run.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"run.json is damaged: restore it, or start another run"):
        check_resume(config, model_args(config), {"documents": 1, "file_bytes": 1})


def test_what_stands_where_a_run_s_files_belong_is_one_message(stopped, train, tmp_path):
    def refused(name: str, said: str, folder: bool = False, text: bytes = b"") -> None:
        run = stopped(train, tmp_path / name.replace("/", "-"))
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.mkdir() if folder else path.write_bytes(text)
        with pytest.raises(ConfigError, match=said):
            train(run)

    refused("run.json", "run.json is damaged: restore it", folder=True)
    refused("checkpoint", "checkpoint.folder: .*checkpoint is a file: move it away")
    refused("comm_traces", "comm.save_traces_folder: .*comm_traces is a file")
    refused("checkpoint/latest", r"checkpoint/latest cannot be used \(Is a directory\): repair it or move", folder=True)


def test_damaged_lines_of_metrics_are_not_kept(stopped, train, straight, tmp_path):
    run = stopped(train, tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n5\n{"step": "x"}\n{"step"')
    train(run)
    assert losses(rows(run)) == straight(train)


def test_a_folder_that_cannot_be_made_is_one_message(train):
    with pytest.raises(ConfigError, match=r'job.dump_folder = "/proc/nowhere" cannot be written \(.*\): name another'):
        train(Path("/proc/nowhere"))


def test_the_rate_that_is_given_holds_from_the_next_step(stopped, train, tmp_path):
    run = stopped(train, tmp_path / "run")
    rows = train(run, "--optimizer.lr", "1e-4", "--optimizer.weight_decay", "0.5", stop_after=8)
    assert rows[6]["lr"] > 1e-3 and all(0 < rows[step]["lr"] <= 1e-4 for step in (7, 8))
    assert json.loads((run / "run.json").read_text())["config"]["optimizer"]["lr"] == 1e-4


def test_a_run_keeps_the_dtype_that_it_began_with(train, tmp_path, capsys):
    """As if it began on a GPU and goes on here, where "auto" would be float32."""
    key = "--training.mixed_precision_param"
    whole = train(tmp_path / "whole", key, "bfloat16")
    train(tmp_path / "run", key, "bfloat16", stop_after=6)
    capsys.readouterr()
    assert losses(train(tmp_path / "run", key, "auto")) == losses(whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["training"][key[11:]] == "bfloat16"
    said = capsys.readouterr().out
    assert said.count("products in bfloat16") == 1 and '"auto" for a new run is float32: most CPUs' in said
    # Without a checkpoint nothing has begun.
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    assert train(tmp_path / "run", key, "auto", stop_after=1)[1]["loss"] != whole[1]["loss"]
    said = capsys.readouterr().out
    assert "products in float32 (training.mixed_precision_param), most CPUs have no fast bfloat16" in said


def test_another_recipe_can_be_asked_for(stopped, train, tmp_path, capsys):
    run = stopped(train, tmp_path / "run")
    rows = train(run, "--checkpoint.change_recipe", "true", recipe="groups_quarter")
    assert json.loads((run / "run.json").read_text())["config"]["activations"]["pattern"] == "groups"
    assert rows[8]["phase"] == "sparse"
    assert "made with another router: the next sparse step prepares its FFNs anew" in capsys.readouterr().out


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


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The losses of a run that nothing happened to, made once."""
    known: dict[int, float] = {}

    def get(train) -> dict[int, float]:
        if not known:
            known.update(losses(train(tmp_path_factory.mktemp("straight"))))
        return known

    return get


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_row_that_does_not_fit_ends_the_run_with_one_message(train, straight, tmp_path, monkeypatch):
    """The file ends in the middle of a row; the step is run again, and its row is there once."""
    finish = Metrics.finish
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(self, *arguments) -> None:
        if self.row["step"] == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file.stat().st_size + 100, limits[1]))
        try:
            finish(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "finish", on_a_full_disk)
        said = r"job.dump_folder = .*: metrics.jsonl cannot be written \(File too large\); .* the same command again"
        with pytest.raises(ConfigError, match=said):
            train(tmp_path)
    assert (tmp_path / "checkpoint" / "latest").read_text() == "step-4"
    full = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(full.splitlines()) == 6 and not full.endswith(b"\n")
    with monkeypatch.context() as patch:
        patch.setattr(recipes.metrics, "write_atomically", no_room)
        with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
            train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == full
    assert losses(train(tmp_path)) == straight(train)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12


def test_the_rows_before_a_checkpoint_are_durable_before_it_is_complete(train, tmp_path, monkeypatch):
    durable: list[tuple[str, int]] = []  # names, and the last step of metrics.jsonl at the time
    fsync, file = os.fsync, tmp_path / "run" / "metrics.jsonl"

    def note(opened: int) -> None:
        fsync(opened)
        last = max(rows(tmp_path / "run")) if file.exists() else 0
        durable.append((os.readlink(f"/proc/self/fd/{opened}"), last))

    monkeypatch.setattr(os, "fsync", note)
    with monkeypatch.context() as patch:  # a signal, after a step at which no checkpoint is due
        patch.setattr(SparseTrainer, "_any_rank_interrupted", lambda self: self.step == 6)
        train(tmp_path / "run")
    train(tmp_path / "run")
    names = [name for name, _ in durable]
    for step in (4, 6, 8, 12):
        complete = names.index(str(tmp_path / "run" / "checkpoint" / f"step-{step}" / "manifest.json.tmp"))
        assert (str(file), step) in durable[:complete]
        pointer = names.index(str(tmp_path / "run" / "checkpoint" / "latest.tmp"), complete)
        assert str(tmp_path / "run") in names[complete:pointer], "the name of the folder of checkpoints is durable"


def test_points_that_do_not_fit_end_the_run_with_one_message(train, straight, tmp_path, monkeypatch):
    """TensorBoard writes in a thread of its own, whose error the next point or the end of the run raises."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    shown: list = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    write, words = RecordWriter.write, ("--metrics.enable_tensorboard", "true")
    for last in (6, 12):  # between two steps, or when nothing follows

        def on_a_full_disk(self, data, last=last):
            no_room() if Event.FromString(data).step >= last else write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(RecordWriter, "write", on_a_full_disk)
            with pytest.raises(ConfigError, match=r"TensorBoard's file cannot be written \(No space left on device\)"):
                train(tmp_path, *words)
    assert not shown
    assert threading.excepthook == shown.append
    assert losses(train(tmp_path, *words)) == straight(train)


def test_a_full_disk_in_the_middle_of_a_run(tiny, train, straight, tmp_path):
    """A real one: a small file system in memory, full after step 5; the run ends, and goes on where there is room."""
    words = ["--config", "configs/debug.toml", *tiny]
    process = PROCESSES.Process(target=_train_on_a_small_disk, args=(words, tmp_path))
    process.start()
    process.join(120)
    if process.exitcode == 77:
        pytest.skip("no file system can be mounted")
    first, second = ((tmp_path / name).read_text() for name in ("first", "second"))
    assert process.exitcode == 0, first + second
    assert "Traceback" not in first + second and len(re.findall("^error: ", first, re.M)) == 1, first
    assert re.search(
        r"metrics.jsonl cannot be written \(No space left|step-8 could not be saved: OSError: .*space", first
    )
    assert "resumed after step 4" in second
    assert losses(rows(tmp_path)) == straight(train)


def kill_a_data_process() -> None:
    """In step 6, one of two; of several ranks the second's."""
    enter_phase = SparseTrainer._enter_phase

    def kill(self, batches):
        enter_phase(self, batches)
        if self.step == 6 and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    SparseTrainer._enter_phase = kill  # type: ignore[method-assign]


def test_a_data_process_that_is_killed_is_one_message(tiny, tmp_path):
    processes = ["--training.dataloader.num_workers", "2", "--training.local_batch_size", "2"]
    words = merge(tiny, [*processes, "--training.global_batch_size", "4", "--job.dump_folder", str(tmp_path)])
    command = ["--config", "configs/debug.toml", *words]
    result = fork(*command, prepare=kill_a_data_process)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.startswith("error: SIGKILL ended a process that reads the data"), result.stderr
    first = max(rows(tmp_path))
    assert first < 12
    whole = fork(*merge(command, ["--job.dump_folder", str(tmp_path / "whole")]))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert fork(*command).returncode == 0
    assert losses(rows(tmp_path)) == losses(rows(tmp_path / "whole"))

    several = merge(command, ["--training.global_batch_size", "8", "--job.dump_folder", str(tmp_path / "several")])
    result = fork(*several, processes=2, prepare=kill_a_data_process)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: SIGKILL ended a process that reads the data") == 1, result.stderr


def test_what_a_data_process_refuses_is_one_message(train, tmp_path, monkeypatch):
    process = "--training.dataloader.num_workers", "1"
    train(tmp_path, *process, stop_after=2)

    def refuse(*_):
        raise ConfigError("data.sources: the documents are others")

    monkeypatch.setattr(Row, "load_state_dict", refuse)
    with pytest.raises(ConfigError, match=r"^data\.sources: the documents are others$"):
        train(tmp_path, *process)


def test_a_run_goes_on_where_its_output_cannot_be_written(tiny, straight, train, tmp_path):
    words = ["--config", "configs/debug.toml", *merge(tiny, ["--job.dump_folder", str(tmp_path / "run")])]
    outputs = [Path("/dev/full"), tmp_path / "stderr"]
    process = PROCESSES.Process(target=run_train, args=(words, dict(os.environ), outputs))
    process.start()
    process.join(120)
    said = "the run's output cannot be written (No space left on device); the run goes on\n"
    assert process.exitcode == 0 and (tmp_path / "stderr").read_text() == said
    assert losses(rows(tmp_path / "run")) == straight(train)


def test_a_disk_that_is_full_at_the_start_is_one_message(train, tmp_path, monkeypatch):
    make = os.makedirs

    def full(name, *args, **kwargs):
        if str(name).endswith("comm_traces"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        make(name, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(ConfigError, match=r"comm_traces cannot be written \(No space left on device\); free space"):
        train(tmp_path / "run")


def _train_on_a_small_disk(words: list[str], results: Path) -> None:
    """Mount a file system for this process alone, fill it in the middle of a run, make room, and run again."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = results / "disk"
    folder.mkdir()
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        os._exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", bytes(folder), b"tmpfs", 0, b"size=64m"):
        os._exit(77)
    filler, enter_phase = folder / "filler", SparseTrainer._enter_phase

    def fill(self, batches) -> None:
        enter_phase(self, batches)
        if self.step == 6:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    statuses = []
    for name in ("first", "second"):
        SparseTrainer._enter_phase = fill if name == "first" else enter_phase  # type: ignore[method-assign]
        if not (child := os.fork()):
            output = results / name
            run_train((*words, "--job.dump_folder", str(folder / "run")), dict(os.environ), [output, output])
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        filler.unlink(missing_ok=True)
    shutil.copyfile(folder / "run" / "metrics.jsonl", results / "metrics.jsonl")
    os._exit(int(statuses != [2, 0]))


def test_tensorboard_has_every_step_once(train, tmp_path):
    """As metrics.jsonl has, also after a resume from an older checkpoint; an earlier run's points are set aside."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    def steps():
        files = sorted((tmp_path / "tb").rglob("*tfevents*"))
        events = [event for file in files for event in EventFileLoader(str(file)).Load()]
        return sorted(event.step for event in events for value in event.summary.value if value.tag == "loss")

    words = "--metrics.enable_tensorboard", "true", "--metrics.log_freq", "1", "--checkpoint.interval", "1"
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


class Attribute:
    """Pickles as a call of getattr, as an enumeration's member does in Python 3.11.0 to 3.11.3 (Debian 12)."""

    def __init__(self, owner: object, name: object) -> None:
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_metadata_names_members_of_enumerations_and_no_other_attributes(tmp_path):
    def read(owner, name):
        return _Pickle.load(io.BytesIO(pickle.dumps(Attribute(owner, name))))

    assert read(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT") is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for owner, name in (
        *((_MEM_FORMAT_ENCODING, name) for name in ("__class__", "mro", "none", ["TORCH_PRESERVE_FORMAT"])),
        (type(tmp_path), "cwd"),
    ):
        with pytest.raises(ConfigError, match=r"names builtins.getattr, which no checkpoint needs"):
            read(owner, name)


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
