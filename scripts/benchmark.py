"""Time whole training steps: a sparse step against a dense one, and against what else a user could run.

    python -m scripts.benchmark --config configs/7b_slice.toml --out docs/training/7b_slice
    python -m scripts.benchmark --config configs/1b.toml --contenders dense groups_quarter --training.local_batch_size 2

A contender is a process of train.py, or of torchtitan's own trainer (scripts/titan_baseline.py). All contenders read
the same batches, and every other key of train.py that is given applies to all of them: depth (--model.n_layers), the
layout on several GPUs (--gpus and --parallelism.*). A run with a sparse phase takes 10 dense, 20 sparse and 30 dense
steps; a run without one takes 30 steps. A step has one micro-batch, unless --training.global_batch_size is given. The
contenders run one after the other, and all of them `--rounds` times.

The time of a step is measured over windows of five steps; the result is the median of the windows of all rounds.
Windows in which a phase began, graphs were compiled, or the profiler ran or wrote its trace are left out.
A contender whose loss does not fall by 0.2 gets no time. `--brief N` is for steps of a large model: windows of N steps,
three dense ones and then, with a sparse phase, three sparse ones; no trace.

A sparse step is compared with a step of the contender `dense`, which is what a user would run instead. Without that
contender it is compared with the run's own dense steps, which may be slower: an H100 was seen to run dense steps 4%
slower after 2:4 products in the same process. "Whole run" is the time of as many `dense` steps over that of the
recipe's own dense and sparse steps. A trace of one step in each mode says where its time goes: kernels are counted by
the operator that launched them, a matrix product by its shapes; `idle` is the rest of the step.
"""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from configs.errors import ConfigError, run_program
from configs.loader import load_config
from configs.repository import ROOT, commit
from configs.schema import JobConfig
from models.llama import LlamaArgs
from recipes.atomic import write_atomically
from recipes.check import check_config
from recipes.data import check_data, data_parallel_ranks, num_rows
from recipes.pipeline import micro_batch_size
from scripts.options import TERMS, Parser, add_out
from scripts.pictures import GREY, PALETTE, STYLE, save
from scripts.runs import mean_step, read_lines

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = PALETTE


@dataclass(frozen=True)
class Contender:
    about: str
    keys: dict[str, str]
    """Keys of train.py that only this contender gets."""

    program: tuple[str, ...] = ("train.py",)
    """What Python runs."""


def _recipe(name: str, about: str, keys: dict[str, str] | None = None) -> Contender:
    return Contender(about, {"recipe": f"recipes/{name}.toml"} | (keys or {}))


def _torchtitan(model: str, about: str) -> Contender:
    return Contender(about, {"recipe": "recipes/dense.toml", "model.name": model}, ("-m", "scripts.titan_baseline"))


FIRST_2OF4 = {"weights.pattern": "2:4", "weights.products": "[1]"}
# torchtitan's converter scales each tensor by its own maximum, in every step, unless a recipe of torchao's is named.
FLOAT8_TENSORWISE = {"model.converters": '["quantize.linear.float8"]'}
FLOAT8_FFN = FLOAT8_TENSORWISE | {"quantize.linear.float8.filter_fqns": '["attention", "output"]'}
BY_ALL = FLOAT8_FFN | {"activations.sample": "1"}
FLOAT8 = FLOAT8_TENSORWISE | {"quantize.linear.float8.recipe_name": "rowwise"}

