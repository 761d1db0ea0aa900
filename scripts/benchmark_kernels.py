"""Measure the sparse FFN on a GPU: is it right, how fast is it, and where does the time go.

    python -m scripts.benchmark_kernels                                # writes docs/kernels/kernels.{json,png}
    python -m scripts.benchmark_kernels --contenders groups_quarter --shapes 4096x16384 --out /tmp/kernels
    python -m scripts.benchmark_kernels --references                   # patterns without kernels too, slow

A contender is a whole FFN as a model runs it: `models.feed_forward.FeedForward` in bf16 under torch.compile, forward
and backward (dx, dW1, dW2), router and permutation included. All contenders share one set of random weights, whose
neurons are clustered as `recipes/sparsity.py` does at the switch, so each of them computes on the same numbers.
The tokens are random too: how evenly a trained router fills its clusters is not in these figures.

Right comes first (`scripts/check_kernels.py`), and a contender that is not gets no time.

Then fast. Contenders take turns, round by round, so that all of them see the same clocks and temperatures; a
contender's time is its median over the rounds, its speed-up that of dense over its own. In a round it is timed twice:
step by step, as Python launches the kernels, and replayed from a CUDA graph, in which the host has no part. While a
model trains, the host runs ahead of the GPU as long as it can, so the second is what an FFN adds to a step, unless the
host is too slow for the whole model. Each turn starts with a step that is not timed. Python's garbage collector is off,
as torchtitan's trainer has it. cuBLAS's dense products take their turns in the same rounds. Our products' rates come
from the short profile that follows, when the GPU is a little cooler: there cuBLAS itself reaches 100 to 105% of its
rate in the rounds. Memory is the peak of forward and backward beyond inputs and weights, results included.

Where the time goes is read off the profiler's kernels. Ours are known by the operator that launched them and its
thread (the backward pass has its own), a 2:4 product by its shapes as well, a cuBLAS kernel by the shapes of its
`aten::mm`, its thread, and whether its left operand is transposed.
"""

import gc
import json
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import nn
from torch.profiler import ProfilerActivity, profile

from configs.errors import ConfigError, run_program
from configs.repository import ROOT, commit
from kernels import MASKED, Cost, Family, FeedForwardSparsity, Groups, Shape, Venom, explain, hidden_activations
from kernels.feed_forward import FAMILIES
from scripts.check_kernels import CLUSTER, DENSE_FLOAT8, Weights, build, check, prepared_weights, relative_error, step
from scripts.options import TERMS, Parser, add_out
from scripts.plot_kernels import PRODUCTS, STAGES, save

QUARTER, EIGHTH = Groups(128, 128, 0.25), Groups(128, 128, 0.125)
COLUMNS_HALF, COLUMNS_QUARTER, COLUMNS_EIGHTH = (Groups(1024, 1, keep, 8, 0.5) for keep in (0.5, 0.25, 0.125))
HALF_BY_ALL, QUARTER_BY_ALL = (replace(pattern, sample=1) for pattern in (COLUMNS_HALF, COLUMNS_QUARTER))
FOUR, TWO = Venom(128, 4, 16), Venom(128, 2, 16)

