"""A run on one page: ``python -m eval.report outputs/demo_smollm2 --index data/indexes/bm25_demo``.

Writes one HTML file without scripts that opens without a network: results with intervals and significance, training
curves, the gold passage's rank over time and from question to rewrite, and the biggest wins and losses. All figures are
measured again from the folder's runs.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run
from convsearch.files import atomic_write


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.report", "Writes one self-contained HTML page about a run.")
    add = parser.add_argument
    add("run", help="run folder, as scripts/quickstart.sh or convsearch.grpo writes it")
    add("--output", help="HTML file to write (default: report.html in the run folder)")
    add("--index", help="index folder of the runs: adds the passages' text")
    add("--cases", type=int, default=20, help="wins and losses to show, each")
    add("--draws", type=int, default=10_000, help="of the intervals and tests, as in eval.compare")
    add("--seed", type=int, default=1, help="seed of both")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from eval.report_page import report
    from retriever_server.searcher import open_searcher

    index, folder = open_searcher(args.index) if args.index else None, Path(args.run)
    html = report(folder, index, args.cases, args.draws, args.seed)
    output = Path(args.output) if args.output else folder / "report.html"
    with atomic_write(output) as file:
        file.write(html)
    print(f"{output}: {len(html.encode()) / 1024:.0f} KB")


if __name__ == "__main__":
    run(main)