CONTENDERS = {
    "torchtitan_swiglu": _torchtitan("llama_swiglu", "torchtitan's trainer and Llama, SwiGLU"),
    "torchtitan_relu2": _torchtitan("llama_relu2", "torchtitan's trainer, squared ReLU"),
    "dense": _recipe("dense", "squared ReLU, dense"),
    "float8": _recipe("dense", "the same in torchao's row-wise float8", FLOAT8),
    "float8_tensorwise": _recipe("dense", "the same in torchao's tensor-wise float8", FLOAT8_TENSORWISE),
    "float8_ffn": _recipe("dense", "the same, float8 in the FFNs alone", FLOAT8_FFN),
    "weights_2of4": _recipe("weights_2of4", "2:4 weights in (1) and (3)"),
    "activations_2of4": _recipe("activations_2of4", "2:4 activations, along tokens too"),
    "venom_4of16": _recipe("venom_4of16", "4 of 16 neurons"),
    "venom_2of16": _recipe("venom_2of16", "2 of 16, 2:4 W1"),
    "groups_quarter": _recipe("groups_quarter", "a quarter of the groups"),
    "groups_eighth": _recipe("groups_eighth", "an eighth of the groups"),
    "columns_half": _recipe("columns_half", "half of the neurons, blocks of 1024"),
    "columns_quarter": _recipe("columns_quarter", "a quarter of the neurons, blocks of 1024"),
    "columns_eighth": _recipe("columns_eighth", "an eighth of the neurons, blocks of 1024"),
    "groups_quarter_2of4": _recipe("groups_quarter", "a quarter, and 2:4 W1", FIRST_2OF4),
    "groups_eighth_2of4": _recipe("groups_eighth", "an eighth, and 2:4 W1", FIRST_2OF4),
    "columns_half_fp8": _recipe("columns_half_fp8", "half in fp8, dense FFNs in float8", FLOAT8_FFN),
    "columns_quarter_fp8": _recipe("columns_quarter_fp8", "quarter in fp8, dense FFNs in float8", FLOAT8_FFN),
    "columns_eighth_fp8": _recipe("columns_eighth_fp8", "eighth in fp8, dense FFNs in float8", FLOAT8_FFN),
    "columns_quarter_fp8_all": _recipe("columns_quarter_fp8", "the quarter, chosen by all tokens", BY_ALL),
    "columns_eighth_float8": _recipe("columns_eighth", "an eighth, and row-wise float8 elsewhere", FLOAT8),
}

OUTPUTS = ROOT / "outputs" / "benchmark"  # the runs' folders
BENCHMARK_KEYS = {  # keys of train.py that the benchmark sets for all contenders
    "metrics.enable_tensorboard": "false",
    "validation.enable": "false",
    "checkpoint.enable": "false",
}
DEGREES = (
    *("data_parallel_replicate_degree", "data_parallel_shard_degree", "context_parallel_degree"),
    *("tensor_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree"),
)


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
        window: steps between two rows of metrics.jsonl.
        modes: of the windows of a run with a sparse phase, (mode, number) in turn.
        dense: windows of a run without a sparse phase.
        profiled: every so many steps one is traced; 0: none.
    """

    window: int
    modes: tuple[tuple[str, int], ...]
    dense: int
    profiled: int

    def steps(self, mode: str) -> int:
        """Of a run with a sparse phase, or of a dense one."""
        return self.window * (sum(number for _, number in self.modes) if mode == "sparse" else self.dense)

    def traced(self, mode: str) -> list[tuple[str, int]]:
        """The steps of such a run that are traced, with their modes."""
        windows = self.modes if mode == "sparse" else (("dense", self.dense),)
        modes = [each for each, number in windows for _ in range(number)]
        steps = range(self.profiled, self.steps(mode) + 1, self.profiled) if self.profiled else ()
        return [(modes[step // self.window - 1], step) for step in steps]

    def keys(self, mode: str) -> dict[str, str]:
        """train.py's keys for such a run."""
        keys = {
            "metrics.log_freq": str(self.window),
            "lr_scheduler.warmup_steps": str(2 * self.window),
            "training.steps": str(self.steps(mode)),
        }
        if mode == "sparse":
            ends = accumulate(self.window * number for _, number in self.modes)
            phases = [f'{{mode = "{mode}", end = {end}}}' for (mode, _), end in zip(self.modes, ends, strict=True)]
            keys["schedule.phases"] = f"[{', '.join(phases)}]"
        if self.profiled and torch.cuda.is_available():
            keys |= {"profiling.enable_profiling": "true", "profiling.profile_freq": str(self.profiled)}
        return keys


