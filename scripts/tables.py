"""Tables of runs and measurements, in Markdown or aligned for a terminal: one function for each kind of table."""

import json
import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scripts.law import Evidence, speeds
from scripts.law import read as read_evidence
from scripts.plot_kernels import STAGES
from scripts.runs import (
    Run,
    baseline_losses,
    flops_share,
    is_timed,
    load_groups,
    model_name,
    read_lines,
    rounded,
    seed_of,
    sparse_share,
)


def runs_table(folder: Path, pad: bool = False) -> str:
    """The runs in a folder as a Markdown table, lowest loss first, and a text that names model, data and hardware.

    Runs that differ only in their seed (NAME_s0, NAME_s1, ...) share one row, with means and standard deviations. A
    column that is empty in every row is left out.

    Args:
        folder: has one folder for each run, with metrics.jsonl and run.json. The baseline is the run that is dense
            throughout; if there are several, it is the one named dense.
        pad: write aligned columns for a terminal instead of Markdown; they fit 120 characters if names are short.
    """
    groups, baseline = load_groups(folder)
    runs = [pair for group in groups.values() for pair in group]
    losses = {name: [run.last("val_loss") for run, _ in group] for name, group in groups.items()}
    seeds = {name: sorted(seed_of(about) for _, about in group) for name, group in groups.items()}
    one_seed = len({seed for own in seeds.values() for seed in own}) == 1
    peers = baseline_losses(groups, baseline) if baseline is not None else dict.fromkeys(groups, 0.0)
    over = {name: mean(losses[name]) - peers[name] for name in groups}
    rows = []
    for name in sorted(groups, key=over.__getitem__):
        abouts = [about for _, about in groups[name]]
        sparse = sparse_share(abouts[0])
        energy = [run.last("energy_kept") for run, _ in groups[name] if run.has("energy_kept")]
        difference = "-"
        if baseline is not None:
            difference = f"{over[name]:+.4f} ({100 * over[name] / peers[name]:+.1f}%)"
        timed = [run for run, about in groups[name] if about.get("runs_per_gpu") == 1]
        rates = [[rate for run in timed if (rate := run.rate(mode))] for mode in ("dense", "sparse")]
        row = {
            "run": name if pad else f"`{name}`",
            "seeds": "-" if one_seed else str(len(losses[name])),
            "sparse": f"{100 * sparse:.0f}%",
            "energy kept": _percent(mean(energy) if energy else None),
            "validation loss": f"{mean(losses[name]):.4f}" + _deviation(losses[name]),
            "minus dense": difference,
            "bits/byte": f"{mean([run.last('val_bpb') for run, _ in groups[name]]):.4f}",
            "FLOPs": _flops(abouts[0]),
            "at switches": _jumps(groups[name], groups[baseline]) if baseline is not None and name != baseline else "-",
            "tokens/s": ", ".join(rounded(mean(rate)) if rate else "-" for rate in rates),
            "time": _time(mean([float(run.seconds[-1]) for run in timed])) if timed else "-",
            "reached": _reached(groups[name], groups[baseline]) if baseline is not None and name != baseline else "-",
        }
        if pad:
            del row["energy kept"], row["at switches"]  # would not fit the width of a terminal
        rows.append(row)
    return _table(rows, _ran_on(runs, one_seed, _filled(rows)), pad)


def _filled(rows: list[dict[str, str]]) -> list[str]:
    """The columns that are not empty in every row, in their order."""
    return [key for key in rows[0] if any(set(row[key]) - set("-, ") for row in rows)]


def _table(rows: list[dict[str, str]], text: str, pad: bool = False) -> str:
    """A table in Markdown or, with `pad`, aligned for a terminal, and a text below it.

    Args:
        rows: one dictionary for each row, all with the same keys: the columns. Those that are empty are left out.
        text: below the table.
        pad: see `runs_table`.
    """
    shown = _filled(rows)
    cells = [shown, *([row[key] for key in shown] for row in rows)]
    if not pad:
        return f"{_markdown(cells)}\n\n{text}"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join(lines) + "\n\n" + textwrap.fill(text, 120)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|" + "---|" * len(cells[0]), *rows])


def _versions(about: dict[str, Any], *names: str) -> str:
    """The versions of these packages, by default of all that a file names."""
    return ", ".join(f"{name} {about['versions'][name]}" for name in names or about["versions"])


def _job(result: dict[str, Any]) -> str:
    """How a file of scripts/benchmark.py says that its models ran."""
    compiled = "compiled, " if result["compile"] else ""
    return f"{compiled}activation checkpointing: {result['activation_checkpoint']}"


def _deviation(values: list[float]) -> str:
    return f" ± {stdev(values):.4f}" if len(values) > 1 else ""


def _flops(about: dict[str, Any]) -> str:
    if "sparse_executed" not in about["flops_per_token"]:
        return "-"
    return f"{100 * flops_share(about, 'sparse_executed'):.0f}% ({100 * flops_share(about, 'sparse_pattern'):.0f}%)"


def _time(seconds: float) -> str:
    if seconds < 1000:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 18000 else f"{seconds / 3600:.1f} h"


