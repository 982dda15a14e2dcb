"""The README's table of results, out of run folders that differ in their seed: ``python -m eval.readme RUN RUN RUN --write README.md``.

Measures the folders' runs anew and puts the table between the marks ``<!-- table:begin -->`` and ``<!-- table:end -->``; without
``--write`` it is printed. The curves beside it are drawn by ``python -m convsearch.plots``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convsearch.cli import run

if TYPE_CHECKING:
    from eval.report_data import Results

MEASURES = ("MRR", "NDCG@3", "R@10")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"


def markdown(folders: Sequence[Path]) -> str:
    """A row a system, in percent: mean ± standard deviation (n - 1) over the folders where a model wrote the queries, else the one value.

    Raises:
        ValueError: a folder has no runs, or its systems or questions are not those of the first.
    """
    import numpy as np

    from eval.report_data import REWRITERS, SYSTEMS, read_results

    found: list[Results] = []
    for folder in folders:
        results = read_results(folder)
        if results is None:
            raise ValueError(
                f"{folder} has no test.trec with runs beside it: give a run folder as scripts/job_cpu.sh leaves it"
            )
        if results.disagreements:
            raise ValueError(
                f"{folder}: {results.disagreements[0]}; make results.json anew with `python -m eval.summary`"
            )
        if found and (results.qids, list(results.values)) != (found[0].qids, list(found[0].values)):
            raise ValueError(
                f"{folder} has other questions or systems than {folders[0]}: a table takes runs that differ in the seed alone"
            )
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
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{name} needs one line {BEGIN.strip()} and, below it, one line {END}: the table stands between them"
        )
    return text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of the same job with different seeds")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="Markdown file to put the table into (default: print it)"
    )
    args = parser.parse_args()
    from convsearch.files import atomic_write

    table = markdown(args.runs)
    if args.write:
        text = replaced(args.write.read_text(encoding="utf-8"), table, str(args.write))
        with atomic_write(args.write) as file:
            file.write(text)
    else:
        print(table, end="")


if __name__ == "__main__":
    run(main)
