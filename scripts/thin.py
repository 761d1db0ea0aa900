"""Keep of a run's metrics.jsonl and run.json what tables and pictures read: for results that are stored in docs/.

    python -m scripts.thin docs/studies/NAME      # all runs below these folders, in place

Results are data, not logs: a run of a study takes a quarter of the space so, and what is left has a reader.
scripts/study.py stores the results of its runs like this. The run's own folder in outputs/ keeps everything.
"""

import json
import re
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, run_program
from scripts.options import Parser
from scripts.runs import HEALTH, VALIDATIONS, read_lines

KEPT = {"step", "phase", "keep", "loss", "lr", "tokens", "tokens_per_second", "val_bpb", *VALIDATIONS, *HEALTH}
BY_LAYER = re.compile(r"layers/\d+/energy_kept")
# Sections and keys of the configuration that change nothing that is computed; scripts/study.py ignores them, too.
INDIFFERENT = ("job.", "metrics.", "checkpoint.", "comm.", "profiling.", "training.dataloader.prefetch_factor")


def thin_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what no table and no picture reads; numbers in nine digits."""
    thinned, kinds = [], [(line.get("phase"), line.get("keep")) for line in lines]
    for place, line in enumerate(lines):
        kept = {key: value for key, value in line.items() if key in KEPT or BY_LAYER.fullmatch(key)}
        # How training time is counted: Run.seconds in scripts/runs.py.
        if line.get("graphs_compiled"):
            kept["graphs_compiled"] = line["graphs_compiled"]
        if "switch_seconds" in line and (place == 0 or kinds[place] != kinds[place - 1]):
            kept["switch_seconds"] = line["switch_seconds"]
        if "peak_active_gib" in line and place == len(lines) - 1:  # the table of micro-batches reads the last one
            kept["peak_active_gib"] = line["peak_active_gib"]
        thinned.append({key: float(f"{x:.9g}") if isinstance(x, float) else x for key, x in kept.items()})
    return thinned


def thin_about(about: dict[str, Any]) -> dict[str, Any]:
    """A run.json without the command line and without what changes nothing that is computed."""

    def without(values: dict[str, Any], path: str) -> dict[str, Any]:
        kept = {}
        for key, value in values.items():
            name = f"{path}{key}"
            if isinstance(value, dict) and f"{name}." not in INDIFFERENT:
                kept[key] = without(value, f"{name}.")
            elif not isinstance(value, dict) and name not in INDIFFERENT:
                kept[key] = value
        return kept

    return {key: value for key, value in about.items() if key != "command"} | {"config": without(about["config"], "")}


def store(folder: Path, results: Path, more: dict[str, Any] | None = None) -> None:
    """Write what is kept of a run.

    Args:
        folder: the run's, with metrics.jsonl and run.json.
        results: the folder to write both into; `folder` itself thins it in place.
        more: entries that run.json gets besides.

    Raises:
        ConfigError: a file that is missing or cannot be read.
    """
    lines = thin_lines(read_lines(folder / "metrics.jsonl"))
    try:
        about = thin_about(json.loads((folder / "run.json").read_bytes()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'run.json'}: not the run.json of a run ({error}); give a run's folder") from None
    results.mkdir(parents=True, exist_ok=True)
    (results / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results / "run.json").write_text(json.dumps(about | (more or {}), indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scripts.thin", description="Keep of stored results what tables and pictures read, in place."
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="such as docs/studies/NAME")
    for folder in parser.parse_args(arguments).folders:
        runs = sorted(file.parent for file in folder.glob("**/run.json"))
        if not runs:
            raise ConfigError(f"{folder}: no run.json below it; give a folder of results, such as docs/studies/NAME")
        for run in runs:
            if (run / "checkpoint").exists():
                raise ConfigError(f"{run}: a run's own folder, not stored results; thin the copy under docs/")
            store(run, run)
    return 0


if __name__ == "__main__":
    run_program(main)
