"""Draw runs from what they logged: loss, sparsity health and throughput in one PNG.

    python -m scripts.plot outputs/run                        # writes outputs/run/plot.png
    python -m scripts.plot outputs/dense outputs/venom        # compares: writes outputs/loss.png, beside the runs
    python -m scripts.plot outputs/dense outputs/venom --against time

A run's dump folder holds `metrics.jsonl`, one JSON object a logged step (recipes/metrics.py lists its keys), and
`run.json`, its resolved configuration. scripts/pictures.py says how to read the picture.
"""

import sys
from pathlib import Path

if not __package__:  # started as `python scripts/plot.py`: look imports up from the repository, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.errors import run_program
from scripts.options import TERMS, Parser, add_out
from scripts.pictures import plot
from scripts.runs import split_paths


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m scripts.plot", description="Draw runs from their metrics.jsonl.", epilog=TERMS)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a dump folder or a metrics.jsonl")
    add_out(parser, "OUT.png", "default: RUN/plot.png, or for several runs loss.png in the folder that holds them")
    parser.add_argument(
        "--smooth", metavar="N", type=int, help="logged steps in the running mean; default: a 40th of the run"
    )
    parser.add_argument(
        "--against", choices=("tokens", "time"), default="tokens", help="the x axis: tokens, or training time"
    )
    options = parser.parse_args(arguments)
    runs, others = split_paths(options.runs)
    if others:
        print(f"left out, no run: {', '.join(map(str, others))}")
    print(f"wrote {plot(runs, options.out, options.smooth, options.against)}")


if __name__ == "__main__":
    run_program(main)
