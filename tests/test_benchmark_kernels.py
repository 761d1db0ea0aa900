"""The kernel benchmark at toy size on the CPU: nothing wrong gets past its gate, its figures are what was measured."""

import json
from dataclasses import replace

import pytest
import torch
from test_plot import pixels

import kernels
import models.feed_forward
from configs.errors import ConfigError
from kernels import Venom
from kernels.groups.ffn import TILE_GROUPS
from kernels.two_four.ffn import PACKED_ACTIVATIONS
from scripts import benchmark_kernels, check_kernels, plot_kernels
from scripts.benchmark_kernels import CONTENDERS, benchmark, stages_of, text_table
from scripts.check_kernels import check, prepared_weights

CPU = torch.device("cpu")
SHAPE = 64, 1024


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Without torch.compile, which takes longer than everything else here."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(check_kernels, "TOKENS", 1024 + 77)  # a whole block of the longest, and a cut one
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights():
    return prepared_weights(*SHAPE, CPU)


@pytest.mark.parametrize("name", CONTENDERS)
def test_references_pass(weights, name):
    sparsity = CONTENDERS[name][1]
    peer = check(CONTENDERS["dense_float8" if sparsity.fp8 else "dense"][1], weights, None, compiled=False)
    result = check(sparsity, weights, peer, compiled=False)
    assert result["failed"] == []
    assert result["tokens"] % 128
    assert 0 < max(result["errors"].values()) < (0.1 if sparsity.fp8 else 5e-3)


@pytest.mark.parametrize(
    "name, family", [("groups_quarter", TILE_GROUPS), ("activations_2of4", PACKED_ACTIVATIONS)], ids=["groups", "2:4"]
)
def test_ops_pass(weights, name, family):
    """The operators that run on a GPU, on their own CPU path."""
    with kernels.prefer(family):
        assert check(CONTENDERS[name][1], weights, None, compiled=False)["failed"] == []


def broken(monkeypatch, change):
    """Let the module's op be `change(op, arguments)`."""
    original = models.feed_forward.sparse_feed_forward
    monkeypatch.setattr(models.feed_forward, "sparse_feed_forward", lambda *args: change(original, list(args)))


def order_forgotten(op, args):
    return op(*args[:-1], None)


def scaled(op, args):
    return op(*args) * 1.02


def one_row_wrong(op, args):
    y = op(*args)
    return torch.cat((y[:-1], torch.zeros_like(y[-1:])))


def nan_swallowed(op, args):
    return op(*args).nan_to_num()


def nan_spread(op, args):
    y = op(*args)
    return y + 0 * y.sum()


def never_written(op, args):
    return torch.where(torch.arange(len(args[0]))[:, None] < 128, args[0].new_empty(args[0].shape), op(*args))


def one_group_fewer(op, args):
    pattern = args[3].pattern
    args[3] = replace(args[3], pattern=replace(pattern, keep=pattern.keep - 128 / args[1].shape[0]))
    return op(*args)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (scaled, "y off by"),
        (order_forgotten, "y off by"),
        (one_row_wrong, "y off by"),
        (never_written, "y off by nan"),
        (one_group_fewer, "keeps 0."),
        (nan_swallowed, "NaN in x is lost"),
        (nan_spread, "NaN in x reaches other tokens"),
    ],
)
def test_what_is_wrong_fails(weights, monkeypatch, change, complaint):
    broken(monkeypatch, change)
    assert complaint in "; ".join(check(CONTENDERS["groups_quarter"][1], weights, None, compiled=False)["failed"])


@pytest.mark.parametrize("output", check_kernels.OUTPUTS)
def test_each_output_counts(weights, monkeypatch, output):
    def one_block_lost(*args):
        outputs = list(original(*args))
        place = check_kernels.OUTPUTS.index(output)
        outputs[place] = outputs[place].clone()
        outputs[place][-64:, -64:] = 0
        return tuple(outputs)

    original = check_kernels.step
    monkeypatch.setattr(check_kernels, "step", one_block_lost)
    (failed,) = check(CONTENDERS["groups_quarter"][1], weights, None, compiled=False)["failed"]
    assert failed.startswith(f"{output} off by")


