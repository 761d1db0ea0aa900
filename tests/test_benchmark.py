"""The training benchmark: what counts of a run's rows, where a trace's time goes, and a whole round on the CPU."""

import json
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Forked

from configs.errors import ConfigError
from configs.loader import load_config
from models.llama import llama_args
from recipes.check import check_keys
from scripts import benchmark
from scripts.report import fill

ARGS = llama_args("7b-slice")
ARGS.vocab_size = 32768
TOKENS, D, F = 16384, ARGS.dim, ARGS.hidden_dim


@pytest.mark.parametrize(
    "op, shapes, kernel, part",
    [
        ("aten::mm", [[TOKENS, D], [D, F]], "nvjet", "FFN"),
        ("aten::mm", [[F, TOKENS], [TOKENS, D]], "nvjet", "FFN"),
        ("aten::mm", [[TOKENS // 8, D], [D, F]], "nvjet", "FFN"),  # of a sample; F is as large as TOKENS
        ("aten::mm", [[TOKENS, D], [D, D]], "nvjet", "projections"),  # as many tokens as the FFN is wide
        ("aten::mm", [[D, TOKENS], [TOKENS, D]], "nvjet", "projections"),
        ("aten::_scaled_mm", [[TOKENS, D], [D, 10944], [1]], "nvjet", "FFN"),  # SwiGLU's two thirds
        ("aten::mm", [[TOKENS, D], [D, 32768]], "nvjet", "head and loss"),
        ("aten::bmm", [[16, 1024, D], [16, D, 2048]], "nvjet", "FFN"),
        ("sparsetitan::groups_sample", [[TOKENS, D]], "sample", "FFN"),
        ("triton_poi_fused_mul_relu_3", [], "triton_poi_fused_mul_relu_3", "FFN"),
        ("aten::_cudnn_attention_backward", [[4, 32, 4096, 128]], "cudnn_sdpa", "attention"),
        ("triton_red_fused__log_softmax_0", [], "triton_red_fused__log_softmax_0", "head and loss"),
        ("aten::_fused_adamw_", [], "multi_tensor_apply_kernel", "optimizer"),
        ("aten::_foreach_copy_", [], "multi_tensor_apply_kernel", "communication"),
        ("", [], "ncclDevKernel_AllGather", "communication"),
        ("triton_per_fused_rms_norm", [], "triton_per_fused_rms_norm", "other"),
    ],
)
def test_part_of(op, shapes, kernel, part):
    assert benchmark.part_of(op, shapes, kernel, TOKENS, ARGS) == part


@pytest.mark.parametrize("name", benchmark.CONTENDERS)
def test_every_contender_is_a_job(name):
    keys = [f"--{key}={word}" for key, word in benchmark.CONTENDERS[name].keys.items()]
    config, _ = load_config(["--config=configs/1b.toml", *keys])
    check_keys(config, 1)


def test_float8_is_measured_in_both_scalings():
    """torchtitan's converter takes tensor-wise scaling where no recipe is named, row-wise where that is."""
    scalings = {}
    for name in ("float8", "float8_tensorwise"):
        keys = [f"--{key}={word}" for key, word in benchmark.CONTENDERS[name].keys.items()]
        config, _ = load_config(["--config=configs/1b.toml", *keys])
        assert config.model.converters == ["quantize.linear.float8"]
        scalings[name] = config.quantize.linear.float8.recipe_name
    assert scalings == {"float8": "rowwise", "float8_tensorwise": None}


def test_parts_of_a_trace():
    def kernel(at, dur, number, name="k"):
        args = {"External id": number, "correlation": 10 * number}
        return {"cat": "kernel", "ts": at, "dur": dur, "name": name, "args": args}

    def launch(number):
        args = {"correlation": 10 * number}
        return {"cat": "cuda_driver", "ts": 0, "dur": 1, "name": "cuLaunchKernelEx", "args": args}

    def op(number, name, shapes):
        return {"cat": "cpu_op", "ts": 0, "name": name, "args": {"External id": number, "Input Dims": shapes}}

    trace = [
        op(1, "aten::mm", [[TOKENS, D], [D, F]]),
        op(2, "aten::_fused_adamw_", [[[D, D], [D]], []]),  # a list of tensors has a list of shapes
        kernel(100, 900, 9, "nvjet_of_the_step_before"),
        kernel(1000, 2000, 1),
        kernel(2000, 500, 3, "ncclDevKernel"),  # beside the product, on another stream
        kernel(5000, 1000, 2),
        *map(launch, (1, 2, 3)),
        {"cat": "python_function", "ts": 0, "dur": 9999, "name": "x", "args": {}},
    ]
    assert benchmark.parts_of(trace, TOKENS, ARGS) == pytest.approx(
        {"FFN": 2.0, "optimizer": 1.0, "communication": 0.5, "idle": 2.0}
    )


def row(step, phase, seconds, graphs=0, **more):
    values = {"step": step, "phase": phase, "loss": 10 - step / 20, "step_seconds": seconds, "peak_memory_gib": 1.0}
    return values | {"switch_seconds": 0.0, "graphs_compiled": graphs} | more


def test_only_undisturbed_steps_count():
    rows = [
        row(1, "dense", 9.0, 3),
        row(5, "dense", 0.9),  # allocates
        row(10, "dense", 0.30),
        row(15, "sparse", 3.0, 3, switch_seconds=0.5),  # compiles
        row(20, "sparse", 0.20, peak_memory_gib=2.0, peak_active_gib=0.5),
        row(25, "sparse", 0.22),
        row(30, "sparse", 0.90),  # profiled
        row(35, "dense", 0.90),  # waits for the trace
        row(40, "dense", 0.32),
        row(60, "dense", 0.90),  # profiled
    ]
    result = benchmark.measured(rows)
    assert result["seconds"] == {"dense": [0.30, 0.32], "sparse": [0.20, 0.22]}
    assert result["peak_gib"] == {"dense": 1.0, "sparse": 2.0} and result["active_gib"] == {"sparse": 0.5}
    assert result["switch_seconds"] == 0.5 and result["graphs"] == {1: 3, 15: 3}
    turn = result | {"tokens": 1000, "about": {}, "parts": {}, "failed": ""}
    entry = benchmark.combined([turn, turn], 0.5)
    assert entry["ms"] == pytest.approx({"dense": 310, "sparse": 210})
    alone, beside = {"sparse": dict(entry)}, {"sparse": dict(entry), "dense": {"ms": {"dense": 300}}}
    benchmark.compare(alone)
    benchmark.compare(beside | {"broken": {"failed": "no"}})
    assert alone["sparse"]["speedup"] == pytest.approx(310 / 210)
    assert alone["sparse"]["whole"] == pytest.approx(310 / 260)
    assert beside["sparse"]["speedup"] == pytest.approx(300 / 210)
    assert beside["sparse"]["whole"] == pytest.approx(300 / 260)
    assert entry["tokens_per_second"]["sparse"] == pytest.approx(1000 / 0.21)
    assert benchmark.combined([turn, turn | {"failed": "no"}], 0.5) == {"failed": "no"}
    compiling = turn | {"seconds": {"dense": [0.3]}, "graphs": {15: 3, 20: 1}}  # in every window of sparse steps
    assert benchmark.combined([turn, compiling], 0.5)["ms"] == pytest.approx({"dense": 300, "sparse": 210})
    assert benchmark.combined([compiling], 0)["ms"] == {"dense": 300}
    why = "graphs were compiled in all windows of sparse steps (3 by step 15, 1 by step 20): use a larger --brief"
    assert benchmark.combined([compiling], 0.5) == {"failed": why}


def test_a_brief_run_measures_two_windows_of_each_mode():
    plan = benchmark.brief(3)
    assert plan.steps("dense") == 9 and plan.steps("sparse") == 18 and plan.traced("sparse") == []
    assert plan.keys("sparse")["schedule.phases"] == '[{mode = "dense", end = 9}, {mode = "sparse", end = 18}]'
    rows = [row(1, "dense", 9.0, 3), row(3, "dense", 0.9), row(6, "dense", 0.30), row(9, "dense", 0.31)]
    # Experts under expert parallelism compile nothing in sparse steps, but their first ones allocate.
    for graphs in (0, 3):
        sparse = [row(12, "sparse", 3.0, graphs), row(15, "sparse", 0.20), row(18, "sparse", 0.22)]
        seconds = benchmark.measured(rows + sparse, plan)["seconds"]
        assert seconds == {"dense": [0.30, 0.31], "sparse": [0.20, 0.22]}


def test_the_last_step_before_the_second_dense_phase_is_traced():
    assert benchmark.FULL.traced("sparse") == [("sparse", 30), ("dense", 60)]
    assert benchmark.FULL.traced("dense") == [("dense", 30)]


def test_a_layout_has_its_own_batch_and_shards(tmp_path):
    """Ranks of a tensor or pipeline group read the same sequences, and a shard is as wide as a part of the FFN."""
    common = {"config": "configs/debug.toml", "training.local_batch_size": "4", "training.global_batch_size": "-1"}

    def turn(config: str = common["config"], **keys: str) -> benchmark.Turn:
        keys = {"config": config} | {f"parallelism.{name}_parallel_degree": degree for name, degree in keys.items()}
        return benchmark.Turn("dense", common | keys, tmp_path, 2, benchmark.FULL)

    shard, tensor, pipeline = turn(), turn(tensor="2"), turn(pipeline="2")
    assert (shard.sequences, tensor.sequences, pipeline.sequences) == (8, 4, 4)
    turns = (shard, tensor, pipeline)
    assert [turn.micro_tokens["dense"] for turn in turns] == [4 * 256, 4 * 256, 256]
    assert (shard.args.hidden_dim, tensor.args.hidden_dim) == (768, 384)
    head = benchmark.describe(tensor, ["command"], 2)
    assert head["batch"] == 2 and head["layers"] == 4 and head["layout"]["tensor_parallel_degree"] == 2
    experts = turn(config="configs/moe_debug.toml", expert="2")
    assert benchmark.describe(experts, ["command"], 2)["layout"]["expert_parallel_degree"] == 2


def test_tables_of_depths_and_layouts_have_the_prediction_beside_the_measurement(tmp_path):
    def write(name: str, contender: str, ms: dict[str, float], **more) -> None:
        about = {"flops_per_token": {"dense": 1e10}, "peak_flops": 1e15}
        rates = {mode: 32768e3 / time for mode, time in ms.items()}
        entry = {"failed": "", "ms": ms, "tokens_per_second": rates, "about": about, "graphs": {"1": 2, "13": 1}}
        entry |= {"active_gib": dict.fromkeys(ms, 20.0), "rounds": {mode: [t, 1.02 * t] for mode, t in ms.items()}}
        entry |= {"speedup": ms["dense"] / ms["sparse"]} if "sparse" in ms else {}
        head = {"model": "7b", "sequence": 4096, "batch": 4, "compile": True, "activation_checkpoint": "none"}
        head |= {"dtype": "float32", "hardware": {"device": "GPU", "gpus": 2}, "versions": {"torch": "2"}}
        head |= {"date": "2026-11-28T00", "commit": "abc", "command": "python", "layout": {}} | more
        (tmp_path / name).write_text(json.dumps(head | {"contenders": {contender: entry}}))

    predicted = {"dense": 460, "float8_ffn": 380, "columns_quarter_fp8": 300, "columns_eighth_fp8": 280}
    (tmp_path / "prediction.json").write_text(json.dumps({"ms": {"12": predicted}}))
    write("a.json", "dense", {"dense": 480.0}, layers=12, window=3)
    write("b.json", "columns_quarter_fp8", {"dense": 390.0, "sparse": 320.0}, layers=12)
    text = fill(f"<!-- depth: {tmp_path} -->\n<!-- end -->")
    assert "| 12 | `dense` | 480 (460) | - | - | 68.3k | 34% | 20.0 GiB |" in text
    assert "| 12 | `float8_ffn` | 390 (380) | 1.23x (1.21x) | - | 84k | 42% | 20.0 GiB |" in text
    assert "| 12 | `columns_quarter_fp8` | 320 (300) | 1.50x (1.53x) | 1.22x (1.27x) | 102k | 51% | 20.0 GiB |" in text
    assert "Medians over means of 3 or five steps." in text  # older files do not name their window

    doubtful = json.loads((tmp_path / "a.json").read_text())
    doubtful["contenders"]["dense"]["doubt"] = "memory was short"
    (tmp_path / "a.json").write_text(json.dumps(doubtful))
    text = fill(f"<!-- depth: {tmp_path} -->\n<!-- end -->")
    assert "| 12 | `columns_quarter_fp8` | 320 (300) | 1.22x (1.27x) | 102k | 51% | 20.0 GiB |" in text
    assert "`dense` of 12 layers: memory was short." in text

    for file in tmp_path.glob("*.json"):
        file.unlink()
    times = {"dense": 200, "columns_eighth": 160, "columns_eighth_fp8": 150}
    gib = {"columns_eighth": {"dense": 22.0, "sparse": 19.0}}
    prediction = {"ms": {"FSDP2 2": times, "tensor 2": times}, "gib": {"tensor 2": gib}}
    (tmp_path / "prediction.json").write_text(json.dumps(prediction))
    tensor = {"data_parallel_shard_degree": -1, "tensor_parallel_degree": 2}
    write("a.json", "columns_eighth", {"dense": 240.0, "sparse": 200.0}, layers=16, layout=tensor)
    write("b.json", "columns_eighth_fp8", {"dense": 210.0, "sparse": 150.0}, layers=16)
    write("c.json", "dense", {"dense": 230.0}, layers=16, hardware={"device": "GPU", "gpus": 1})
    command = "python -m scripts.benchmark --precision.ffn fp8"
    write("d.json", "columns_half", {"dense": 220.0, "sparse": 180.0}, layers=16, command=command, layout=tensor)
    slower = json.loads((tmp_path / "d.json").read_text())
    slower["contenders"]["columns_half"]["rounds"]["sparse"] = [170.0, 190.0]
    (tmp_path / "d.json").write_text(json.dumps(slower))
    lines = fill(f"<!-- layouts: {tmp_path} -->\n<!-- end -->").splitlines()
    assert lines[3].startswith("| one GPU | `dense` | 230 | - | - | 142% | 20.0 |")  # 32,768 tokens on one GPU
    assert lines[4].startswith(
        "| FSDP2 2 | `columns_eighth_fp8` | 210 | 150 (150) | 1.40x | 78% / 109% | 20.0 / 20.0 |"
    )
    row = "| tensor 2 | `columns_eighth` | 240 (200) | 200 (160) | 1.20x (1.25x) | 68% / 82% |"
    assert lines[5] == f"{row} 20.0 (22.0) / 20.0 (19.0) | float32 | 2 by step 1, 1 by step 13 |"
    assert lines[6].startswith("| tensor 2 | `columns_half`, `precision.ffn = fp8` | 220 (200) | 180 | 1.22x |")
    text = lines[-2]
    assert "7b, 16 layers, 4 sequences of 4096 tokens in a step for each GPU" in text
    assert "1 x GPU and 2 x GPU" in text
    end = "differ by more than 3%: tensor 2, `columns_half`, `precision.ffn = fp8`: 170 to 190 ms (sparse)."
    assert text.endswith(end)


def test_torchtitan_s_lines_are_read():
    log = (
        "12:00 - \x1b[31mstep:  1  \x1b[32mloss: 10.84900  \x1b[38mgrad_norm:  2.5000  \x1b[36mmemory: 21.49GiB(27%)  "
        "\x1b[34mtps: 2,048  \x1b[36mtflops: 1.0  mfu: 1%\x1b[39m\n"
        "[rank0]: step: 10  loss:  6.50000  grad_norm:  1.0  memory: 31.40GiB(39%)  tps: 65,536  tflops: 3  mfu: 55%\n"
    )
    first, last = benchmark.titan_rows(log, TOKENS)
    assert first["step"] == 1 and first["loss"] == 10.849 and first["step_seconds"] == 8.0
    assert last == row(10, "dense", 0.25, loss=6.5, peak_memory_gib=31.4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--contenders", "dens"], "--contenders dens: no such contender; there are torchtitan_swiglu"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--gpus", "99999"], "--gpus 99999: this machine has "),
        (["--brief", "0"], "--brief 0: give 1 or more"),
        (["--training.steps"], "--training.steps: give keys of train.py as --key value"),
        (["--training.stepz", "3"], "training.stepz"),
        (["--training.steps=3"], "--training.steps is the benchmark's to set"),
    ],
)
def test_refusals(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.main(["--config", "configs/debug.toml", "--out", str(tmp_path), *words])


def test_signals_end_the_run_at_hand_and_keep_those_before_it(tmp_path, monkeypatch, request):
    turn = object.__new__(benchmark.Turn)
    turn.folder, turn.gpus, turn.program, turn.words = tmp_path, 1, ("sleep.py",), []
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a program of its own
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    default = signal.getsignal(signal.SIGTERM)
    for name in ("SIGINT", "SIGTERM"):
        text = f"import os, signal, time\nos.kill(os.getppid(), signal.{name})\ntime.sleep(60)\n"
        (tmp_path / "sleep.py").write_text(text)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            turn.run()  # returns once the process has ended
        assert time.monotonic() - began < 30 and signal.getsignal(signal.SIGTERM) is default
    monkeypatch.undo()

    results = iter([{"failed": "no time"}])
    monkeypatch.setattr(benchmark.Turn, "run", lambda self: next(results, None) or signal.raise_signal(signal.SIGINT))
    words = ["--config", "configs/debug.toml", "--contenders", "dense", "groups_quarter", "--rounds", "1"]
    with pytest.raises(KeyboardInterrupt, match=rf"1 of 2 runs have ended, kept in {tmp_path}/out/training.json"):
        benchmark.main([*words, "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "training.json").read_text())["contenders"]["dense"]["failed"] == "no time"


def test_a_round(tiny, tmp_path, monkeypatch, capsys):
    """torchtitan's trainer and one of ours with a sparse phase, from processes to tables and picture."""
    monkeypatch.setattr(benchmark, "OUTPUTS", tmp_path)
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
    out = tmp_path / "out"
    own = {f"--{key}" for key in benchmark.BENCHMARK_KEYS | benchmark.FULL.keys("sparse")}
    keys = [word for pair in zip(tiny[::2], tiny[1::2], strict=True) if pair[0] not in own for word in pair]
    words = ["--config", "configs/debug.toml", "--contenders", "torchtitan_relu2", "groups_quarter", "--rounds", "1"]
    status = benchmark.main([*words, "--out", str(out), *keys])
    printed = capsys.readouterr().out
    assert status == 0, printed
    result = json.loads((out / "training.json").read_text())
    titan, ours = result["contenders"]["torchtitan_relu2"], result["contenders"]["groups_quarter"]
    assert set(titan["ms"]) == {"dense"} and set(ours["ms"]) == {"dense", "sparse"}
    # The same model, batches and seed: torchtitan's loss is ours.
    assert titan["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-4)
    assert ours["about"]["backend"]["name"] == "reference"
    assert (out / "training.png").stat().st_size > 5_000
    if not torch.cuda.is_available():
        assert ours["parts"] == {}
    ours["parts"] = {"sparse": {"FFN": 1.0, "idle": 0.5}}
    (out / "training.json").write_text(json.dumps(result))
    text = fill(f"<!-- training: {out}/training.json -->\n<!-- end -->")
    assert "| `groups_quarter` | a quarter of the groups | " in text and "(65% sparse)" in text
    text = fill(f"<!-- parts: {out}/training.json -->\n<!-- end -->")
    assert "| `groups_quarter`, sparse | 1.0 | 0.5 | 1.5 |" in text


def test_steps_are_compared_by_their_keys(tmp_path):
    """A row for each file, with the change to the row of the fewest keys; not where the batch is another."""
    source = json.loads((ROOT / "docs" / "training" / "1b_fp8_2nd" / "training.json").read_bytes())

    def write(name: str, contender: str, faster: float, *words: str) -> None:
        entry = json.loads(json.dumps(source["contenders"][contender]))
        entry["ms"] = {mode: time - faster for mode, time in entry["ms"].items()}
        command = shlex.join([*shlex.split(source["command"]), *words])
        result = source | {"contenders": {contender: entry}, "command": command}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    write("old", "columns_quarter_fp8", 0.0)
    write("new", "columns_quarter_fp8", 5.0, "--training.bf16_residual", "true", "--optimizer.moments=bfloat16")
    write("batch", "columns_quarter_fp8", 0.0, "--training.global_batch_size", "8")
    write("dense", "dense", 0.0)
    all_sparse = ("--schedule.dense_layers", "0")  # the other keys' change is over a step that has it, too
    write("half", "columns_half_fp8", 0.0, *all_sparse)
    write("half_new", "columns_half_fp8", 5.0, *all_sparse, "--training.bf16_residual", "true")
    lines = fill(f"<!-- switches: {tmp_path} -->\n<!-- end -->").splitlines()
    assert lines[3:9] == [
        "| 1b | `columns_half_fp8` | `dense_layers = 0` | 204.2 | 188.1 | 87.1k | 27.6 / 25.0 |",
        "| 1b | `columns_half_fp8` | `bf16_residual = true`, `dense_layers = 0` | 199.2 (-5.0) | 183.1 (-5.0) | "
        "87.1k | 27.6 / 25.0 |",
        "| 1b | `columns_quarter_fp8` | none | 203.9 | 164.8 | 99.4k | 27.6 / 24.1 |",
        "| 1b | `columns_quarter_fp8` | `global_batch_size = 8` | 203.9 | 164.8 | 99.4k | 27.6 / 24.1 |",
        "| 1b | `columns_quarter_fp8` | `bf16_residual = true`, `moments = bfloat16` | 198.9 (-5.0) | 159.8 (-5.0) | "
        "99.4k | 27.6 / 24.1 |",
        "| 1b | `dense` | none | 235.3 | - | 69.6k | 36.1 |",
    ]
