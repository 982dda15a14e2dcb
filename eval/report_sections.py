"""The sections of a report; a section is left out if the run has nothing for it."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from convsearch.files import read_jsonl
from eval import report_charts as charts
from eval import report_data as data
from eval.report_html import Html, Node, section, table, tag
from eval.significance import stars
from eval.tables import percent
from retriever_server.searcher import Searcher
from retriever_server.text.highlight import marked

Record = dict[str, Any]
# metric of metrics.jsonl -> (title, unit); a metric and its val_ twin share a chart
CURVES = {
    "reward": ("Reward", "mean over samples"),
    "mrr": ("Reciprocal rank", "mean over samples"),
    "format_rate": ("Format kept", "share of samples"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "response_tokens": ("Response length", "tokens"),
    "spread_rate": ("Groups that teach", "share with differing rewards"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "loss": ("Loss", "per token"),
}

PAPER: dict[str, dict[str, list[float]]] = json.loads(
    Path(__file__).with_name("paper_published.json").read_text(encoding="utf-8")
)["rows"]  # "data set, retriever" -> system -> MRR, NDCG@3, R@10, R@100 in percent
TEST_SETS = {"TopiOCQA": ("topiocqa-dev_", (2514,)), "QReCC": ("QReCC-Test_", (8124, 8209))}


def paper_set(qids: Sequence[str], golds: Mapping[str, Sequence[str]]) -> str | None:
    """The paper's test set that these queries are; None for a part of one, and for proxy passages."""
    for name, (prefix, sizes) in TEST_SETS.items():
        stand_in = any(docid.startswith("proxy-") for docids in golds.values() for docid in docids)
        if len(qids) in sizes and all(qid.startswith(prefix) for qid in qids) and not stand_in:
            return name
    return None


def results_section(results: data.Results, comparison: Mapping[str, list[Record]]) -> Html:
    """Every system with its intervals, marked if it differs from the first; below, the paper's for the same data."""
    baseline, measures = next(iter(results.values)), data.MEASURES.split()
    means = {(row["run"], row["measure"]): row for row in comparison["means"]}
    tests = {(row["run"], row["measure"]): row for row in comparison["comparisons"]}
    top = max(row["high"] for row in comparison["means"] if row["measure"] == "MRR") or 1.0

    def cell(system: str, measure: str) -> Html:
        row, test = means[system, measure], tests.get((system, measure))
        mark = tag("span", stars(test["permutation_p_holm"]) if test else "", class_="stars")
        interval = tag("span", f"{percent(row['low'], 1)} – {percent(row['high'], 1)}", class_="muted small")
        return tag("span", tag("strong", percent(row["mean"], 1)), mark, tag("br"), interval)

    rows: list[list[Node]] = []
    for system in results.values:
        row = means[system, "MRR"]
        bar = charts.interval_bar(row["mean"], row["low"], row["high"], top)
        rows.append([system, bar, *(cell(system, measure) for measure in measures)])
    about = (
        f"{len(results.qids):,} questions, retriever {results.retriever}, percent, with 95 % bootstrap intervals over "
        f"the questions. Against the {baseline}: *\u00a0p\u00a0<\u00a00.05, **\u00a0p\u00a0<\u00a00.01, "
        "***\u00a0p\u00a0<\u00a00.001, permutation test, Holm's correction over the table."
    )
    parts: list[Node] = [table(["", "MRR", *measures], rows, numeric_from=2)]
    parts += [tag("p", "These do not agree: ", fault, class_="bad") for fault in results.disagreements]
    data_set = paper_set(results.qids, results.golds)
    figures = PAPER.get(f"{data_set}, {results.retriever}")
    if figures:
        lines = [[name, *(f"{value:.1f}" for value in values)] for name, values in figures.items()]
        caption = f"The paper's figures: {data_set}, {results.retriever} (arXiv 2505.15776)"
        parts.append(table(["", *measures], lines, caption))
    else:
        why = "The paper's figures are not shown: they are of the whole test sets of TopiOCQA and QReCC."
        parts.append(tag("p", why, class_="muted small"))
    return section("Results", about, parts)