# Step 30 is traced, the last sparse one; in a run with a sparse phase step 60 as well, a dense one.
FULL = Plan(5, (("dense", 2), ("sparse", 4), ("dense", 6)), 6, 30)


def brief(window: int) -> Plan:
    """The plan of `--brief`: of three windows each mode's first one allocates or compiles."""
    return Plan(window, (("dense", 3), ("sparse", 3)), 3, 0)


MIN_LOSS_FALL = 0.2  # nats a token

# Where a step's time goes, and the colours of the parts.
PARTS = {
    "FFN": VERMILION,
    "attention": BLUE,
    "projections": SKY,
    "head and loss": GREEN,
    "optimizer": PURPLE,
    "communication": ORANGE,
    "other": "#C4C4C4",
    "idle": "#EEEEEE",
}


def part_of(op: str, shapes: list[list[int]], kernel: str, tokens: int, args: LlamaArgs) -> str:
    """Which of PARTS a kernel belongs to.

    Args:
        op: the operator that launched it, or the name of a compiled graph's kernel.
        shapes: of the operator's tensors.
        kernel: its own name.
        tokens: in a micro-batch.
        args: the model's arguments, with its vocabulary.
    """
    # FSDP copies to and from its buffers by foreach operators, as the optimizer does its updates.
    if "nccl" in kernel or op.startswith(("c10d::", "fsdp::", "aten::_foreach_copy_")):
        return "communication"
    # Blocks of tokens times the neurons that they keep, and dense experts; attention has its own kernels.
    if op in ("aten::bmm", "aten::_grouped_mm"):
        return "FFN"
    if "mm" in op and len(shapes) > 1:
        sizes = [*shapes[0], shapes[1][1]]
        if tokens in sizes[:2]:
            sizes.remove(tokens)  # leaves the sizes of the weight; the FFN may be as wide as there are tokens
        if args.vocab_size in sizes:
            return "head and loss"
        # torchtitan's SwiGLU takes two thirds of the width, rounded up.
        swiglu = -(-int(2 * args.hidden_dim / 3) // args.multiple_of) * args.multiple_of
        return "FFN" if {args.hidden_dim, swiglu} & set(sizes) else "projections"
    for part, pattern in (
        ("FFN", r"sparsetitan::|relu|silu|sigmoid|groups_|venom_|two_four|argmax|sort"),
        ("attention", r"attention|flash|fmha|sdpa"),
        ("head and loss", r"softmax|nll|cross_entropy"),
        ("optimizer", r"adam|_foreach|multi_tensor"),
    ):
        if re.search(pattern, op) or re.search(pattern, kernel):
            return part
    return "other"


def parts_of(trace: list[dict[str, Any]], tokens: int, args: LlamaArgs) -> dict[str, float]:
    """Milliseconds of a step by part, from the events of a Chrome trace of one step with shapes; see `part_of`.

    The host runs ahead of the GPU, so a trace begins with kernels of the step before. Kernels that were not launched
    within the trace are left out.
    """
    ops = {event["args"].get("External id"): event for event in trace if event.get("cat") == "cpu_op"}
    launched = {event["args"]["correlation"] for event in trace if event.get("cat") in ("cuda_runtime", "cuda_driver")}
    kernels = [event for event in trace if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [event for event in kernels if event["args"]["correlation"] in launched]
    parts: Counter[str] = Counter()
    busy = end = 0.0
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        op = ops.get(kernel["args"].get("External id"), {"name": "", "args": {}})
        shapes = [shape for shape in op["args"].get("Input Dims", []) if shape and isinstance(shape[0], int)]
        parts[part_of(op["name"], shapes, kernel["name"], tokens, args)] += kernel["dur"] / 1e3
        # Kernels on several streams overlap; time in which two run counts once.
        busy += max(0.0, kernel["ts"] + kernel["dur"] - max(end, kernel["ts"])) / 1e3
        end = max(end, kernel["ts"] + kernel["dur"])
    if kernels:
        parts["idle"] = (end - min(kernel["ts"] for kernel in kernels)) / 1e3 - busy
    return {part: parts[part] for part in PARTS if part in parts}


def titan_rows(log: str, tokens: int) -> list[dict[str, Any]]:
    """torchtitan's console lines as rows of metrics.jsonl."""
    line = re.compile(r"step: *(\d+) .*loss: *([\d.]+|nan) .*memory: *([\d.]+)GiB.*tps: *([\d,]+)")
    rows = []
    for match in line.finditer(re.sub(r"\x1b\[[\d;]*m", "", log)):
        step, loss, memory, rate = match.groups()
        seconds = tokens / float(rate.replace(",", ""))
        row = {"step": int(step), "phase": "dense", "loss": float(loss), "step_seconds": seconds}
        rows.append(row | {"peak_memory_gib": float(memory), "switch_seconds": 0.0, "graphs_compiled": 0})
    return rows


def measured(rows: list[dict[str, Any]], plan: Plan = FULL) -> dict[str, Any]:
    """The measurements of one run of a plan. The module docstring says which windows count.

    Returns:
        seconds: by mode, seconds of a step in each window. peak_gib: by mode, memory of the process, which does not
        shrink after a phase that needed more. active_gib: by mode, memory of tensors. switch_seconds: time to enter
        the sparse phase. graphs: number of compiled graphs by step. losses: first and last.
    """
    seconds: dict[str, list[float]] = {}
    peak: dict[str, float] = {}
    active: dict[str, float] = {}
    phase = None
    for row in rows:
        mode, step = row["phase"], row["step"]
        begins, phase = mode != phase, mode
        peak[mode] = max(peak.get(mode, 0.0), row["peak_memory_gib"])
        if "peak_active_gib" in row:
            active[mode] = max(active.get(mode, 0.0), row["peak_active_gib"])
        # The profiler warms up in the window before a trace, and the trace is written in the window after it.
        traced = plan.profiled and step % plan.profiled in (0, plan.window)
        # A phase's first window allocates memory, also where it compiles nothing.
        if step > plan.window and not begins and not traced and not row["graphs_compiled"]:
            seconds.setdefault(mode, []).append(row["step_seconds"])
    return {
        "seconds": seconds,
        "peak_gib": peak,
        "active_gib": active,
        "switch_seconds": max(row["switch_seconds"] for row in rows),
        "graphs": {row["step"]: row["graphs_compiled"] for row in rows if row["graphs_compiled"]},
        "losses": [rows[0]["loss"], rows[-1]["loss"]],
    }


def _words(keys: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


class Turn:
    """One run of a contender.

    Args:
        name: the contender's.
        common: keys of train.py and their values, for all contenders.
        folder: the run's dump folder.
        gpus: number of processes, one GPU each.
        plan: its steps.
    """

    def __init__(self, name: str, common: dict[str, str], folder: Path, gpus: int, plan: Plan) -> None:
        self.name, self.folder, self.gpus, self.plan = name, folder, gpus, plan
        self.program = CONTENDERS[name].program
        keys = common | CONTENDERS[name].keys
        config, _ = load_config(_words(keys))
        self.args, spans = check_config(config, gpus)
        self.sparse_share = sum(span.stop - span.start for span in spans if span.mode == "sparse") / spans[-1].stop
        self.mode = "sparse" if self.sparse_share else "dense"
        own = BENCHMARK_KEYS | plan.keys(self.mode) | {"job.dump_folder": str(folder)}
        if twice := sorted(keys.keys() & own.keys()):
            raise ConfigError(f"--{twice[0]} is the benchmark's to set: leave it out")
        self.words = _words(keys | own)
        self.config: JobConfig = load_config(self.words)[0]
        check_config(self.config, gpus)
        check_data(self.config)
        training, parallelism = self.config.training, self.config.parallelism
        tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
        self.sequences = num_rows(self.config, data_parallel_ranks(self.config, gpus))  # of a step, on all GPUs
        # Of a micro-batch on one GPU, by which parts of a trace are told apart, as by the widths of a GPU's shard.
        sizes = {mode: micro_batch_size(self.config, mode == "sparse") for mode in ("dense", "sparse")}
        self.micro_tokens = {mode: size * training.seq_len // context for mode, size in sizes.items()}
        self.args.hidden_dim //= tensor

    def run(self) -> dict[str, Any]:
        """Run it.

        Returns:
            the entries of `measured`; tokens: of a step, all GPUs; parts: by mode, see `parts_of`; about: entries of
            run.json; failed: why the times do not count, or "".
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable]
        if self.gpus > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.gpus}"]
        log = self.folder / "log.txt"
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run ends with this process
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *self.program, *self.words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            try:
                process.wait()
            except KeyboardInterrupt:
                process.terminate()  # torchrun passes it on to its processes
                process.wait()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        if process.returncode:
            tail = log.read_text(errors="replace").splitlines()[-1:]
            return {"failed": f"status {process.returncode}, see {log}: {' '.join(tail)[:200]}"}
        tokens = self.config.training.seq_len * self.sequences
        tensor = self.config.parallelism.tensor_parallel_degree
        about: dict[str, Any] = {}
        if self.program == ("train.py",):
            rows = read_lines(self.folder / "metrics.jsonl")
            run = json.loads((self.folder / "run.json").read_bytes())
            about = {key: run[key] for key in ("parameters", "vocabulary", "backend", "flops_per_token", "peak_flops")}
            self.args.vocab_size = run["vocabulary"] // tensor
        else:
            rows = titan_rows(log.read_text(), tokens // self.gpus)
            self.args.vocab_size = self.config.tokenizer.vocab_size // tensor
        result = measured(rows, self.plan) | {"tokens": tokens, "about": about, "parts": {}, "failed": ""}
        for mode, step in self.plan.traced(self.mode):
            for trace in self.folder.glob(f"profile_traces/iteration_{step}/rank0_trace.json"):
                events = json.loads(trace.read_bytes())["traceEvents"]
                result["parts"][mode] = parts_of(events, self.micro_tokens[mode], self.args)
        first, last = result["losses"]
        if not last < first - MIN_LOSS_FALL:
            result["failed"] = f"the loss does not fall: {first:.3f}, then {last:.3f}"
        return result


def combined(turns: list[dict[str, Any]], sparse_share: float) -> dict[str, Any]:
    """All rounds of a contender as one entry.

    Args:
        turns: results of `Turn.run`.
        sparse_share: share of the recipe's steps that are sparse.

    Returns:
        failed: why the times do not count, or ""; and if it is "": ms and tokens_per_second by mode (medians), rounds
        (all windows, ms), sparse_share, and the last round's memory, parts, switch, graphs and losses.
    """
    failed = "; ".join(dict.fromkeys(turn["failed"] for turn in turns if turn["failed"]))
    if failed:
        return {"failed": failed}
    last = turns[-1]
    modes = ("dense", "sparse") if sparse_share else ("dense",)
    windows = {mode: [1e3 * s for turn in turns for s in turn["seconds"].get(mode, ())] for mode in modes}
    if empty := [mode for mode in modes if not windows[mode]]:
        graphs = ", ".join(f"{count} by step {step}" for step, count in last["graphs"].items())
        return {"failed": f"graphs were compiled in all windows of {empty[0]} steps ({graphs}): use a larger --brief"}
    ms = {mode: statistics.median(times) for mode, times in windows.items()}
    entry: dict[str, Any] = {
        "failed": "",
        "ms": ms,
        "rounds": windows,
        "tokens_per_second": {mode: 1e3 * last["tokens"] / time for mode, time in ms.items()},
        "sparse_share": sparse_share,
    }
    kept = ("peak_gib", "active_gib", "parts", "switch_seconds", "graphs", "losses", "tokens", "about")
    return entry | {key: last[key] for key in kept}


def compare(contenders: dict[str, dict[str, Any]]) -> None:
    """Add to each entry with sparse steps: speedup (a dense step over the sparse one) and whole (all steps dense over
    the recipe's); see the module docstring.
    """
    dense = contenders.get("dense", {}).get("ms", {}).get("dense")
    for entry in contenders.values():
        if "sparse" in entry.get("ms", {}):
            own, sparse, share = entry["ms"]["dense"], entry["ms"]["sparse"], entry["sparse_share"]
            base = dense or own
            entry |= {"speedup": base / sparse, "whole": base / mean_step(own, sparse, share)}


def text_table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = [
        f"{'':<22}{'dense ms':>10}{'sparse ms':>11}{'tokens/s':>10}{'over dense':>14}{'whole run':>11}"
        f"{'peak GiB':>10}{'active':>8}  backend"
    ]
    for name, entry in result["contenders"].items():
        if entry["failed"]:
            lines.append(f"{name:<22}{entry['failed']}"[:120])
            continue
        mode = "sparse" if "sparse" in entry["ms"] else "dense"
        line = f"{name:<22}{entry['ms']['dense']:>10.1f}"
        line += f"{entry['ms']['sparse']:>11.1f}" if mode == "sparse" else f"{'-':>11}"
        line += f"{entry['tokens_per_second'][mode]:>10,.0f}"
        line += f"{entry['speedup']:>13.2f}x{entry['whole']:>10.2f}x" if mode == "sparse" else f"{'-':>14}{'-':>11}"
        active = f"{entry['active_gib'][mode]:.1f}" if mode in entry["active_gib"] else "-"
        line += f"{entry['peak_gib'][mode]:>10.1f}{active:>8}  {entry['about'].get('backend', {}).get('name', '')}"
        lines.append(line)
    return "\n".join(lines)


def draw(file: Path) -> Path:
    """Draw a training.json into a PNG beside it, and return where it was written.

    A bar a contender and mode: a step's milliseconds by part, or in one colour where no trace tells them apart.
    """
    result = json.loads(file.read_text())
    bars = []
    for name, entry in result["contenders"].items():
        if not entry["failed"]:
            bars += [(name, mode, entry) for mode in ("dense", "sparse") if mode in entry["ms"] and _shown(entry, mode)]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.2 + 0.36 * len(bars)), layout="constrained", dpi=150)
        axes = figure.subplots()
        for place, (_, mode, entry) in enumerate(bars):
            left, parts = 0.0, entry["parts"].get(mode, {})
            # The parts are of one step under the profiler: scale them to the time that was measured without it.
            scale = entry["ms"][mode] / sum(parts.values()) if parts else 1.0
            for part, time in (parts or {"other": entry["ms"][mode]}).items():
                axes.barh(place, scale * time, 0.72, left, color=PARTS[part], label=part)
                left += scale * time
            note = f"{left:.0f} ms" + (f", {entry['speedup']:.2f}x" if mode == "sparse" else "")
            axes.annotate(note, (left, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=GREY)
        labels = [f"{name}, {mode}" if "speedup" in entry else name for name, mode, entry in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        against = "dense" if "dense" in result["contenders"] else "the run's own dense steps"
        axes.set_xlabel(f"milliseconds of a training step; x: over {against}")
        handles, names = axes.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        if any(entry["parts"] for _, _, entry in bars):
            figure.legend(
                [unique[part] for part in PARTS if part in unique],
                [part for part in PARTS if part in unique],
                loc="outside upper center",
                ncols=len(PARTS),
                fontsize=9,
            )
        return save(figure, file.with_suffix(".png"), [file])


def _shown(entry: dict[str, Any], mode: str) -> bool:
    """Whether the picture has a bar for this mode: the dense steps of a sparse run are those of `dense` once more."""
    return mode == "sparse" or "sparse" not in entry["ms"]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scripts.benchmark",
        description="Measure training steps. Other keys are train.py's, for all.",
        epilog=TERMS,
    )
    parser.add_argument("--config", required=True, help="the job, such as configs/7b_slice.toml")
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], metavar="NAME", help="default: all")
    parser.add_argument("--brief", type=int, metavar="N", help="windows of N steps, few of them; no trace")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; default: 2")
    parser.add_argument("--gpus", type=int, default=1, help="processes of a run, a GPU each; default: 1")
    add_out(parser, "FOLDER", "for training.json and training.png; default: docs/training/CONFIG")
    arguments = sys.argv[1:] if arguments is None else arguments
    options, given = parser.parse_known_args(arguments)
    for name in options.contenders:
        if name not in CONTENDERS:
            raise ConfigError(f"--contenders {name}: no such contender; there are {', '.join(CONTENDERS)}")
    for name in ("rounds", "gpus", "brief"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name} {number}: give 1 or more")
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if (gpus or cores) < options.gpus:  # without GPUs, a core stands in for one
        has = f"{gpus}" if gpus else f"no GPU, and {cores} cores for as many processes"
        raise ConfigError(f"--gpus {options.gpus}: this machine has {has}")
    words = [word for key in given for word in (key.split("=", 1) if key.startswith("--") else [key])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ConfigError(f"{shlex.join(given)}: give keys of train.py as --key value")
    common = {"config": options.config} | {
        key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)
    }
    common.setdefault("training.global_batch_size", "-1")
    out = options.out or ROOT / "docs" / "training" / Path(options.config).stem
    names = list(dict.fromkeys(options.contenders))
    plan = FULL if options.brief is None else brief(options.brief)
    turns = [
        [Turn(name, common, OUTPUTS / out.name / f"{name}-{turn}", options.gpus, plan) for name in names]
        for turn in range(options.rounds)
    ]
    out.mkdir(parents=True, exist_ok=True)
    summary = describe(turns[0][0], ["python", "-m", "scripts.benchmark", *arguments], options.gpus)
    results: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(turns, 1):
        for turn in row:
            began = time.monotonic()
            try:
                result = turn.run()
            except KeyboardInterrupt:
                kept = f", kept in {out / 'training.json'}" if results else ""
                ended = sum(map(len, results.values()))
                raise KeyboardInterrupt(f"{ended} of {len(names) * len(turns)} runs have ended{kept}") from None
            results.setdefault(turn.name, []).append(result)
            times = {mode: f"{1e3 * statistics.median(s):.1f} ms" for mode, s in result.get("seconds", {}).items()}
            said = result["failed"] or ", ".join(f"{mode} {time}" for mode, time in times.items())
            print(f"round {number}, {turn.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
            about = {"what": CONTENDERS[turn.name].about}
            summary["contenders"][turn.name] = about | combined(results[turn.name], turn.sparse_share)
            compare(summary["contenders"])
            write_atomically(out / "training.json", json.dumps(summary, indent=1) + "\n")
    print(f"\n{text_table(summary)}\n\n{out / 'training.json'}")
    failed = [name for name, entry in summary["contenders"].items() if entry["failed"]]
    if len(failed) < len(names):
        print(draw(out / "training.json"))
    return int(bool(failed))


def describe(turn: Turn, command: list[str], gpus: int) -> dict[str, Any]:
    """The head of training.json: command, commit, date, machine, versions and job, and no contenders yet.

    batch: sequences of a step, by GPU. layout: degrees of parallelism that are not 1; -1: all GPUs that are left.
    """
    config, packages = turn.config, ("torch", "torchtitan", "torchao", "triton")
    return {
        "command": shlex.join(command),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "gpus": gpus},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "model": config.model.flavor,
        "layers": turn.args.n_layers,
        "sequence": config.training.seq_len,
        "batch": turn.sequences / gpus if turn.sequences % gpus else turn.sequences // gpus,
        "layout": {name: degree for name in DEGREES if (degree := getattr(config.parallelism, name)) != 1},
        "dtype": config.training.dtype,
        "window": turn.plan.window,
        "activation_checkpoint": config.activation_checkpoint.mode,
        "compile": config.compile.enable,
        "contenders": {},
    }


if __name__ == "__main__":
    run_program(main)
