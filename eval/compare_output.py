"""A comparison of runs as text, CSV, LaTeX and HTML. All but CSV are in percent; significance: Holm-corrected permutation test."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.report_html import Node

Record = dict[str, Any]
SEED_HEAD = ["run", "measure", "seeds", "mean ± sd", "best of n"]
LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def stars(p: float) -> str:
    return next((mark for level, mark in LEVELS if p < level), "")


def as_text(result: Record) -> str:
    """Means with intervals, then the comparisons, then (where there are some) the seeds and the breakdowns."""
    rows = [["run", "measure", "mean", "interval"]]
    rows += [[row["run"], row["measure"], _percent(row["mean"]), _interval(row)] for row in result["means"]]
    parts = [f"{result['queries']} queries, percent", _aligned(rows)]
    baseline = result["comparisons"][0]["baseline"]
    rows = [
        [
            "run",
            "measure",
            "difference",
            "interval",
            "p(t)",
            "p(perm)",
            "p(t) Holm",
            "p(perm) Holm",
            "",
            "effect",
            "win/tie/loss",
        ]
    ]
    for row in result["comparisons"]:
        p_values = [_p(row[key]) for key in ("t_p", "permutation_p", "t_p_holm", "permutation_p_holm")]
        counts = f"{row['wins']}/{row['ties']}/{row['losses']}"
        difference = f"{100 * row['difference']:+.2f}"
        effect = "-" if row["effect_size"] is None else f"{row['effect_size']:+.3f}"
        mark = stars(row["permutation_p_holm"])
        rows.append([row["run"], row["measure"], difference, _interval(row), *p_values, mark, effect, counts])
    parts += [
        f"against {baseline} (* p < 0.05, ** p < 0.01, *** p < 0.001; effect: mean / sd of the differences)",
        _aligned(rows),
    ]
    if "over_seeds" in result:
        parts += ["over seeds (best of n: each query's best run)", _aligned([SEED_HEAD, *_seeds(result["over_seeds"])])]
    for name, cells in result.get("breakdowns", {}).items():
        parts += [f"by {name}", _aligned(_breakdown(cells))]
    return "\n\n".join(parts)


def _seeds(rows: Sequence[Record]) -> list[list[str]]:
    return [
        [
            row["run"],
            row["measure"],
            str(row["seeds"]),
            f"{_percent(row['mean'])} ± {_percent(row['sd'])}",
            _percent(row["best_of"]),
        ]
        for row in rows
    ]


def _breakdown(cells: Sequence[Record]) -> list[list[str]]:
    """A head, then one line a group, one column a run and measure."""
    columns = list(dict.fromkeys((cell["run"], cell["measure"]) for cell in cells))
    lines: dict[Any, list[str]] = {}
    for cell in cells:
        group = "unknown" if cell["group"] is None else str(cell["group"])
        lines.setdefault(cell["group"], [group, str(cell["queries"])]).append(_percent(cell["mean"]))
    return [["", "queries", *(f"{run} {measure}" for run, measure in columns)], *lines.values()]


def as_html(result: Record) -> str:
    """One page that needs nothing from outside, in the look of the other pages."""
    from convsearch import files
    from eval import compare
    from eval.report_html import page, table, tag
    from eval.report_sections import section

    style = "".join(
        Path(path).read_text(encoding="utf-8")
        for path in (Path(files.__file__).with_name("pages.css"), Path(compare.__file__).with_name("report.css"))
    )
    measures = list(dict.fromkeys(row["measure"] for row in result["means"]))
    rows: dict[str, list[Node]] = {}
    for row in result["means"]:
        figure = tag("strong", _percent(row["mean"])), tag("br"), tag("span", _interval(row), class_="muted small")
        rows.setdefault(row["run"], [row["run"]]).append(tag("span", figure))
    parts = [
        section(
            "Means",
            f"{result['queries']:,} queries, percent, with bootstrap intervals.",
            table(["", *measures], rows.values()),
        )
    ]
    baseline = result["comparisons"][0]["baseline"]
    tests = [
        [f"{row['run']}, {row['measure']}", f"{100 * row['difference']:+.2f}", _interval(row), _p(row["t_p_holm"]), _p(row["permutation_p_holm"]),
         "-" if row["effect_size"] is None else f"{row['effect_size']:+.3f}", f"{row['wins']} / {row['ties']} / {row['losses']}"]
        for row in result["comparisons"]
    ]  # fmt: skip
    about = "Differences in points; p of the paired t-test and the paired permutation test, both after Holm's correction; mean / sd of the differences."
    head = ["", "difference", "interval", "p (t)", "p (permutation)", "effect", "better / same / worse"]
    parts.append(section(f"Against {baseline}", about, table(head, tests)))
    if "over_seeds" in result:
        seeds = [[f"{run}, {measure}", *rest] for run, measure, *rest in _seeds(result["over_seeds"])]
        parts.append(
            section("Over seeds", "Best of n takes each query's best run: a bound.", table(["", *SEED_HEAD[2:]], seeds))
        )
    for name, cells in result.get("breakdowns", {}).items():
        first, *lines = _breakdown(cells)
        parts.append(section(f"By {name}", "Means in percent.", table(first, lines)))
    top = tag("header", tag("div", tag("h1", "Comparison of runs"), class_="bar-inner"))
    return page("Comparison of runs", style, top, tag("main", parts))


def as_csv(result: Record) -> str:
    """One line a run and measure: mean and interval, and the comparison with the baseline (empty for the baseline itself)."""
    tested = {(row["run"], row["measure"]): row for row in result["comparisons"]}
    fields = [key for key in result["comparisons"][0] if key not in ("run", "measure")]
    names = {"low": "difference_low", "high": "difference_high"}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["run", "measure", "queries", "mean", "low", "high", *(names.get(field, field) for field in fields)]
    )
    for row in result["means"]:
        test = tested.get((row["run"], row["measure"]), {})
        cells = [row["run"], row["measure"], result["queries"], row["mean"], row["low"], row["high"]]
        writer.writerow([*cells, *(test.get(field, "") for field in fields)])
    return out.getvalue()


def as_latex(result: Record) -> str:
    """Runs as rows, measures as columns, the best mean bold, significance as superscripts. Needs the package booktabs."""
    measures = list(dict.fromkeys(row["measure"] for row in result["means"]))
    best = {measure: max(row["mean"] for row in result["means"] if row["measure"] == measure) for measure in measures}
    tested = {(row["run"], row["measure"]): row for row in result["comparisons"]}
    lines: dict[str, list[str]] = {}
    for row in result["means"]:
        number = _percent(row["mean"])
        number = rf"\textbf{{{number}}}" if row["mean"] == best[row["measure"]] else number
        test = tested.get((row["run"], row["measure"]))
        mark = stars(test["permutation_p_holm"]) if test else ""
        lines.setdefault(row["run"], [_escaped(row["run"])]).append(number + (f"$^{{{mark}}}$" if mark else ""))
    head = " & ".join(["Run", *map(_escaped, measures)])
    body = "\n".join(" & ".join(cells) + r" \\" for cells in lines.values())
    return f"\\begin{{tabular}}{{l{'r' * len(measures)}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _interval(row: Record) -> str:
    return f"[{_percent(row['low'])}, {_percent(row['high'])}]"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first two to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
