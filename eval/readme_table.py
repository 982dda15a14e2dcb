"""The README's table of results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.report_data import REWRITERS, SYSTEMS, Results, read_results

MEASURES = ("MRR", "NDCG@3", "R@10")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"


def markdown(folders: Sequence[Path]) -> str:
    """One row per system, in percent.

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
    written = {SYSTEMS[stem] for stem in REWRITERS}
    lines = [f"| | {' | '.join(MEASURES)} |", f"|{'---|' * (1 + len(MEASURES))}"]
    for system in found[0].values:
        cells = []
        for measure in MEASURES:
            means = 100 * np.array([results.values[system][measure].mean() for results in found])
            spread = f" ± {means.std(ddof=1):.1f}" if len(means) > 1 and system in written else ""
            cells.append(f"{means.mean():.1f}{spread}")
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(text: str, table: str, name: str) -> str:
    """``text`` with ``table`` between the marks.

    Raises:
        ValueError: the text does not have both marks, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} needs one line {BEGIN.strip()} and below it one line {END}: the table goes between")
    return text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :]