def differences_section(system: str, comparison: Mapping[str, list[Record]]) -> Html:
    """The system that the report looks into against every other, on MRR."""
    rows: list[list[Node]] = []
    for row in comparison["comparisons"]:
        if row["measure"] != "MRR":
            continue
        low, high = -row["high"], -row["low"]
        sign = "good" if low > 0 else "bad" if high < 0 else "muted"
        difference = tag("strong", _signed(-row["difference"]), class_=sign)
        effect = "–" if row["effect_size"] is None else f"{-row['effect_size']:+.2f}".replace("-", "−")
        p = "< 0.001" if row["permutation_p_holm"] < 0.001 else f"{row['permutation_p_holm']:.3f}"
        interval, counts = f"{_signed(low)} to {_signed(high)}", f"{row['losses']} / {row['ties']} / {row['wins']}"
        rows.append([f"against {row['run']}", difference, interval, p, effect, counts])
    about = (
        "Difference of the MRR in points with its 95 % interval, p of a paired permutation test (Holm), "
        "mean / sd of the differences."
    )
    found = table(["", "MRR", "interval", "p", "effect", "better / same / worse"], rows)
    return section(f"{system[0].upper()}{system[1:]} against the others", about, found)


def breakdown_section(name: str, cells: Sequence[Record], systems: Sequence[str]) -> Html:
    """MRR by turn number, topic switch, history length and so on."""
    counts = {cell["group"]: cell["queries"] for cell in cells}
    means = {(cell["group"], cell["run"]): cell["mean"] for cell in cells if cell["measure"] == "MRR"}
    groups = (tag("span", f"{group or '?'}", tag("br"), tag("span", f"n = {n}")) for group, n in counts.items())
    head: list[Node] = ["", *groups]
    rows = [[system, *(percent(means[group, system], 1) for group in counts)] for system in systems]
    return section(f"By {name}", "MRR in percent; n is how many questions are in a column.", table(head, rows))


def curves_section(records: Sequence[Record], shares: Sequence[tuple[str, Sequence[float]]]) -> list[Html]:
    """Training curves, the gold passage's rank over time, and the figures behind them."""
    figures, parts = [], []
    for name, (title, unit) in CURVES.items():
        training = charts.Line("training", _points(records, name))
        held_out = charts.Line("held-out", _points(records, f"val_{name}"), colour=2, dots=True)
        figures.append(charts.line_chart(title, unit, [training, held_out]))
    figures = [figure for figure in figures if figure]
    if figures:
        mean = f"training: each step, and the mean of {charts.WINDOW} steps"
        key = charts.legend([(mean, "curve-1"), ("held-out conversations", "curve-2")])
        grid = tag("div", figures, class_="grid")
        parts.append(section("Training", "Over the optimiser steps.", key, grid, _figures_table(records)))
    if shares:
        about = "Where the retriever put the gold passage for the samples of each step."
        chart = charts.stacked("Share of samples by gold rank", data.BUCKETS, shares)
        parts.append(section("Gold rank over time", about, chart))
    return parts


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    found = ((record["step"] + 1, record.get(name)) for record in records)
    return [(step, float(value)) for step, value in found if isinstance(value, int | float)]


