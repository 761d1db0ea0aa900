"""Tables of README.md and kernels/README.md, from the runs and measurements committed under docs.

    python -m scripts.report          rewrite the tables
    python -m scripts.report --check  only say whether they are up to date (status 1 if not)

A table stands between a comment that names its source and `<!-- end -->`; nothing in it is typed by hand:

    <!-- runs: FOLDER -->     a row for each run in the folder: metrics.jsonl and run.json, as training leaves them
    <!-- kernels: FILE -->    a row for each contender and shape: kernels.json of scripts/benchmark_kernels.py
    <!-- stages: FILE -->     the same file: where their time goes
"""

import json
import re
import sys
from pathlib import Path

from scripts.plot_kernels import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "README.md", ROOT / "kernels" / "README.md"
BLOCK = re.compile(r"(<!-- (runs|kernels|stages): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def runs_table(folder: Path) -> str:
    """The runs in a folder as a Markdown table, densest first, and what they ran on.

    Args:
        folder: holds a folder a run; one of them is dense throughout.
    """
    runs = []
    for file in sorted(folder.glob("*/run.json")):
        rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
        runs.append((file.parent.name, json.loads(file.read_text()), [row for row in rows if "val_loss" in row]))
    runs.sort(key=lambda run: run[2][-1]["val_loss"])
    (dense,) = (rows[-1]["val_loss"] for _, run, rows in runs if all(mode == "dense" for mode, *_ in run["phases"]))
    lines = [
        "| run | sparse steps | energy kept | validation loss | minus dense | bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for name, run, rows in runs:
        sparse = sum(stop - start + 1 for mode, start, stop in run["phases"] if mode == "sparse")
        steps, last = run["phases"][-1][2], rows[-1]
        kept = [row["energy_kept"] for row in rows if "energy_kept" in row]
        loss, energy = last["val_loss"], f"{100 * kept[-1]:.1f}%" if kept else "-"
        lines.append(
            f"| `{name}` | {sparse} of {steps} | {energy} | {loss:.4f} "
            f"| {loss - dense:+.4f} ({100 * (loss / dense - 1):+.1f}%) | {last['val_bpb']:.4f} |"
        )
    run, rows = runs[0][1], runs[0][2]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "torchtitan", "triton"))
    corpus = f"{run['corpus']['documents']:,} documents ({run['corpus']['file_bytes'] / 1e6:,.0f} MB)"
    model, seed = run["config"]["model"]["flavor"], run["config"]["debug"]["seed"]
    tokens, parameters = rows[-1]["tokens"] / 1e6, run["parameters"] / 1e6
    lines.append(
        f"\n{model}, {parameters:.0f} M parameters, {tokens:.1f} M tokens of {corpus}, seed {seed}; "
        f"{run['hardware']['ranks']} x {run['hardware']['device']}, {versions}, {run['date'][:10]}. "
        "Energy kept: of h, by the pattern, at the last validation of the sparse phase."
    )
    return "\n".join(lines)


def kernels_table(file: Path) -> str:
    """The contenders that were timed as a Markdown table, what they ran on, and who was not timed and why.

    Args:
        file: kernels.json.
    """
    result = json.loads(file.read_text())
    lines = [
        "| d, f | contender | ms | rounds, ms | speed-up | kernels alone, ms | speed-up | peak memory "
        "| (2) to (6), TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    untimed: dict[str, str] = {}
    for shape in result["shapes"]:
        for name, entry in shape["contenders"].items():
            if "ms" not in entry:
                failed = any(check["failed"] for check in entry.get("checks", []))
                untimed[name] = "failed its check" if failed else entry["reason"]
                continue
            sparse = [rate for product, rate in entry.get("products", {}).items() if product != "(1)"]
            rates = [rate["tflops"] for rate in sparse]
            kernels, dense = (sum(shape["contenders"][each].get("stages", {}).values()) for each in (name, "dense"))
            alone = f"{kernels:.2f} | {dense / kernels:.2f}x" if kernels else "- | -"
            memory = f"{entry['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in entry else "-"
            lines.append(
                f"| {shape['dim']}, {shape['hidden_dim']} | `{name}` | {entry['ms']:.2f} "
                f"| {min(entry['rounds']):.2f} to {max(entry['rounds']):.2f} | {entry['speedup']:.2f}x "
                f"| {alone} | {memory} | {_span(rates) if sparse else '-'} |"
            )
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "triton"))
    lines.append(
        f"\nOne FFN, forward and backward, bf16, compiled, {result['tokens']} random tokens, router and permutation "
        "included; the median and the range of the rounds. Speed-ups are over `dense`, by the clock and by the sum of "
        "the kernels' times in a short profile, which leaves out gaps between launches and runs on a cooler GPU. Peak "
        "memory is beyond inputs and weights. "
        f"{result['hardware']['device']}, {versions}, "
        f"{result['date'][:10]}, `{result['command']}`."
    )
    if untimed:
        lines[-1] += " Not timed: " + "; ".join(f"`{name}` ({reason})" for name, reason in untimed.items()) + "."
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def stages_table(file: Path) -> str:
    """Where the time of a step goes, in ms by stage, as a Markdown table.

    Args:
        file: kernels.json.
    """
    result = json.loads(file.read_text())
    lines = []
    for shape in result["shapes"]:
        stages = {name: entry["stages"] for name, entry in shape["contenders"].items() if "stages" in entry}
        columns = [stage for stage in STAGES if any(stage in times for times in stages.values())]
        lines += [f"| {shape['dim']}, {shape['hidden_dim']} | {' | '.join(columns)} | sum |"]
        lines += ["|---" * (len(columns) + 2) + "|"]
        for name, times in stages.items():
            cells = [f"{times[stage]:.2f}" if stage in times else "" for stage in columns]
            lines.append(f"| `{name}` | {' | '.join(cells)} | {sum(times.values()):.2f} |")
    lines.append(f"\nMilliseconds on the GPU. {result['hardware']['device']}, {result['date'][:10]}.")
    return "\n".join(lines)


TABLES = {"runs": runs_table, "kernels": kernels_table, "stages": stages_table}


def fill(text: str) -> str:
    """A page's text with every table made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]](ROOT / block[3])}\n{block[4]}", text)


def main(args: list[str]) -> int:
    stale = [page for page in PAGES if fill(page.read_text()) != page.read_text()]
    if "--check" in args:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        print(f"not up to date: {names}; run python -m scripts.report" if stale else "up to date")
        return int(bool(stale))
    for page in stale:
        page.write_text(fill(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
