"""A run on one page: ``python -m eval.report outputs/demo_smollm2 --index data/indexes/bm25_demo``.

One HTML file without scripts that opens without a network: results with intervals and significance, training curves, the gold passage's rank
over time and from question to rewrite, and the biggest wins and losses. The figures are measured anew from the folder's runs.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from convsearch.cli import run as run_main

if TYPE_CHECKING:
    from eval import report_data as data
    from eval.report_html import Html
    from retriever_server.searcher import Searcher


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description="Writes one self-contained HTML page about a run."
    )
    parser.add_argument("run", help="run folder, as scripts/job_cpu.sh leaves it, or one of convsearch.grpo")
    parser.add_argument("--output", help="HTML file to write (default: report.html in the run folder)")
    parser.add_argument("--index", help="index folder that was searched: adds the passages' text")
    parser.add_argument("--cases", type=int, default=20, help="wins and losses to show, each (20)")
    parser.add_argument(
        "--draws", type=int, default=10_000, help="of the intervals and tests, as in eval.compare (10,000)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of both (1)")
    return parser


def report(folder: Path, index: "Searcher | None" = None, most: int = 20, draws: int = 10_000, seed: int = 1) -> str:
    """The page.

    Raises:
        ValueError: the folder has neither runs nor metrics, or a file is wrong.
    """
    from convsearch import files
    from eval import report_data as data
    from eval import report_sections as sections
    from eval.report_html import page, tag

    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    results, metrics, shares = data.read_results(folder), data.read_metrics(folder), data.rank_shares(folder)
    if results is None and not metrics and not shares:
        raise ValueError(
            f"{folder} has neither test.trec with runs beside it, nor metrics.jsonl, nor rollouts: name a run's folder"
        )
    parts: list[Html] = []
    if results is not None:
        parts += _results(folder, results, draws, seed)
    parts += sections.curves_section(metrics, shares)
    if results is not None:
        parts += _cases(folder, results, index, most)
    name = folder.resolve().name
    about = [
        f"{len(results.qids):,} test questions" if results else "",
        f"{sum('reward' in m for m in metrics)} training steps" if metrics else "",
    ]
    head = tag(
        "header",
        tag("div", tag("h1", name), tag("p", " · ".join(filter(None, about)), class_="muted"), class_="bar-inner"),
    )
    style = "".join(
        Path(path).read_text(encoding="utf-8")
        for path in (Path(files.__file__).with_name("pages.css"), Path(__file__).with_suffix(".css"))
    )
    skip = tag("a", "Skip to the results", href="#content", class_="skip")
    return page(f"{name}: report", style, skip, head, tag("main", parts, id="content"))


def _results(folder: Path, results: "data.Results", draws: int, seed: int) -> "list[Html]":
    from eval import report_data as data
    from eval import report_sections as sections
    from eval.breakdowns import labels_of, means_by
    from eval.compare import compare

    systems = list(results.values)
    if len(systems) < 2 or len(results.qids) < 2:
        raise ValueError(
            f"{folder} has {len(systems)} runs of {len(results.qids)} questions: a comparison needs two of each"
        )
    parts = [sections.results_section(results, compare(results.values, draws, seed))]
    found = data.rewriter_of(folder, results)
    if found is not None and found[0] != systems[0]:
        first = {found[0]: results.values[found[0]]} | {
            name: results.values[name] for name in systems if name != found[0]
        }
        parts.append(sections.differences_section(found[0], compare(first, draws, seed)))
        parts.append(sections.movement_section(results, systems[0], found[0]))
    if sections.numbered_turns(folder / "test.json"):
        for name, groups in labels_of(results.qids, folder / "test.json", found[1] if found else None).items():
            parts.append(sections.breakdown_section(name, means_by(results.qids, groups, results.values), systems))
    return parts


def _cases(folder: Path, results: "data.Results", index: "Searcher | None", most: int) -> "list[Html]":
    from eval import report_data as data
    from eval import report_sections as sections

    found, baseline = data.rewriter_of(folder, results), next(iter(results.values))
    if found is None or found[0] == baseline:
        return []
    wins, losses = data.cases(results, baseline, found[0], found[1], most)
    about = (
        f"Questions whose gold passage moved most {{}}, {found[0]} against the {baseline}, by the change of 1 / rank."
    )
    return [
        sections.cases_section("Biggest wins", about.format("up"), wins, index),
        sections.cases_section("Biggest losses", about.format("down"), losses, index),
    ]


def main() -> None:
    args = arguments().parse_args()
    from convsearch.files import atomic_write

    index = None
    if args.index:
        from retriever_server.searcher import open_searcher

        index = open_searcher(args.index)
    folder = Path(args.run)
    html = report(folder, index, args.cases, args.draws, args.seed)
    output = Path(args.output) if args.output else folder / "report.html"
    with atomic_write(output) as file:
        file.write(html)
    print(f"{output}: {len(html.encode()) / 1024:.0f} KB")


if __name__ == "__main__":
    run_main(main)