# What is measured. A pattern whose blocks hold more than one token gets the router.
CONTENDERS: dict[str, tuple[str, FeedForwardSparsity]] = {
    "dense": ("nothing sparse: the baseline", FeedForwardSparsity()),
    "dense_float8": ("nothing sparse, torchao's float8, tensor-wise", DENSE_FLOAT8),
    "groups_quarter": ("a quarter of the groups of 128 neurons", FeedForwardSparsity(QUARTER)),
    "groups_eighth": ("an eighth of them", FeedForwardSparsity(EIGHTH)),
    "columns_half": ("half of the neurons, in blocks of 1024", FeedForwardSparsity(COLUMNS_HALF)),
    "columns_quarter": ("a quarter of them", FeedForwardSparsity(COLUMNS_QUARTER)),
    "columns_eighth": ("an eighth of them", FeedForwardSparsity(COLUMNS_EIGHTH)),
    "columns_half_all": ("half of them, chosen by all tokens", FeedForwardSparsity(HALF_BY_ALL)),
    "columns_quarter_all": ("a quarter, chosen by all tokens", FeedForwardSparsity(QUARTER_BY_ALL)),
    "columns_half_fp8": ("half of them, in fp8", FeedForwardSparsity(COLUMNS_HALF, fp8=True)),
    "columns_quarter_fp8": ("a quarter, in fp8", FeedForwardSparsity(COLUMNS_QUARTER, fp8=True)),
    "columns_eighth_fp8": ("an eighth, in fp8", FeedForwardSparsity(COLUMNS_EIGHTH, fp8=True)),
    "columns_half_all_fp8": ("half, by all tokens, in fp8", FeedForwardSparsity(HALF_BY_ALL, fp8=True)),
    "columns_quarter_all_fp8": (
        "a quarter, by all tokens, in fp8",
        FeedForwardSparsity(QUARTER_BY_ALL, fp8=True),
    ),
    "columns_quarter_2of4": ("a quarter, and 2:4 weights", FeedForwardSparsity(COLUMNS_QUARTER, (1, 3))),
    "groups_quarter_2of4": ("a quarter, and 2:4 W1", FeedForwardSparsity(QUARTER, (1,))),
    "groups_eighth_2of4": ("an eighth, and 2:4 W1", FeedForwardSparsity(EIGHTH, (1,))),
    "venom_4of16": ("4 of 16 neurons", FeedForwardSparsity(FOUR)),
    "venom_2of16": ("2 of 16 neurons, 2:4 W1", FeedForwardSparsity(TWO, (1,))),
    "activations_2of4": ("2:4 activations, along tokens too", FeedForwardSparsity(Venom(1, 2, 4), (), True)),
    "weights_2of4": ("2:4 weights alone", FeedForwardSparsity(None, (1, 3))),
}
PEERS = "dense", "dense_float8"  # in bf16 and in fp8
SHAPES = ("4096x16384", "2048x12288")  # d x f

SMALL = (512, 2048)  # where contenders are checked before the shapes

ROUNDS, STEPS = 12, 4  # turns of each contender, timed steps of a turn
PROFILED = 5

# An operator's stages, see `kernels.family.Family.operators`; scripts/plot_kernels.py knows the stages' order.
OPERATORS = {name: stages for family in FAMILIES for name, stages in family.operators.items()}
PRODUCTS_BY_SHAPE = "aten::mm", "two_four_matmul"

# Of what no operator of ours launched, the stage: the first whose expression is found in a kernel's name.
KERNELS = (
    ("router", r"(?i)sort|argmax"),
    ("permutation", r"(?i)index_?select|gather|index_elementwise|fused_index"),
)
CUBLAS = re.compile(r"(?i)nvjet|gemm|cutlass|cublas|xmma|splitk")