def test_a_choice_other_than_the_largest_fails(weights, monkeypatch):
    """The module keeps as many groups as it should, but not the largest; the reference is asked after it."""
    right, calls = kernels.groups.pattern.group_mask, []

    def second_best(h, v, g, keep, *rest):
        calls.append(h)
        blocks = h.shape[1] // g
        if len(calls) > 1:
            return right(h, v, g, keep)
        return right(h, v, g, keep + 1 / blocks) & ~right(h, v, g, 1 / blocks)

    ones = weights._replace(w2=torch.nn.Parameter(check_kernels.adding(*SHAPE).to(weights.w2)))
    module = check_kernels.build(CONTENDERS["groups_quarter"][1], ones)
    x = torch.randn(300, SHAPE[0]).bfloat16()
    assert check_kernels.kept_share(module, ones, x) == pytest.approx(1, abs=check_kernels.KEPT)
    monkeypatch.setattr(kernels.groups.pattern, "group_mask", second_best)
    assert check_kernels.kept_share(module, ones, x) < 0.99


def test_a_broken_contender_gets_no_time(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_kernels, "SMALL", (64, 512))
    monkeypatch.setattr(benchmark_kernels, "ROUNDS", 2)
    names = ["dense", "groups_quarter", "venom_4of16"]

    def venom_scaled(op, args):
        return op(*args) * (1.02 if isinstance(args[3].pattern, Venom) else 1)

    broken(monkeypatch, venom_scaled)
    (shape,) = benchmark(names, [SHAPE], 256, True, CPU)
    entries = shape["contenders"]
    assert entries["groups_quarter"]["speedup"] == entries["dense"]["ms"] / entries["groups_quarter"]["ms"]
    assert len(entries["dense"]["rounds"]) == 2
    assert "ms" not in entries["venom_4of16"]
    assert set(shape["cublas"]) == set(plot_kernels.PRODUCTS)
    json.dumps(shape)
    output = capsys.readouterr().out
    assert "venom_4of16, d = 64, f = 1024: FAILED: y off by 2.0e-02" in output
    assert output.count("groups_quarter ") == 1


def test_references_are_skipped_with_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_kernels, "SMALL", (64, 512))
    monkeypatch.setattr(benchmark_kernels, "ROUNDS", 1)
    (shape,) = benchmark(["dense", "venom_4of16"], [SHAPE], 64, False, CPU)
    assert "venom_4of16: skipped, runs on the reference (no kernels for the device cpu)" in capsys.readouterr().out
    assert shape["contenders"]["venom_4of16"] == {"backend": "reference", "reason": "no kernels for the device cpu"}
    assert shape["contenders"]["dense"]["speedup"] == 1