def _reached(group: list[tuple[Run, dict[str, Any]]], baseline: list[tuple[Run, dict[str, Any]]]) -> str:
    """Time to reach the baseline's final loss, as a share of the baseline's time, or "-" if a run never reached it.

    The mean over the seeds. A run is compared with the baseline of the same seed or, if there is none, with the mean
    of all baseline runs.
    """
    alone = [[(run, seed_of(about)) for run, about in each if is_timed(about)] for each in (group, baseline)]
    ends = {seed: (run.last("val_loss"), float(run.seconds[-1])) for run, seed in alone[1]}
    if not ends or not alone[0]:
        return "-"
    means = mean(loss for loss, _ in ends.values()), mean(time for _, time in ends.values())
    shares = []
    for run, seed in alone[0]:
        level, time = ends.get(seed, means)
        reached = run.reaches(level)
        if reached is None:
            return "-"
        shares.append(reached / time)
    return f"{mean(shares):.2f}"


def _jumps(group: list[tuple[Run, dict[str, Any]]], baseline: list[tuple[Run, dict[str, Any]]]) -> str:
    """The largest rise of the training loss relative to the dense run within 2% of the steps after each phase switch.

    The mean over the seeds. A run must share its first steps with the dense run of the same seed, so that the same
    batches are compared; other runs get "-", and so does a switch after which the dense run has no steps. If no step
    was logged within the 2%, the first one after the switch counts.
    """
    dense = {seed_of(about): dict(zip(run.values("step"), run.values("loss"), strict=True)) for run, about in baseline}
    jumps: list[list[float]] = []
    for run, about in group:
        peer, phases = dense.get(seed_of(about), {}), about["phases"]
        lines = zip(run.values("step"), run.values("loss"), strict=True)
        ratios = {step: loss / peer[step] for step, loss in lines if step in peer}
        # Of a skipped batch it is not finite.
        over = {step: ratio - 1 for step, ratio in ratios.items() if math.isfinite(ratio)}
        jumps.append([])
        for _, start, _ in phases[1:]:
            before = [by for step, by in over.items() if step < start]
            after = [by for step, by in over.items() if step >= start]
            near = sum(start <= step <= start + 0.02 * phases[-1][2] for step in over)
            if not before or (not jumps[-1] and before[-1]):
                return "-"
            jumps[-1].append(max(after[: max(1, near)], default=math.nan) - before[-1])
    means = [mean(jump) for jump in zip(*jumps, strict=True)]
    return ", ".join("-" if math.isnan(jump) else f"{100 * jump:+.1f}%" for jump in means) or "-"


def _commit(about: dict[str, Any]) -> str:
    commit = about["commit"] or "unknown"
    return commit[:10] + " and changes" * commit.endswith("-dirty")


def _ran_on(runs: list[tuple[Run, dict[str, Any]]], one_seed: bool, columns: list[str]) -> str:
    """The text below a table of runs: model, data, machine, and what the columns mean."""
    about = runs[0][1]
    versions = _versions(about, "torch", "torchtitan", "triton")
    corpus = about["corpus"]
    documents = "streamed documents"
    if corpus["documents"] is not None:
        documents = f"{corpus['documents']:,} documents ({corpus['file_bytes'] / 1e6:,.0f} MB"
        documents += f", {corpus['copies']:,} copies left out)" if corpus.get("copies") else ")"
    skipped = [f"`{run.name}` {count}" for run, one in runs if (count := one.get("skipped_batches"))]
    seed = seed_of(about)
    tokens = _range([run.last("tokens") / 1e6 for run, _ in runs], "{:.3g}")
    devices = " and ".join(sorted({f"{one['hardware']['ranks']} x {one['hardware']['device']}" for _, one in runs}))
    dates = _range([one["date"][:10] for _, one in runs], "{}")
    commits = sorted({_commit(one) for _, one in runs if one.get("commit")})
    text = (
        f"{model_name(about)}, {tokens} M tokens of {documents}"
        + (f", seed {seed}" if one_seed else "")
        + f"; {devices}, {versions}, {dates}"
        + (f", commit {', '.join(commits)}" if commits else "")
        + ". Sparse: share of the steps that are sparse."
    )
    meanings = {
        "energy kept": "Energy kept: share of the sum of h^2 that the pattern keeps, at the last validation of the "
        "sparse phase.",
        "seeds": "±: standard deviation over the seeds. Minus dense: difference from the dense runs of the same seeds.",
        "FLOPs": "FLOPs: of the whole run relative to the dense run, as executed by the backend (in parentheses: as "
        "required by the pattern).",
        "at switches": "At switches (to sparse, to dense): largest rise of the training loss relative to the dense run "
        "at the same step, within 2% of the steps after the switch or, if none was logged there, at the next "
        "logged step.",
        "tokens/s": "Tokens/s: median over dense steps and over sparse steps, for runs that did not share a GPU.",
        "time": "Time: training without start-up and validation. Logged steps that include a compilation, and the "
        "first step of a phase, count at the median speed of the phase; the time to enter a phase is added.",
        "reached": "Reached: time until the validation loss first reached the final loss of the dense run of the same "
        "seed, as a share of the dense run's time.",
    }
    text += "".join(f" {meaning}" for column, meaning in meanings.items() if column in columns)
    if skipped:
        text += f" Batches skipped because their loss or gradient was not finite: {', '.join(skipped)}."
    return text