def checked(name: str, prepared: Weights, peers: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """As `check`, and print what came of it."""
    torch._dynamo.reset()  # else the graphs of one contender count against the next one's limit
    sparsity = CONTENDERS[name][1]
    result = check(sparsity, prepared, peers.get("dense_float8" if sparsity.fp8 else "dense"), compiled)
    hidden_dim, dim = prepared.w1.shape
    numbers = ", ".join(f"{key} {error:.1e}" for key, error in result["errors"].items())
    verdict = f"FAILED: {'; '.join(result['failed'])}" if result["failed"] else "right"
    print(f"{name}, d = {dim}, f = {hidden_dim}: {verdict} (errors {numbers}; kept {result['kept']:.5f})", flush=True)
    return result


# ---- how fast is it


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of a call, the mean of STEPS in a row after one that is not timed."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        return (time.perf_counter() - start) * 1e3 / STEPS
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(STEPS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call needs at its peak beyond those allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def waits_for_device(call: Callable[[], Any]) -> str:
    """What makes the host wait for the device during a call; empty if nothing does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


class Captured(NamedTuple):
    """A step as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    tensors: tuple[Any, ...]  # what it reads and writes, which must live as long
    error: float  # of its outputs on new inputs, the largest relative one


def capture(sparsity: FeedForwardSparsity, weights: Weights, tokens: int) -> Captured | str:
    """Capture a step and replay it on new inputs; or why it cannot be captured.

    The leaves are new ones that this stream alone has seen: autograd ties a leaf's gradient to the stream of its first
    step, and a capture must not wait for another.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        w1, w2 = (nn.Parameter(weight.detach().clone()) for weight in (weights.w1, weights.w2))
        module = build(sparsity, weights._replace(w1=w1, w2=w2))
        x = torch.randn(tokens, w1.shape[1], device=w1.device).bfloat16().requires_grad_()
        dy = torch.randn_like(x)
        step(module, x, dy)
        try:
            with torch.cuda.graph(graph, stream=stream):
                outputs = step(module, x, dy)
        except RuntimeError as refusal:
            return str(refusal).splitlines()[0]
        with torch.no_grad():
            x.normal_()
        graph.replay()
        errors = [relative_error(*pair) for pair in zip(outputs, step(module, x, dy), strict=True)]
        error = float(torch.tensor(errors).max())  # NaN if one is: Python's max() may pass over it
    torch.cuda.current_stream().wait_stream(stream)
    return Captured(graph, (module, x, dy, outputs), error)


def product_of(op: dict[str, Any], forward: int, tokens: int, dim: int, hidden_dim: int) -> str:
    """Which of the six products an operator of PRODUCTS_BY_SHAPE in the trace is, or "router" or "selection".

    Args:
        op: the trace's event.
        forward: thread that ran the forward pass.
        tokens: of a step; a product (1) of fewer is one to choose by.
    """
    (rows, _), (inner, columns) = op["args"]["Input Dims"][:2]
    if op["name"] != "aten::mm":  # by a packed matrix: of a weight, which reduces over d, or of h or dy1
        return ("(1)", "(2)", "(3)", "(5)")[2 * (op["tid"] != forward) + (inner == hidden_dim)]
    if op["args"]["Input Strides"][0][0] == 1:  # the left operand is transposed: reduces over tokens
        return "(4)" if rows == dim else "(6)"
    if {inner, columns} != {dim, hidden_dim}:
        return "router"
    if inner == dim:
        return "(3)" if op["tid"] != forward else "(1)" if rows == tokens else "selection"
    return "(2)" if op["tid"] == forward else "(5)"


def stages_of(trace: list[dict[str, Any]], tokens: int, dim: int, hidden_dim: int, reference: bool) -> dict[str, float]:
    """Milliseconds on the device by stage, of a step; see STAGES in scripts/plot_kernels.py.

    Args:
        trace: events of a Chrome trace of PROFILED steps, with shapes.
        reference: the contender runs PyTorch's kernels, whose names tell no stage.
    """
    ops = sorted((event for event in trace if event.get("cat") == "cpu_op"), key=lambda op: op["ts"])
    forward = ops[0]["tid"] if ops else 0
    calls: dict[str, int] = {}
    within = {op["tid"]: (0.0, "") for op in ops}  # by thread: the operator that runs, its end and its stage
    operators: dict[int, str] = {}
    for op in ops:
        name, thread = op["name"].removeprefix("sparsetitan::"), op["tid"]
        end, stage = within[thread]
        if op["ts"] >= end:
            stage = ""
            if name in OPERATORS:
                turns = OPERATORS[name][thread != forward]
                calls[name] = calls.get(name, -1) + 1
                stage = turns[calls[name] % len(turns)]
                within[thread] = (op["ts"] + op["dur"], stage)
            elif name in PRODUCTS_BY_SHAPE and "Input Dims" in op["args"]:
                stage = product_of(op, forward, tokens, dim, hidden_dim)
                within[thread] = (op["ts"] + op["dur"], stage)
        if stage:
            operators[op["args"]["External id"]] = stage
    stages: dict[str, float] = {}
    for event in trace:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name, stage = event["name"], operators.get(event["args"].get("External id"), "")
        if stage:
            pass
        elif CUBLAS.search(name) and not name.startswith("triton"):
            stage = "products"
        else:
            stage = next((stage for stage, names in KERNELS if not reference and re.search(names, name)), "other")
        stages[stage] = stages.get(stage, 0.0) + event["dur"] / 1e3 / PROFILED
    return stages


def profiled_stages(
    call: Callable[[], Any], tokens: int, dim: int, hidden_dim: int, reference: bool
) -> dict[str, float]:
    """Where the time of a step goes, see `stages_of`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_bytes())["traceEvents"]
    return stages_of(trace, tokens, dim, hidden_dim, reference)


def measure(names: list[str], tokens: int, weights: Weights) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Time contenders that are right, `dense` among them.

    Returns:
        by contender: ms (median), rounds (ms of each), spread (slowest less fastest round, over the median), speedup,
        and on a GPU peak_bytes, waits, replay_error, stages (ms), products (tflops, of_cublas), and where a step can be
        captured graph_ms, graph_rounds, graph_speedup: the same of its replays.
        cuBLAS's dense products: TFLOP/s by product.
    """
    (hidden_dim, dim), device = weights.w1.shape, weights.w1.device
    x = torch.randn(tokens, dim, device=device).bfloat16().requires_grad_()
    dy = torch.randn(tokens, dim, device=device).bfloat16()
    torch._dynamo.reset()
    modules = {name: build(CONTENDERS[name][1], weights) for name in names}
    calls: dict[str, Callable[[], Any]] = {name: partial(step, modules[name], x, dy) for name in names}
    with torch.no_grad():
        h = hidden_activations(x, weights.w1)
    left, right = (x, h, dy, dy.T, h, h.T), (weights.w1.T, weights.w2.T, weights.w2, h, weights.w1, x)
    for product, a, b in zip(PRODUCTS, left, right, strict=True):
        calls[product] = partial(torch.mm, a.detach(), b.detach())
    for call in calls.values():
        call()
    captured: dict[str, Captured | str] = {}
    if device.type == "cuda":
        captured = {name: capture(CONTENDERS[name][1], weights, tokens) for name in names}
    replays = {name: one.graph.replay for name, one in captured.items() if isinstance(one, Captured)}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    graph_rounds: dict[str, list[float]] = {name: [] for name in replays}
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(milliseconds(call, device))
            if name in replays:
                graph_rounds[name].append(milliseconds(replays[name], device))
    gc.enable()
    median = {name: statistics.median(times) for name, times in rounds.items()}
    graph_median = {name: statistics.median(times) for name, times in graph_rounds.items()}
    gflop = 2e-9 * tokens * dim * hidden_dim
    cublas = {product: gflop / median[product] for product in PRODUCTS}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        result = results[name] = {
            "ms": median[name],
            "rounds": rounds[name],
            "spread": (max(rounds[name]) - min(rounds[name])) / median[name],
            "speedup": median["dense"] / median[name],
        }
        if device.type != "cuda":
            continue
        call, family = calls[name], implementation(name, dim, hidden_dim, device)[0]
        cost = Cost() if family is None else family.cost(CONTENDERS[name][1], Shape(dim, hidden_dim, tokens))
        reference = family is MASKED
        result["peak_bytes"] = peak_memory(call)
        result["waits"] = waits_for_device(call)
        result["stages"] = stages = profiled_stages(call, tokens, dim, hidden_dim, reference)
        one = captured[name]
        result["replay_error"] = one.error if isinstance(one, Captured) else one
        if name in replays and "dense" in replays:
            result["graph_ms"], result["graph_rounds"] = graph_median[name], graph_rounds[name]
            result["graph_speedup"] = graph_median["dense"] / graph_median[name]
        result["products"] = {}
        for product, share in zip(PRODUCTS, cost.products, strict=True):
            if product in stages and not reference:
                rate = gflop * share / stages[product]
                result["products"][product] = {"tflops": rate, "of_cublas": rate / cublas[product]}
    return results, cublas


# ---- what is shown


def implementation(name: str, dim: int, hidden_dim: int, device: torch.device) -> tuple[Family | None, str]:
    """The family that runs a contender, and why; None for dense."""
    if name in PEERS:
        return None, "nothing sparse"
    return explain(CONTENDERS[name][1], Shape(dim, hidden_dim), device, torch.bfloat16)


def text_table(shape: dict[str, Any]) -> str:
    """The timed contenders of a shape for the terminal, at most 120 columns."""
    timed = {name: entry for name, entry in shape["contenders"].items() if "ms" in entry}
    head = f"{'':<21}{'runs':<11}{'ms':>8}{'spread':>8}{'speed-up':>10}{'replayed':>10}{'speed-up':>10}{'peak GiB':>10}"
    lines = [head + "  host waits  replay"]
    for name, entry in timed.items():
        line = f"{name:<21}{entry['backend']:<11}{entry['ms']:>8.2f}{entry['spread']:>8.1%}{entry['speedup']:>9.2f}x"
        if "stages" in entry:
            graph = (
                (f"{entry['graph_ms']:.2f}", f"{entry['graph_speedup']:.2f}x") if "graph_ms" in entry else ("-", "-")
            )
            line += "".join(f"{cell:>10}" for cell in graph)
            error = entry["replay_error"]
            replay = error if isinstance(error, str) else f"differs by {error:.0e}" if error else "equal"
            line += f"{entry['peak_bytes'] / 2**30:>10.2f}  {'YES' if entry['waits'] else 'no':<10}  {replay}"
        lines.append(line[:120])
    profiled = {name: entry for name, entry in timed.items() if "stages" in entry}
    if not profiled:
        return "\n".join(lines)
    stages = [stage for stage in STAGES if any(stage in entry["stages"] for entry in profiled.values())]
    widths = [max(8, len(stage) + 2) for stage in stages]
    pairs = list(zip(stages, widths, strict=True))
    lines.append(f"\n{'ms of a step':<20}" + "".join(f"{stage:>{width}}" for stage, width in pairs))
    for name, entry in profiled.items():
        lines.append(f"{name:<21}" + "".join(f"{entry['stages'].get(stage, 0):>{width}.2f}" for stage, width in pairs))
    lines.append(f"\n{'TFLOP/s, of cuBLAS':<20}" + "".join(f"{product:>12}" for product in PRODUCTS))
    for name, entry in profiled.items():
        rates = [entry["products"].get(product) for product in PRODUCTS]
        cells = [f"{rate['tflops']:.0f} {rate['of_cublas']:>4.0%}" if rate else "-" for rate in rates]
        lines.append(f"{name:<21}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(f"{'cuBLAS alone':<20}" + "".join(f"{shape['cublas'][product]:>12.0f}" for product in PRODUCTS))
    return "\n".join(lines)


def output_of(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def benchmark(
    names: list[str], shapes: list[tuple[int, int]], tokens: int, references: bool, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Check, time and print.

    Args:
        names: contenders, `dense` first.
        shapes: (d, f).
        references: run contenders without kernels, too.

    Yields:
        for every shape: dim, hidden_dim, cublas, and contenders, by name: backend, reason, what `measure` gives of
        those that are right, checks, what `check` gives at the small shape and at this.
    """
    runs = {name: implementation(name, *shapes[0], device) for name in names}
    for name, (chosen, reason) in runs.items():
        if chosen is MASKED and not references:
            print(f"{name}: skipped, runs on the reference ({reason})")
    names = [name for name, (chosen, _) in runs.items() if chosen is not MASKED or references]
    prepared = prepared_weights(*SMALL, device)
    small: dict[str, dict[str, Any]] = {}
    for name in names:
        small[name] = checked(name, prepared, small, compiled=True)
    for dim, hidden_dim in shapes:
        prepared = prepared_weights(dim, hidden_dim, device)
        large: dict[str, dict[str, Any]] = {}
        for name in names:
            large[name] = checked(name, prepared, large, compiled=False)
        right = [name for name in names if not small[name]["failed"] + large[name]["failed"]]
        timed, cublas = measure(right, tokens, prepared) if "dense" in right else ({}, {})
        entries = {
            name: {"backend": "cuBLAS" if chosen is None else chosen.name, "reason": reason}
            for name, (chosen, reason) in runs.items()
        }
        for name in names:
            entries[name] |= {"checks": [small[name], large[name]]} | timed.get(name, {})
        result = {"dim": dim, "hidden_dim": hidden_dim, "cublas": cublas, "contenders": entries}
        print(f"\nd = {dim}, f = {hidden_dim}, {tokens} tokens\n{text_table(result)}", flush=True)
        yield result


def parse_shape(text: str) -> tuple[int, int]:
    """`4096x16384` as (d, f)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    dim, hidden_dim = (int(match[1]), int(match[2])) if match else (0, 0)
    if not dim or dim % 64 or not hidden_dim or hidden_dim % CLUSTER or hidden_dim // CLUSTER > dim:
        raise ConfigError(
            f"--shapes {text}: give d x f, such as {SHAPES[0]}, with d a multiple of 64 and f one of {CLUSTER}"
        )
    return dim, hidden_dim


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m scripts.benchmark_kernels", description=__doc__.split("\n")[0], epilog=TERMS)
    add_out(parser, "FOLDER", "default: docs/kernels", default=Path("docs/kernels"))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="DxF", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], help="default: all", metavar="NAME")
    parser.add_argument("--tokens", type=int, default=16384, metavar="T", help="default: 16384")
    parser.add_argument("--references", action="store_true", help="time contenders without kernels, too")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a new one")
    options = parser.parse_args(arguments)
    shapes = [parse_shape(text) for text in options.shapes]
    for name in options.contenders:
        if name not in CONTENDERS:
            raise ConfigError(f"--contenders {name}: no such contender; there are {', '.join(CONTENDERS)}")
    if options.tokens < 16 or options.tokens % 16:
        raise ConfigError(f"--tokens {options.tokens}: give a multiple of 16")
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device: the benchmark measures a GPU, run it on a machine that has one")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {options.out}: cannot be made ({error.strerror}); name another folder") from None
    seed = random.randrange(2**31) if options.seed is None else options.seed
    torch.manual_seed(seed)
    torch._dynamo.config.recompile_limit = 2 * len(CONTENDERS)  # all contenders are one code object
    device = torch.device("cuda")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader") or "unknown"
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "scripts.benchmark_kernels", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"device": torch.cuda.get_device_name(device), "driver, power limit": driver.splitlines()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "seed": seed,
        "tokens": options.tokens,
    }
    print(json.dumps(result, indent=2))
    peers = PEERS if any(CONTENDERS[name][1].fp8 for name in options.contenders) else PEERS[:1]
    names = list(dict.fromkeys([*peers, *options.contenders]))
    result["contenders"] = {name: CONTENDERS[name][0] for name in names}
    result["shapes"] = []
    for shape in benchmark(names, shapes, options.tokens, options.references, device):
        result["shapes"].append(shape)
        (options.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    checks = [c for shape in result["shapes"] for e in shape["contenders"].values() for c in e.get("checks", [])]
    if any("ms" in entry for shape in result["shapes"] for entry in shape["contenders"].values()):
        save(options.out / "kernels.json")
    return int(any(check["failed"] for check in checks))


if __name__ == "__main__":
    run_program(main)