def trace():
    """A step of our operators as the profiler writes it, and dense products around it: T = f = 256, d = 64."""
    events = []

    def matmul(index, thread, a, b, transposed=False):
        strides = [[1, a[0]] if transposed else [a[1], 1], [1, 1]]
        arguments = {"External id": index, "Input Dims": [list(a), list(b)], "Input Strides": strides}
        events.append({"cat": "cpu_op", "name": "aten::mm", "ts": index, "dur": 1, "tid": thread, "args": arguments})
        kernel(f"nvjet_{index}", 10.0 * index, **{"External id": index})

    def operator(index, thread, name, dur, inner=None, shapes=()):
        op = {"cat": "cpu_op", "ts": index, "tid": thread}
        arguments = {"External id": index, "Input Dims": [list(shape) for shape in shapes]}
        events.append(op | {"name": f"sparsetitan::{name}", "dur": 0.9, "args": arguments})
        if inner:  # what launches the kernel is inside
            events.append(op | {"ts": index + 0.1, "name": inner, "dur": 0.5, "args": {"External id": 100 + index}})
        kernel("any name", dur, **{"External id": 100 + index if inner else index})

    def kernel(name, dur, cat="kernel", **arguments):
        events.append({"cat": cat, "name": name, "ts": 0, "dur": dur, "tid": 7, "args": arguments})

    matmul(1, 100, (256, 64), (64, 2))  # router
    matmul(2, 100, (256, 64), (64, 256))  # (1)
    matmul(3, 100, (256, 256), (256, 64))  # (2)
    matmul(4, 200, (256, 64), (64, 256))  # (3)
    matmul(5, 200, (64, 256), (256, 256), True)  # (4)
    matmul(6, 200, (256, 256), (256, 64))  # (5)
    matmul(7, 200, (256, 256), (256, 64), True)  # (6)
    operator(11, 100, "groups_reduce_neurons", 1.0)  # (2)
    operator(12, 200, "groups_sample_dy1", 2.0)  # (3)
    operator(13, 200, "groups_reduce_tokens", 3.0)  # (4)
    operator(14, 200, "groups_reduce_neurons", 4.0)  # (5)
    operator(15, 200, "groups_reduce_tokens", 5.0)  # (6)
    operator(16, 100, "groups_select_tiles", 6.0)
    operator(17, 100, "venom_select_columns", 7.0)
    operator(18, 100, "two_four_pack", 14.0)
    cusparselt, of_weight, of_h = "aten::_cslt_sparse_mm", ((256, 36), (64, 256)), ((256, 144), (256, 64))
    operator(19, 100, "two_four_matmul", 15.0, cusparselt, of_weight)  # (1)
    operator(20, 100, "two_four_matmul", 16.0, cusparselt, of_h)  # (2)
    operator(21, 200, "two_four_matmul", 17.0, cusparselt, of_weight)  # (3)
    operator(22, 200, "two_four_reduce_tokens", 18.0, "aten::mm", of_h)  # (4)
    operator(23, 200, "two_four_matmul", 19.0, cusparselt, of_h)  # (5)
    operator(24, 200, "two_four_reduce_tokens", 20.0, "aten::mm", of_h)  # (6)
    operator(25, 200, "two_four_unpack", 21.0)
    matmul(26, 100, (32, 64), (64, 256))  # (1) of a sample, to choose by
    operator(27, 100, "columns_sample", 1.0, "aten::bmm")  # (1)
    operator(28, 200, "columns_sample", 2.0, "aten::bmm")  # (3)
    kernel("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", 8.0)
    kernel("triton_red_fused_argmax_0", 9.0)
    kernel("void at::native::indexSelectLargeIndex<...>", 10.0)
    kernel("triton_poi_fused_mm_mul_relu_0", 11.0)
    kernel("Memset (Device)", 1.0, "gpu_memset")
    kernel("sm90_xmma_gemm_of_nobody", 12.0)
    events.append({"cat": "gpu_user_annotation", "name": "a range, not a kernel", "ts": 0, "dur": 1e6, "args": {}})
    events.append({"cat": "cpu_op", "name": "aten::relu", "ts": 0, "dur": 0.5, "tid": 100, "args": {}})
    return events


def test_kernels_are_told_apart():
    products = {"(1)": 36, "(2)": 47, "(3)": 61, "(4)": 71, "(5)": 83, "(6)": 95, "products": 12}
    rest = {"packing": 35, "selection": 273, "router": 27, "permutation": 10, "other": 12}
    times = {stage: ms / 1e3 / benchmark_kernels.PROFILED for stage, ms in (products | rest).items()}
    assert stages_of(trace(), 256, 64, 256, reference=False) == pytest.approx(times)
    assert set(times) <= set(plot_kernels.STAGES)
    assert set(stages_of(trace(), 256, 64, 256, reference=True)) == {
        *products,
        "packing",
        "selection",
        "router",
        "other",
    }


