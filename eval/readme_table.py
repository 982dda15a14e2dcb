"""The README's table of results, and the rewrites drawn for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convsearch.files import read_jsonl
from eval.measures import Floats, evaluate_files
from eval.report_data import Results, read_results
from eval.systems import QUERIES, REWRITERS, SYSTEMS, best_rule, kept_words, rule_row

MEASURES = ("MRR", "NDCG@3", "R@10")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"


def markdown(folders: Sequence[Path]) -> str:
    """One row per system, in percent, and one for the best constant rule if the folder has its validation runs.

    A system whose queries a model wrote has mean ± standard deviation (n - 1) over the folders, the others one value.

    Raises:
        ValueError: a folder has no runs, or its systems or questions are not those of the first.
    """
    found: list[Results] = []
    for folder in folders:
        results = read_results(folder)
        if results is None:
            remedy = "give a run folder as scripts/quickstart.sh writes it"
            raise ValueError(f"{folder} has no test.trec with runs beside it: {remedy}")
        if results.disagreements:
            remedy = "make results.json again with `python -m eval.summary`"
            raise ValueError(f"{folder}: {results.disagreements[0]}; {remedy}")
        if found and (results.qids, list(results.values)) != (found[0].qids, list(found[0].values)):
            rule = "the runs of a table may differ in their seed alone"
            raise ValueError(f"{folder} has other questions or systems than {folders[0]}: {rule}")
        found.append(results)
    validation = sorted((folders[0] / "validation").glob("*.trec"))
    best = best_rule(folders[0] / "validation.trec", validation) if validation else None
    lines = [f"| | {' | '.join(MEASURES)} | kept words |", f"|{'---|' * (2 + len(MEASURES))}"]
    stems = {name: stem for stem, name in SYSTEMS.items()}
    for system in found[0].values:
        stem = stems.get(system, system)
        columns = [[results.values[system][measure].mean() for results in found] for measure in MEASURES]
        rewrites = [folder / QUERIES.get(stem, f"{stem}.jsonl") for folder in folders]
        if all(path.is_file() for path in rewrites):
            columns.append([kept_words(*pair) for pair in zip(rewrites, (r.qids for r in found), strict=True)])
        cells = [_cell(100 * np.array(column), spread=stem in REWRITERS) for column in columns]
        row = " | ".join([*cells, "-"][: 1 + len(MEASURES)])
        lines += [f"| {name} | {row} |" for name in (system, *([rule_row(system)] if stem == best else []))]
    return "\n".join(lines) + "\n"


def drawn(folder: Path, count: int = 10, seed: int = 1) -> str:
    """Rewrites of the model after GRPO, drawn by ``seed``, with the rank of the gold passage ("-": not found)."""
    records = {record["qid"]: record for _, record in read_jsonl(folder / "grpo.jsonl")}
    qids = np.random.default_rng(seed).choice(sorted(records), size=min(count, len(records)), replace=False)
    values = evaluate_files(folder / "grpo.trec", folder / "test.trec", "MRR")
    reciprocal = dict(zip(values.qids, values.values["MRR"], strict=True))
    lines = ["| question before | question | rewrite | gold rank |", "|---|---|---|---|"]
    for qid in qids:
        record = records[qid]
        before = record["context"][-2] if record["context"] else "-"
        rank = str(round(1 / reciprocal[qid])) if reciprocal[qid] else "-"
        cells = (text.replace("|", "/") for text in (before, record["question"], record["rewrite"], rank))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Floats, spread: bool) -> str:
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 and spread else ""
    return f"{values.mean():.1f}{deviation}"


def replaced(text: str, table: str, name: str) -> str:
    """``text`` with ``table`` between the marks.

    Raises:
        ValueError: the text does not have both marks, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} needs one line {BEGIN.strip()} and below it one line {END}: the table goes between")
    return text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :]