def batches_table(folder: Path) -> str:
    """Runs with different micro-batch sizes as a Markdown table. A run that ended before its last step did not fit.

    Args:
        folder: has one folder for each run, with metrics.jsonl and run.json.
    """
    rows, abouts = [], []
    for file in sorted(folder.glob("*/run.json")):
        abouts.append(json.loads(file.read_text()))
        last, config = read_lines(file.parent / "metrics.jsonl")[-1], abouts[-1]["config"]
        fits = last["step"] == config["training"]["steps"]
        rows.append(
            {
                "recipe": f"`{Path(config['recipe']).stem}`",
                "mode": last["phase"],
                "sequences": str(config["training"]["local_batch_size"]),
                "fits": "yes" if fits else "no",
                "tokens/s": rounded(last["tokens_per_second"]) if fits else "-",
                "memory of tensors": f"{last['peak_active_gib']:.1f} GiB" if fits else "-",
            }
        )
    rows.sort(key=lambda row: (row["recipe"], int(row["sequences"])))
    config, hardware = abouts[0]["config"], abouts[0]["hardware"]
    versions = _versions(abouts[0], "torch", "torchtitan", "triton")
    text = (
        f"{model_name(abouts[0])}, sequences of {config['training']['seq_len']} tokens, "
        f"{'compiled, ' if config['compile']['enable'] else ''}activation checkpointing: "
        f"{config['activation_checkpoint']['mode']}. {hardware['ranks']} x {hardware['device']}, {versions}, "
        f"{_range([each['date'][:10] for each in abouts], '{}')}, "
        f"commit {', '.join(sorted(set(map(_commit, abouts))))}."
    )
    return _table(rows, text)


