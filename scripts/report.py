"""Tables of README.md, kernels/README.md and those under docs, from the runs and measurements under docs.

    python -m scripts.report          rewrite the tables
    python -m scripts.report --check  only say whether they are up to date (status 1 if not)

A table stands between a comment that names its source and `<!-- end -->`; nothing in it is typed by hand:

    <!-- runs: FOLDER -->     a row for each run in the folder: metrics.jsonl and run.json, as training leaves them
    <!-- probes: FOLDER -->   a row for each probed checkpoint and mode of its FFNs: probe.json of scripts/probe.py
    <!-- batches: FOLDER -->  a row for each run in the folder: whether its micro-batch fits, and how fast it trains
    <!-- evaluations: FOLDER -->  a row for each way in which a run's model was evaluated on a text: evaluations.jsonl
                              of scripts/evaluate.py, which is copied there from the run's folder
    <!-- headline: FILE -->   a row for each recipe: what it gains and costs, from a file of scripts/law.py
    <!-- law: FILE -->        the same file: effective tokens and speed-ups at equal loss, with their intervals
    <!-- kernels: FILE -->    a row for each contender and shape: kernels.json of scripts/benchmark_kernels.py
    <!-- stages: FILE -->     the same file: where their time goes
    <!-- training: FILE -->   a row for each contender: training.json of scripts/benchmark.py
    <!-- parts: FILE -->      the same file: where the time of a step goes
    <!-- depth: FOLDER -->    a row for each number of layers and contender: such files, and a prediction
    <!-- layouts: FOLDER -->  a row for each layout on several GPUs: such files, and a prediction
    <!-- switches: FOLDER -->  a row for each setting of some keys: such files, and what the keys change
    <!-- faults: FILE -->     a row for each kind of fault and moment: what scripts/chaos.py writes
"""

import re
import sys

from configs.repository import ROOT
from scripts.options import TERMS, Parser
from scripts.tables import TABLES

BLOCK = re.compile(rf"(<!-- ({'|'.join(TABLES)}): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if BLOCK.search(page.read_text())
]


def fill(text: str) -> str:
    """A page's text with every table made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]](ROOT / block[3])}\n{block[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scripts.report",
        description="Rewrite the tables of all pages from the data beside them.",
        epilog=TERMS,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not up to date")
    options = parser.parse_args(arguments)
    stale = [page for page in PAGES if fill(page.read_text()) != page.read_text()]
    if options.check:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        print(f"not up to date: {names}; run python -m scripts.report" if stale else "up to date")
        return int(bool(stale))
    for page in stale:
        page.write_text(fill(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