def _figures_table(records: Sequence[Record], most: int = 100) -> Html:
    names = [name for name in CURVES if any(name in record for record in records)]
    every = -(-len(records) // most)
    rows = [
        [str(record["step"] + 1), *(f"{record[name]:.4g}" if name in record else "" for name in names)]
        for record in records[::every]
        if any(name in record for name in names)
    ]
    return tag("details", tag("summary", "The figures"), table(["step", *(CURVES[name][0] for name in names)], rows))


def movement_section(results: data.Results, baseline: str, system: str) -> Html:
    """How many questions went from which rank to which."""
    before, after = results.ranks(baseline), results.ranks(system)
    counts = [[0] * 4 for _ in range(4)]
    for b, a in zip(before, after, strict=True):
        counts[data.bucket(b)][data.bucket(a)] += 1
    pairs = [(data.reciprocal(b), data.reciprocal(a)) for b, a in zip(before, after, strict=True)]
    better, worse = sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)
    names = data.BUCKETS[:4]
    rows: list[list[Node]] = []
    for i, name in enumerate(names):
        cells: list[Node] = []
        for j in range(4):
            kind = "good" if j < i else "bad" if j > i else ""
            cells.append(tag("span", f"{counts[i][j]}", class_=f"chip {kind}" if counts[i][j] else "muted"))
        rows.append([name, *cells, str(sum(counts[i]))])
    totals: list[Node] = ["all", *(str(sum(counts[i][j] for i in range(4))) for j in range(4)), str(len(pairs))]
    about = f"The gold passage's rank: rows by the {baseline}, columns {system}. Green moved up, red moved down."
    good, bad = tag("strong", f"{better}", class_="good"), tag("strong", f"{worse}", class_="bad")
    shares = tag("p", good, " questions better, ", f"{len(pairs) - better - worse} the same, ", bad, " worse.")
    return section("Rank movement", about, shares, table(["", *names, "all"], [*rows, totals]))


def cases_section(title: str, about: str, chosen: Sequence[data.Case], index: Searcher | None) -> Html:
    return section(title, about, [_case(case, number, index) for number, case in enumerate(chosen, start=1)])


def _case(case: data.Case, number: int, index: Searcher | None) -> Html:
    record = case.record
    kind = "good" if case.gain > 0 else "bad"
    head = (
        tag("span", f"{number}", class_="place muted"),
        tag("span", str(record["question"]), class_="asked"),
        tag("span", _rank(case.before), " → ", _rank(case.after), class_=f"chip {kind}"),
    )
    rewrite = str(record.get("rewrite", ""))
    fallback = tag("span", "fell back to the raw question", class_="chip bad") if record.get("fallback") else None
    parts: list[Node] = [tag("h3", "Conversation"), _talk(record)]
    if record.get("reasoning_content"):
        parts += [tag("h3", "Thinking"), tag("p", str(record["reasoning_content"]))]
    parts += [tag("h3", "Rewrite"), tag("p", rewrite, " ", fallback)]
    if case.hits or case.golds:
        parts += [tag("h3", "Top passages of the rewrite"), _passages(case, rewrite, index)]
    return tag("details", tag("summary", head), tag("div", parts, class_="case-body"), class_="case", open=number == 1)


def _talk(record: Record) -> Html:
    said = [*map(str, record.get("context", [])), tag("strong", str(record["question"]))]
    last = len(said) - 1
    speakers = ["Q" if i == last else "QA"[i % 2] for i in range(len(said))]
    items = [tag("li", tag("span", who, class_="who"), text) for who, text in zip(speakers, said, strict=True)]
    return tag("ol", items, class_="talk")


def _passages(case: data.Case, rewrite: str, index: Searcher | None) -> list[Html]:
    found = [docid for docid, _ in case.hits]
    shown: list[tuple[str, str]] = [(docid, f"{place}") for place, docid in enumerate(found, start=1)]
    shown += [(docid, _rank(case.after)) for docid in case.golds if docid not in found]
    texts: Mapping[str, str] = {}
    if index is not None:
        known = [docid for docid, _ in shown if not index.missing([docid])]
        texts = dict(zip(known, index.contents(known), strict=True))
    return [
        tag("div", tag("div", tag("span", place, class_="muted"), " ", tag("span", docid, class_="mono"), " ",
                       tag("span", "gold", class_="chip good") if docid in case.golds else None),
            tag("div", _marked(rewrite, texts[docid])) if docid in texts else None,
            class_="passage gold" if docid in case.golds else "passage")
        for docid, place in shown
    ]  # fmt: skip


def _marked(query: str, passage: str, most: int = 600) -> list[Node]:
    cut = passage if len(passage) <= most else passage[:most].rsplit(" ", 1)[0] + " …"
    return [tag("mark", piece) if hit else piece for piece, hit in marked(query, cut)]


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else f"rank {rank}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def numbered_turns(path: Path) -> bool:
    """Whether the conversations say which turn each question is."""
    return path.is_file() and all(isinstance(record.get("turn_id"), int) for _, record in islice(read_jsonl(path), 1))
