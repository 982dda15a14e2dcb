"""The page of eval.report, from the sections that a run folder has something for."""

from pathlib import Path

from eval import report_data as data
from eval import report_sections as sections
from eval.breakdowns import labels_of, means_by
from eval.comparison import compare
from eval.report_html import Html, page, stylesheet, tag
from retriever_server.searcher import Searcher


def report(folder: Path, index: Searcher | None = None, most: int = 20, draws: int = 10_000, seed: int = 1) -> str:
    """The page; ``most``: how many wins and losses, each.

    Raises:
        ValueError: the folder has neither runs nor metrics, or a file is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    results, metrics, shares = data.read_results(folder), data.read_metrics(folder), data.rank_shares(folder)
    if results is None and not metrics and not shares:
        missing = "neither test.trec with runs beside it, nor metrics.jsonl, nor rollouts"
        raise ValueError(f"{folder} has {missing}: name a run's folder")
    parts = [] if results is None else _results(folder, results, draws, seed)
    parts += sections.curves_section(metrics, shares)
    parts += [] if results is None else _cases(folder, results, index, most)
    name, about = folder.resolve().name, [f"{len(results.qids):,} test questions"] if results else []
    about += [f"{sum('reward' in m for m in metrics)} training steps"] if metrics else []
    bar = tag("div", tag("h1", name), tag("p", " · ".join(about), class_="muted"), class_="bar-inner")
    skip = tag("a", "Skip to the results", href="#content", class_="skip")
    return page(f"{name}: report", stylesheet(), skip, tag("header", bar), tag("main", parts, id="content"))


def _results(folder: Path, results: data.Results, draws: int, seed: int) -> list[Html]:
    systems = list(results.values)
    if len(systems) < 2 or len(results.qids) < 2:
        found = f"{len(systems)} runs of {len(results.qids)} questions"
        raise ValueError(f"{folder} has {found}: a comparison needs two of each")
    parts = [sections.results_section(results, compare(results.values, draws, seed))]
    system, rewrites = data.rewriter_of(folder, results) or (None, None)
    if system is not None and system != systems[0]:
        ordered = {name: results.values[name] for name in dict.fromkeys([system, *systems])}
        parts.append(sections.differences_section(system, compare(ordered, draws, seed)))
        parts.append(sections.movement_section(results, systems[0], system))
    if sections.numbered_turns(folder / "test.json"):
        for name, groups in labels_of(results.qids, folder / "test.json", rewrites).items():
            parts.append(sections.breakdown_section(name, means_by(results.qids, groups, results.values), systems))
    return parts


def _cases(folder: Path, results: data.Results, index: Searcher | None, most: int) -> list[Html]:
    found, baseline = data.rewriter_of(folder, results), next(iter(results.values))
    if found is None or found[0] == baseline:
        return []
    system, rewrites = found
    wins, losses = data.cases(results, baseline, system, rewrites, most)
    about = f"Questions whose gold passage moved most {{}}, {system} against the {baseline}, by the change of 1 / rank."
    return [
        sections.cases_section("Biggest wins", about.format("up"), wins, index),
        sections.cases_section("Biggest losses", about.format("down"), losses, index),
    ]