def measured():
    """What a GPU would give, two shapes and all contenders."""
    shapes = []
    for dim, hidden_dim in ((4096, 16384), (2048, 12288)):
        contenders = {}
        for index, name in enumerate(CONTENDERS):
            stages = {stage: 3.0 / (1 + index % 4) for stage in plot_kernels.PRODUCTS}
            stages |= {"selection": 0.2, "router": 0.1, "permutation": 0.12, "other": 0.3}
            ms = sum(stages.values())
            rates = {product: {"tflops": 612.3, "of_cublas": 0.94} for product in plot_kernels.PRODUCTS}
            contenders[name] = {"backend": "groups", "reason": "", "ms": ms, "speedup": 19 / ms, "spread": 0.01}
            contenders[name] |= {"stages": stages, "products": rates, "peak_bytes": 2**31}
            error = (0.0, 1e-4, "CUDA error: " + "x" * 200)[index % 3]
            contenders[name] |= {"waits": "", "replay_error": error}
            if not isinstance(error, str):
                contenders[name] |= {"graph_ms": ms, "graph_rounds": [ms], "graph_speedup": 19 / ms}
        cublas = dict.fromkeys(plot_kernels.PRODUCTS, 650.0)
        shapes.append({"dim": dim, "hidden_dim": hidden_dim, "contenders": contenders, "cublas": cublas})
    return {"tokens": 16384, "shapes": shapes}


def test_text_fits_a_terminal():
    text = text_table(measured()["shapes"][0])
    assert max(map(len, text.splitlines())) <= 120
    assert "612  94%" in text
    assert "replayed" in text and "CUDA error: x" in text


def test_picture(tmp_path, capsys):
    (tmp_path / "kernels.json").write_text(json.dumps(measured()))
    plot_kernels.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/kernels.png\n"
    pixels(tmp_path / "kernels.png", tallest=4000)


def test_bars_are_of_the_replays_where_there_are():
    result = measured()
    result["shapes"][0]["contenders"]["dense"]["graph_speedup"] = 7.77
    axes = plot_kernels.draw(result).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert "replayed" in axes.get_title("left") and "7.77x" in texts
    assert sum("not replayed" in text for text in texts) == 2 * len(range(2, len(CONTENDERS), 3))


def test_what_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    asked = []
    monkeypatch.setattr(benchmark_kernels, "benchmark", lambda *args: asked.append(args) or measured()["shapes"])
    words = ["--contenders", "groups_quarter", "--shapes", "4096x16384", "--out", str(tmp_path / "out"), "--seed", "5"]
    assert benchmark_kernels.main(words) == 0
    assert asked == [(["dense", "groups_quarter"], [(4096, 16384)], 16384, False, torch.device("cuda"))]
    result = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert result["seed"] == 5
    assert result["command"].startswith("python -m scripts.benchmark_kernels --contenders groups_quarter --shapes")
    assert result["contenders"] == {name: CONTENDERS[name][0] for name in ("dense", "groups_quarter")}
    assert set(result) >= {"date", "commit", "hardware", "versions", "tokens", "shapes"}
    pixels(tmp_path / "out" / "kernels.png", tallest=4000)
    failed = measured()["shapes"]
    failed[0]["contenders"]["venom_4of16"] = {"backend": "x", "reason": "", "checks": [{"failed": ["y off"]}]}
    monkeypatch.setattr(benchmark_kernels, "benchmark", lambda *_: failed)
    assert benchmark_kernels.main(words) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--contenders groups_half", "--contenders groups_half: no such contender; there are dense, dense_float8"),
        ("--shapes 4096", "--shapes 4096: give d x f, such as 4096x16384"),
        ("--shapes 100x512", "--shapes 100x512: give d x f, such as 4096x16384, with d a multiple of 64"),
        ("--tokens 100", "--tokens 100: give a multiple of 16"),
        ("", "no CUDA device: "),
    ],
)
def test_refusals(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as refused:
        benchmark_kernels.main([*words.split(), "--out", str(tmp_path / "out")])
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert not capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_plot_refuses_a_folder_without_figures(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/kernels.json: no such file;"):
        plot_kernels.main([str(tmp_path)])
