"""Tables of the README, from the runs committed under docs/runs.

    python -m scripts.report          rewrite the tables in README.md
    python -m scripts.report --check  only say whether they are up to date (status 1 if not)

A table stands between `<!-- runs: FOLDER -->` and `<!-- end -->`, a row for each run in the folder (metrics.jsonl and
run.json, as training leaves them); nothing in it is typed by hand.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- runs: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(folder: Path) -> str:
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


def fill(text: str) -> str:
    """The README's text with every table made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{table(ROOT / block[2])}\n{block[3]}", text)


def main(args: list[str]) -> int:
    text = README.read_text()
    filled = fill(text)
    if "--check" in args:
        print("README.md is up to date" if filled == text else "README.md is not up to date: python -m scripts.report")
        return int(filled != text)
    README.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