def _range(values: Sequence[Any], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def probes_table(folder: Path, pad: bool = False) -> str:
    """Results of scripts/probe.py as a Markdown table: a row for each checkpoint and mode of its FFNs.

    Args:
        folder: has one folder for each run, with probe.json.
        pad: as in `runs_table`.
    """
    rows, about = [], []
    for file in sorted(folder.glob("*/probe.json")):
        for step, result in json.loads(file.read_bytes()).items():
            about.append(result)
            for mode, got in result["modes"].items():
                cloze = result["cloze"]
                rows.append(
                    {
                        "run": (file.parent.name if pad else f"`{file.parent.name}`"),
                        "step": step,
                        "FFN": mode,
                        "loss": f"{got['loss']:.4f}",
                        "bits/byte": f"{got['bits_per_byte']:.4f}",
                        "accuracy": f"{100 * got['accuracy']:.1f}%",
                        "ECE": f"{100 * got['ece']:.2f}%",
                        "cloze": "-"
                        if cloze["accuracy"] is None or mode != "dense"
                        else "{:.1f} ± {:.1f}%".format(100 * cloze["accuracy"], 100 * cloze["standard_error"]),
                        "energy kept": _percent(got["health"].get("energy_kept")),
                        "leak KL": _small(got["leak_kl"]),
                        "own KL": _small(got["own_kl"]),
                        "own gain": _small(got["own_gain"]),
                        # Probes from before 2026-11-26 did not measure it.
                        "next KL": _small(got["next_kl"]) if "next_kl" in got else "-",
                        "next gain": f"{got['next_gain']:.3f} ± {got['next_gain_error']:.3f}"
                        if "next_gain" in got
                        else "-",
                    }
                )
                if pad:
                    for column in ("bits/byte", "accuracy"):
                        del rows[-1][column]  # for a terminal's width
    one, cloze = about[0], about[0]["cloze"]
    dates = _range([each["date"][:10] for each in about], "{}")
    devices = " and ".join(sorted({each["hardware"] for each in about}))
    sequences = _range([each["sequences"] for each in about], "{}")
    text = (
        f"{sequences} held-out sequences; ECE over {one['bins']} bins; cloze: {cloze['items']} items of "
        f"{cloze['choices']} choices, ± the standard error. Leak: change of the predictions when later text is "
        "replaced, in nats per token. Leak: in the first halves, when the second halves of all sequences are replaced; "
        "own: when only the sequence's own second half is replaced; next: at the last position before the replacement. "
        "Gain: how much lower the loss is with the true later text; above zero, the model used later tokens. "
        f"{devices}, torch {one['torch']}, {dates}."
    )
    return _table(rows, text, pad)


def evaluations_table(folder: Path) -> str:
    """Results of scripts/evaluate.py on a text as a Markdown table: a row for each run and way to run its model.

    Args:
        folder: has one folder for each run, with evaluations.jsonl.
    """
    rows, evaluations = [], []
    for file in sorted(folder.glob("*/evaluations.jsonl")):
        for evaluation in map(json.loads, file.read_text().splitlines()):
            if evaluation["text"] is None:
                continue  # an evaluation on tasks only
            evaluations.append(evaluation)
            first = next(iter(evaluation["scores"].values()))["loss"]
            for name, got in evaluation["scores"].items():
                rate = got.get("prefill_tokens/s")
                over = got["loss"] - first
                row = {
                    "run": f"`{file.parent.name}`",
                    "model": name,
                    "loss": f"{got['loss']:.4f}",
                    "over the first": f"{over:+.4f} ({100 * over / first:+.2f}%)" if over else "-",
                    "bits/byte": f"{got['bits_per_byte']:.4f}",
                    "energy kept": _percent(got.get("energy_kept")),
                    "prompt, tokens/s": rounded(rate) if rate else "-",
                }
                if row not in rows:  # two quantisations start with the same model
                    rows.append(row)
    tokens = _range([each["text"]["tokens"] for each in evaluations], "{:,}")
    files = _range([len(each["text"]["files"]) for each in evaluations], "{}")
    devices = " and ".join(sorted({each["hardware"] for each in evaluations}))
    used = {f"{name} {version}": None for each in evaluations for name, version in each["versions"].items()}
    versions = ", ".join(used)
    dates = _range([each["date"][:10] for each in evaluations], "{}")
    text = f"{tokens} tokens of {files} files. {devices}, {versions}, {dates}."
    return _table(rows, text)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def kernels_table(file: Path) -> str:
    """Timings of one FFN as a Markdown table, the hardware, and which contenders were not timed and why.

    Args:
        file: kernels.json.
    """
    result = json.loads(file.read_text())
    columns = ("d, f", "contender", "ms", "rounds, ms", "speed-up", "replayed, ms", "speed-up", "peak memory")
    cells = [(*columns, "(2) to (6), TFLOP/s")]
    untimed: dict[str, str] = {}
    for shape in result["shapes"]:
        for name, entry in shape["contenders"].items():
            if "ms" not in entry:
                failed = any(check["failed"] for check in entry.get("checks", []))
                untimed[name] = "failed its check" if failed else entry["reason"]
                continue
            rates = [rate["tflops"] for product, rate in entry["products"].items() if product != "(1)"]
            cells.append(
                (
                    f"{shape['dim']}, {shape['hidden_dim']}",
                    f"`{name}`",
                    f"{entry['ms']:.2f}",
                    f"{min(entry['rounds']):.2f} to {max(entry['rounds']):.2f}",
                    f"{entry['speedup']:.2f}x",
                    f"{entry['graph_ms']:.2f}" if "graph_ms" in entry else "-",
                    f"{entry['graph_speedup']:.2f}x" if "graph_ms" in entry else "-",
                    f"{entry['peak_bytes'] / 2**30:.2f} GiB",
                    _range(rates, "{:.0f}") if rates else "-",
                )
            )
    text = (
        f"One FFN, forward and backward, bf16, compiled, {result['tokens']} random tokens, including router and "
        "permutation; median and range over the rounds. Speed-ups are relative to `dense`, with kernels launched from "
        "Python, and replayed from a CUDA graph, without host overhead. Peak memory excludes inputs and weights. "
        f"{result['hardware']['device']}, {_versions(result, 'torch', 'triton')}, "
        f"{result['date'][:10]}, `{result['command']}`."
    )
    if untimed:
        text += " Not timed: " + "; ".join(f"`{name}` ({reason})" for name, reason in untimed.items()) + "."
    return f"{_markdown(cells)}\n\n{text}"


def stages_table(file: Path) -> str:
    """Time of one FFN by stage, in ms, as a Markdown table.

    Args:
        file: kernels.json.
    """
    result = json.loads(file.read_text())
    tables = []
    for shape in result["shapes"]:
        stages = {name: entry["stages"] for name, entry in shape["contenders"].items() if "stages" in entry}
        columns = [stage for stage in STAGES if any(stage in times for times in stages.values())]
        cells = [[f"{shape['dim']}, {shape['hidden_dim']}", *columns, "sum"]]
        for name, times in stages.items():
            own = [f"{times[stage]:.2f}" if stage in times else "" for stage in columns]
            cells.append([f"`{name}`", *own, f"{sum(times.values()):.2f}"])
        tables.append(_markdown(cells))
    return "\n".join(tables) + f"\n\nMilliseconds on the GPU. {result['hardware']['device']}, {result['date'][:10]}."


def training_table(file: Path) -> str:
    """Training steps of whole models as a Markdown table, and the hardware.

    Args:
        file: training.json.
    """
    result = json.loads(file.read_text())
    contenders: dict[str, dict[str, Any]] = result["contenders"]
    timed = {name: entry for name, entry in contenders.items() if not entry["failed"]}
    swiglu = timed.get("torchtitan_swiglu")
    over_dense = "over `dense`" if "dense" in timed else "over its own dense"
    peak = "Peak memory: of tensors; for torchtitan's own trainer, of the process, since it reports only that."
    if not any(entry["active_gib"] for entry in timed.values()):
        peak = "Peak memory: of the process, which keeps what it allocated in the dense phase."
    rows = []
    for name, entry in timed.items():
        mode = "sparse" if "sparse" in entry["ms"] else "dense"
        over = swiglu["ms"]["dense"] / entry["ms"][mode] if swiglu else None
        share = f"{100 * entry['sparse_share']:.0f}%" if mode == "sparse" else ""
        rows.append(
            {
                "contender": f"`{name}`",
                "what": entry["what"],
                "dense step, ms": f"{entry['ms']['dense']:.0f}",
                "sparse step, ms": f"{entry['ms']['sparse']:.0f}" if mode == "sparse" else "-",
                "tokens/s": rounded(entry["tokens_per_second"][mode]),
                over_dense: f"{entry['speedup']:.2f}x" if mode == "sparse" else "-",
                "over SwiGLU": f"{over:.2f}x" if over else "-",
                "whole run": f"{entry['whole']:.2f}x ({share} sparse)" if mode == "sparse" else "-",
                "peak memory": f"{entry['active_gib'].get(mode, entry['peak_gib'][mode]):.1f} GiB",
            }
        )
    text = (
        f"{result['model']}, {result['batch']} sequences of {result['sequence']} tokens per step and GPU, "
        f"{_job(result)}. Times are medians over means of {_window([result])} steps. Whole run: speed-up of the "
        f"recipe's mix of dense and sparse steps at these times over dense steps only. {peak} "
        f"{result['hardware']['gpus']} x {result['hardware']['device']}, {_versions(result)}, {result['date'][:10]}, "
        f"commit {_commit(result)}, `{result['command']}`."
    )
    if failed := [f"`{name}` ({entry['failed']})" for name, entry in contenders.items() if entry["failed"]]:
        text += f" Not timed: {'; '.join(failed)}."
    return _table(rows, text)


def _window(results: Sequence[dict[str, Any]]) -> str:
    """Steps in a window of scripts/benchmark.py, which older files do not name."""
    return " or ".join(dict.fromkeys(str(result.get("window", "five")) for result in results))


def parts_table(file: Path) -> str:
    """Time of one traced training step by part, in ms, as a Markdown table.

    Args:
        file: training.json.
    """
    result = json.loads(file.read_text())
    traced = [
        (f"`{name}`, {mode}", parts)
        for name, entry in result["contenders"].items()
        for mode, parts in entry.get("parts", {}).items()
        if mode == "sparse" or "speedup" not in entry
    ]
    columns = dict.fromkeys(part for _, parts in sorted(traced, key=lambda pair: -len(pair[1])) for part in parts)
    rows = [
        {"step": step}
        | {part: f"{parts[part]:.1f}" if part in parts else "" for part in columns}
        | {"sum": f"{sum(parts.values()):.1f}"}
        for step, parts in traced
    ]
    return _table(rows, f"Milliseconds of one step under the profiler, {result['date'][:10]}.")


def _measurements(folder: Path) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """The files of scripts/benchmark.py in a folder that were timed: (file, name of its one contender, its entry)."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.name != PREDICTION]
    measured = [(result, *each) for result in results for each in result["contenders"].items()]
    return [each for each in measured if not each[2]["failed"]]


def _measured_on(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]
    commits = ", ".join(dict.fromkeys(map(_commit, results)))
    dates = ", ".join(dict.fromkeys(result["date"][:10] for result in results))
    hardware = [result["hardware"] for result in results]
    devices = " and ".join(dict.fromkeys(f"{each['gpus']} x {each['device']}" for each in hardware))
    return (
        f"Medians over means of {_window(results)} steps. {devices}, "
        f"{_versions(first)}, {dates}, commit {commits}; each file has its command, such as `{first['command']}`."
    )


def _beside(measured: float, predicted: float | None, form: str) -> str:
    """A measured number, with a predicted one in brackets."""
    return form.format(measured) + (f" ({form.format(predicted)})" if predicted is not None else "")


def _mfu(result: dict[str, Any], entry: dict[str, Any], mode: str) -> str:
    """Model FLOPs utilisation of a mode's steps, dense-equivalent, in percent."""
    about, rate = entry["about"], entry["tokens_per_second"][mode] / result["hardware"]["gpus"]
    return (
        f"{100 * about['flops_per_token']['dense'] * rate / about['peak_flops']:.0f}%" if about["peak_flops"] else "-"
    )


PREDICTION = "prediction.json"
FP8_RECIPES = ("columns_quarter_fp8", "columns_eighth_fp8")
FLOAT8 = "float8_ffn"


def depth_table(folder: Path) -> str:
    """Steps of a model by its number of layers, with what was predicted, as a Markdown table.

    Args:
        folder: has files of scripts/benchmark.py, one for each number of layers and contender, and prediction.json. The
            steps of `float8_ffn` are, where it was not measured, the dense steps of the first fp8 recipe. A contender
            to which `doubt` was added by hand, why its time is no step time, is shown and not compared with.
    """
    predicted = json.loads((folder / PREDICTION).read_text())["ms"]
    # By layers and contender: a file, its contender's entry, and the mode of the steps.
    steps: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {}
    for result, name, entry in _measurements(folder):
        mode = "sparse" if name in FP8_RECIPES else "dense"
        steps.setdefault(result["layers"], {})[name] = result, entry, mode
    results = [result for own in steps.values() for result, _, _ in own.values()]
    for own in steps.values():
        if FLOAT8 not in own and (recipe := next((name for name in FP8_RECIPES if name in own), None)):
            own[FLOAT8] = (*own[recipe][:2], "dense")
    rows, notes = [], []
    for layers in sorted(steps):
        own, before = steps[layers], predicted[str(layers)]
        times = {name: entry["ms"][mode] for name, (_, entry, mode) in own.items()}
        doubts = {name: entry["doubt"] for name, (_, entry, _) in own.items() if "doubt" in entry}
        notes += [f"`{name}` of {layers} layers: {why}." for name, why in doubts.items()]
        for name in ("dense", FLOAT8, *FP8_RECIPES):
            if name not in own:
                continue
            result, entry, mode = own[name]
            row = {
                "layers": str(layers),
                "contender": f"`{name}`",
                "step, ms (predicted)": _beside(times[name], before[name], "{:.0f}"),
            }
            for rival in ("dense", FLOAT8):
                over = f"over `{rival}` (predicted)"
                compared = rival in times and rival not in doubts and name not in ("dense", rival, *doubts)
                row[over] = "-"
                if compared:
                    row[over] = _beside(times[rival] / times[name], before[rival] / before[name], "{:.2f}x")
            rate = rounded(entry["tokens_per_second"][mode])
            row |= {"tokens/s": rate, "MFU": _mfu(result, entry, mode)}
            row["memory of a GPU"] = f"{entry['active_gib'][mode]:.1f} GiB"
            rows.append(row)
    first = results[0]
    text = (
        f"{first['model']}, FSDP2, {first['batch']} sequences of {first['sequence']} tokens per step and GPU, "
        f"{_job(first)}. MFU: dense-equivalent, over the bf16 peak. Memory: of tensors. "
    )
    return _table(rows, " ".join([text + _measured_on(results), *notes]))


APART = 0.03  # of the times of a step's windows, from which on a table of layouts shows them


def layouts_table(folder: Path) -> str:
    """Steps of a model by its layout on several GPUs or on one, with what was predicted, as a Markdown table.

    Args:
        folder: has files of scripts/benchmark.py, one for each layout and recipe, and prediction.json: by layout and
            recipe, `ms` of steps in bf16, and `gib` of tensors by mode. Either may lack any layout and recipe.
    """
    predicted = json.loads((folder / PREDICTION).read_text())
    order = [*predicted["ms"], *predicted["gib"]]
    measured = _measurements(folder)
    measured.sort(
        key=lambda each: (each[0]["hardware"]["gpus"], order.index(name) if (name := _layout(each[0])) in order else 0)
    )
    rows, notes = [], []
    for result, name, entry in measured:
        layout, recipe = _layout(result), _with_keys(result, name)
        times, memory = (predicted[unit].get(layout, {}) for unit in ("ms", "gib"))
        # The dense steps of a recipe in fp8 have FFNs in float8, and the prediction is of bf16.
        dense = None if name.endswith("_fp8") else times.get("dense")
        before = {"dense": dense, "sparse": times.get(name)}
        shown = {mode: _beside(entry["ms"][mode], before[mode], "{:.0f}") for mode in entry["ms"]}
        gain = dense / times[name] if dense and name in times else None
        tensors = [
            _beside(each, memory.get(name, {}).get(mode), "{:.1f}") for mode, each in entry["active_gib"].items()
        ]
        rows.append(
            {
                "layout": layout,
                "recipe": recipe,
                "dense step, ms (predicted)": shown["dense"],
                "sparse step, ms (predicted)": shown.get("sparse", "-"),
                "speed-up (predicted)": _beside(entry["speedup"], gain, "{:.2f}x") if "speedup" in entry else "-",
                "MFU, dense / sparse": " / ".join(_mfu(result, entry, mode) for mode in entry["ms"]),
                "memory of a GPU, GiB, dense / sparse (predicted)": " / ".join(tensors),
                "parameters": result["dtype"],
                "graphs compiled": ", ".join(f"{count} by step {step}" for step, count in entry["graphs"].items()),
            }
        )
        for mode, windows in entry["rounds"].items():
            if max(windows) > (1 + APART) * min(windows):
                notes.append(f"{layout}, {recipe}: {_range(windows, '{:.0f}')} ms ({mode})")
    results = [result for result, _, _ in measured]
    first = results[0]
    text = (
        f"{first['model']}, {first['layers']} layers, {first['batch']} sequences of {first['sequence']} tokens in a "
        f"step for each GPU, {_job(first)}. Speed-up: over the "
        "run's own dense steps. MFU: dense-equivalent, over the bf16 peak. Memory: of tensors, of the fullest GPU. "
    )
    text += _measured_on(results)
    if notes:
        text += f" Steps whose windows differ by more than {100 * APART:.0f}%: {'; '.join(notes)}."
    return _table(rows, text)


# Keys of train.py that steps are compared by.
SWITCHES = (
    "training.bf16_residual",
    "training.loss_chunk_tokens",
    "optimizer.moments",
    "training.global_batch_size",
    "training.sparse_local_batch_size",
    "router.token_clusters",
    "activations.sample",
    "schedule.dense_layers",
)


def switches_table(folder: Path) -> str:
    """Steps of the same models with keys of the rest of a step set or not, as a Markdown table.

    Args:
        folder: has files of scripts/benchmark.py, one contender each. `changes`, added to a file by hand, says how the
            code that ran differs from its commit.
    """
    measured = [(_settings(result), result, name, entry) for result, name, entry in _measurements(folder)]
    results = [result for _, result, _, _ in measured]
    rows: list[dict[str, str]] = []
    fewest: dict[tuple[str, str], tuple[list[str], dict[str, float]]] = {}  # settings of each, and its times
    for given, result, name, entry in sorted(measured, key=lambda row: (row[1]["model"], row[2], len(row[0]), row[0])):
        few, before = fewest.setdefault((result["model"], name), (given, entry["ms"]))
        memory = " / ".join(f"{entry['active_gib'][mode]:.1f}" for mode in entry["ms"])
        row = {
            "model": result["model"],
            "contender": f"`{name}`",
            "keys": ", ".join(given) or "none",
        }
        for mode in ("dense", "sparse"):
            time, old = entry["ms"].get(mode), before.get(mode)
            comparable = set(few) < set(given) and "training.global_batch_size" not in _switches(result)
            change = f" ({time - old:+.1f})" if time and old and comparable else ""
            row[f"{mode} step, ms"] = f"{time:.1f}{change}" if time else "-"
        (*_, rate) = entry["tokens_per_second"].values()
        rows.append(row | {"tokens/s": rounded(rate), "memory, GiB, dense / sparse": memory})
    first = results[0]
    compared = len(fewest) < len(rows)
    brackets = "; in brackets the change to the contender's row with the fewest keys" if compared else ""
    text = (
        f"Sequences of {first['sequence']} tokens, four in a micro-batch of dense steps, {_job(first)}{brackets}. "
        "tokens/s: of sparse steps where there are some. Memory: of tensors. "
    )
    return _table(rows, text + _measured_on(results))


def _settings(result: dict[str, Any]) -> list[str]:
    """What steps are compared by: keys with their values, and `changes`."""
    keys = [f"`{key.split('.')[1]} = {value}`" for key, value in _switches(result).items()]
    return [*keys, result["changes"]] if "changes" in result else keys


def _switches(result: dict[str, Any]) -> dict[str, str]:
    given = _given_keys(result)
    return {key: given[key] for key in SWITCHES if key in given}


def _given_keys(result: dict[str, Any]) -> dict[str, str]:
    """The options of the command that measured, and their values."""
    words = [part for word in shlex.split(result["command"]) for part in word.split("=", 1)]
    return {word.removeprefix("--"): value for word, value in pairwise(words) if word.startswith("--")}


def _layout(result: dict[str, Any]) -> str:
    """A layout as the pages name it: "FSDP2 2", "tensor 2"."""
    degrees = {name.split("_")[0]: degree for name, degree in result["layout"].items() if "data_parallel" not in name}
    gpus = result["hardware"]["gpus"]
    return ", ".join(f"{name} {degree}" for name, degree in degrees.items()) or (
        f"FSDP2 {gpus}" if gpus > 1 else "one GPU"
    )


def _with_keys(result: dict[str, Any], name: str) -> str:
    """A contender, with the precision that its sparse FFNs were given beside the recipe."""
    precision = _given_keys(result).get("precision.ffn")
    return f"`{name}`" + (f", `precision.ffn = {precision}`" if precision else "")


def headline_table(file: Path) -> str:
    """Speed-ups of steps and whole runs, loss, and speed-up at equal loss: a row for each recipe.

    Args:
        file: what scripts/law.py reads.
    """
    evidence, told = read_evidence(file), json.loads(file.read_text())
    rows = []
    for recipe, entry in told["recipes"].items():
        steps, whole, sooner = [], [], []
        largest = evidence.largest(recipe)
        cell, (share, _, _) = evidence.recipes[recipe][largest], evidence.shares(recipe, largest)
        for model, speed in speeds(entry).items():
            steps.append(f"{model} {speed.step:.2f}x, {speed.step / speed.rival:.2f}x")
            whole.append(f"{model} {speed.whole:.2f}x, {speed.whole / speed.rival:.2f}x")
            sooner.append(f"{model} {speed.whole * share:.2f}x, {speed.whole * share / speed.rival:.2f}x")
        share_of_loss = mean(cell.values) / evidence.law.loss(cell.parameters, cell.tokens)
        rows.append(
            {
                "recipe": f"[`{recipe}`](recipes/{recipe}.toml)",
                "its sparse step": "; ".join(steps),
                "whole run": "; ".join(whole),
                "scale": f"{rounded(cell.parameters, 2)}, {cell.tokens / cell.parameters:.0f} each",
                "loss at equal tokens": f"{100 * share_of_loss:+z.1f}%",  # z: never "-0.0%"
                "at equal loss": "; ".join(sooner),
            }
        )
    return _table(rows, "")


def law_table(file: Path, pad: bool = False) -> str:
    """Penalties, effective tokens and iso-loss speed-ups with intervals: a row for each recipe and budget.

    Args:
        file: what scripts/law.py reads.
        pad: as in `runs_table`.
    """
    evidence, told = read_evidence(file), json.loads(file.read_text())
    rows = []
    for recipe, cells in evidence.recipes.items():
        for place, cell in enumerate(cells):
            share, low, high = evidence.shares(recipe, place)
            row = {
                "recipe": recipe if pad else f"`{recipe}`",
                "parameters": rounded(cell.parameters, 2),
                "tokens each": f"{cell.tokens / cell.parameters:.1f}",
                "seeds": str(len(cell.values)),
                "loss over dense": f"{mean(cell.values):+.4f}",
                "effective tokens": f"{100 * share:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
            }
            if pad:
                del row["parameters"], row["seeds"]  # for a terminal's width
            rows += [
                row
                | {
                    "speed of": model,
                    "whole run": f"{speed.whole:.2f}x, {speed.whole / speed.rival:.2f}x",
                    "at equal loss": "{:.2f}x ({:.2f} to {:.2f})".format(
                        *(speed.whole / speed.rival * each for each in (share, low, high))
                    ),
                }
                for model, speed in speeds(told["recipes"][recipe]).items()
            ] or [row | dict.fromkeys(("speed of", "whole run", "at equal loss"), "-")]
    law = evidence.law
    terms = f"{law.constant:.3f}" + (f" + {law.scale_n:.3g} / N^{law.a:.2f}" if law.scale_n else "")
    if evidence.exponent and law.scale_n:  # two sizes, whose constants say nothing about a third
        sizes = sorted({cell.parameters for cell in evidence.dense})
        of_each = (f"{law.constant + law.scale_n / n:.3f} ({rounded(n, 2)})" for n in sizes)
        terms = " or ".join(of_each)
    slopes = ", ".join(
        f"{law.slope(tokens):.2f} at {rounded(tokens)} tokens"
        for tokens in sorted({cell.tokens for cell in evidence.dense})
    )
    doubled = ", ".join(
        f"{recipe} {100 * law.share(2 * cells[place].tokens, mean(cells[place].values)):.0f}%"
        for recipe, cells in evidence.recipes.items()
        for place in [evidence.largest(recipe)]
    )
    text = (
        f"Dense law: L = {terms} + {law.scale_d:.3g} / D^{law.b:.3f}, "
        f"of {len(evidence.dense)} budgets and {sum(len(cell.values) for cell in evidence.dense)} runs. Its slope, in "
        f"nats an e-fold of tokens: {slopes}. {_given(evidence)}In parentheses: 90% intervals. Whole run: over bf16 "
        "dense, and over the fastest dense rival, the model with its FFNs in float8. At equal loss: the latter times "
        f"the effective tokens. Effective tokens at twice the largest budget, if the penalty stays: {doubled}."
    )
    return _table(rows, text, pad)


def _given(evidence: Evidence) -> str:
    """What the law has not from its own runs, in sentences."""
    text = ""
    if evidence.exponent:
        low, high = evidence.exponent
        text += f"Its exponent is not fitted: {evidence.law.b:.2f}, and {low:.2f} to {high:.2f} in intervals. "
    if evidence.deviation:
        dense, penalty = evidence.deviation["dense"], evidence.deviation["penalty"]
        text += f"Deviations over seeds are another study's: {dense:g} (dense) and {penalty:g} (over dense) nats. "
    return text


def faults_table(file: Path) -> str:
    """The faults of scripts/chaos.py by kind and moment: how many, what they cost, and whether the runs came out equal.

    Args:
        file: what `python -m scripts.chaos` writes.
    """
    about = json.loads(file.read_text())
    happened = [fault for fault in about["faults"] if fault["happened"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for fault in sorted(happened, key=lambda fault: (fault["kind"], fault["moment"])):
        groups.setdefault((fault["kind"], fault["moment"]), []).append(fault)
    rows = []
    for (kind, moment), faults in groups.items():
        broken = [fault["number"] for fault in faults if fault["problems"]]
        rows.append(
            {
                "what": kind,
                "when": moment,
                "on 1 process": str(sum(fault["processes"] == 1 for fault in faults)),
                "on 2": str(sum(fault["processes"] == 2 for fault in faults)),
                "most steps lost": str(max(fault["lost_steps"] for fault in faults)),
                "equal": f"no: {', '.join(map(str, broken))}" if broken else "yes",
            }
        )
    equal = sum(not fault["problems"] for fault in happened)
    counts = Counter(map(_commit, happened))
    commits = ", ".join(f"{number} at {name}" for name, number in counts.items())
    text = (
        f"{len(happened)} faults of seed {about['seed']}, {equal} of them without a deviation; "
        f"{len(about['faults']) - len(happened)} more were drawn for a moment that the run did not come to. "
        f"A run of {about['steps']} steps saves a checkpoint every {about['interval']}. By commit: {commits}."
    )
    return _table(rows, text)


TABLES: dict[str, Callable[[Path], str]] = {
    "headline": headline_table,
    "law": law_table,
    "runs": runs_table,
    "batches": batches_table,
    "probes": probes_table,
    "evaluations": evaluations_table,
    "kernels": kernels_table,
    "stages": stages_table,
    "training": training_table,
    "parts": parts_table,
    "depth": depth_table,
    "layouts": layouts_table,
    "switches": switches_table,
    "faults": faults_table,
}
