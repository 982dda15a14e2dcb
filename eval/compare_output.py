"""A comparison of runs as text, CSV, LaTeX and HTML.

All but CSV are in percent. Significance: permutation test with Holm's correction.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report_html import Html, Node, page, section, stylesheet, table, tag
from eval.significance import LEVELS, stars
from eval.tables import aligned, percent

Record = dict[str, Any]
SEED_HEAD = ["run", "measure", "seeds", "mean ± sd", "best of n"]
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def as_text(result: Record) -> str:
    """Means with intervals, then the comparisons, then (if there are any) the seeds and the breakdowns."""
    rows = [["run", "measure", "mean", "interval"]]
    rows += [[row["run"], row["measure"], percent(row["mean"]), _interval(row)] for row in result["means"]]
    parts = [f"{result['queries']} queries, percent", aligned(rows, left=2)]
    p_keys = {"p(t)": "t_p", "p(perm)": "permutation_p", "p(t) Holm": "t_p_holm", "p(perm) Holm": "permutation_p_holm"}
    rows = [["run", "measure", "difference", "interval", *p_keys, "", "effect", "win/tie/loss"]]
    for row in result["comparisons"]:
        p_values, mark = [_p(row[key]) for key in p_keys.values()], stars(row["permutation_p_holm"])
        head, counts = [row["run"], row["measure"], _difference(row), _interval(row)], _counts(row, "/")
        rows.append([*head, *p_values, mark, _effect(row), counts])
    levels = ", ".join(f"{mark} p < {level:g}" for level, mark in reversed(LEVELS))
    baseline = result["comparisons"][0]["baseline"]
    parts += [f"against {baseline} ({levels}; effect: mean / sd of the differences)", aligned(rows, left=2)]
    if "over_seeds" in result:
        rows = [SEED_HEAD, *_seeds(result["over_seeds"])]
        parts += ["over seeds (best of n: each query's best run)", aligned(rows, left=2)]
    for name, cells in result.get("breakdowns", {}).items():
        parts += [f"by {name}", aligned(_breakdown(cells), left=2)]
    return "\n\n".join(parts)


def _seeds(rows: Sequence[Record]) -> list[list[str]]:
    lines = []
    for row in rows:
        spread = f"{percent(row['mean'])} ± {percent(row['sd'])}"
        lines.append([row["run"], row["measure"], str(row["seeds"]), spread, percent(row["best_of"])])
    return lines


def _breakdown(cells: Sequence[Record]) -> list[list[str]]:
    """A head, then one line per group, one column per run and measure."""
    columns = list(dict.fromkeys((cell["run"], cell["measure"]) for cell in cells))
    lines: dict[Any, list[str]] = {}
    for cell in cells:
        group = "unknown" if cell["group"] is None else str(cell["group"])
        lines.setdefault(cell["group"], [group, str(cell["queries"])]).append(percent(cell["mean"]))
    return [["", "queries", *(f"{run} {measure}" for run, measure in columns)], *lines.values()]


def as_html(result: Record) -> str:
    """One self-contained page, in the look of the other pages."""
    rows: dict[str, list[Node]] = {}
    for row in result["means"]:
        rows.setdefault(row["run"], [row["run"]]).append(_cell(row))
    about = f"{result['queries']:,} queries, percent, with bootstrap intervals."
    parts = [section("Means", about, table(["", *_measures(result)], rows.values()))]
    baseline = result["comparisons"][0]["baseline"]
    tests = [
        [f"{row['run']}, {row['measure']}", _difference(row), _interval(row), _p(row["t_p_holm"]),
         _p(row["permutation_p_holm"]), _effect(row), _counts(row, " / ")]
        for row in result["comparisons"]
    ]  # fmt: skip
    about = (
        "Differences in points; p of the paired t-test and the paired permutation test, both after Holm's correction; "
        "mean / sd of the differences."
    )
    head = ["", "difference", "interval", "p (t)", "p (permutation)", "effect", "better / same / worse"]
    parts.append(section(f"Against {baseline}", about, table(head, tests)))
    if "over_seeds" in result:
        seeds = [[f"{run}, {measure}", *rest] for run, measure, *rest in _seeds(result["over_seeds"])]
        about = "Best of n takes each query's best run: a bound."
        parts.append(section("Over seeds", about, table(["", *SEED_HEAD[2:]], seeds)))
    for name, cells in result.get("breakdowns", {}).items():
        first, *lines = _breakdown(cells)
        parts.append(section(f"By {name}", "Means in percent.", table(first, lines)))
    top = tag("header", tag("div", tag("h1", "Comparison of runs"), class_="bar-inner"))
    return page("Comparison of runs", stylesheet(), top, tag("main", parts))


def _cell(row: Record) -> Html:
    mean, interval = tag("strong", percent(row["mean"])), tag("span", _interval(row), class_="muted small")
    return tag("span", mean, tag("br"), interval)


def as_csv(result: Record) -> str:
    """One line per run and measure: mean, interval, and the comparison with the baseline (empty for the baseline)."""
    tested = _tested(result)
    fields = [key for key in result["comparisons"][0] if key not in ("run", "measure")]
    names = {"low": "difference_low", "high": "difference_high"}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["run", "measure", "queries", "mean", "low", "high"]
    writer.writerow([*head, *(names.get(field, field) for field in fields)])
    for row in result["means"]:
        test = tested.get((row["run"], row["measure"]), {})
        cells = [row["run"], row["measure"], result["queries"], row["mean"], row["low"], row["high"]]
        writer.writerow([*cells, *(test.get(field, "") for field in fields)])
    return out.getvalue()


def as_latex(result: Record) -> str:
    """Runs as rows, measures as columns, the best mean bold, significance as superscripts; with LaTeX's booktabs."""
    measures, tested = _measures(result), _tested(result)
    best = {measure: max(row["mean"] for row in result["means"] if row["measure"] == measure) for measure in measures}
    lines: dict[str, list[str]] = {}
    for row in result["means"]:
        number = percent(row["mean"])
        number = rf"\textbf{{{number}}}" if row["mean"] == best[row["measure"]] else number
        test = tested.get((row["run"], row["measure"]))
        mark = stars(test["permutation_p_holm"]) if test else ""
        lines.setdefault(row["run"], [_escaped(row["run"])]).append(number + (f"$^{{{mark}}}$" if mark else ""))
    head = " & ".join(["Run", *map(_escaped, measures)])
    body = "\n".join(" & ".join(cells) + r" \\" for cells in lines.values())
    columns = f"l{'r' * len(measures)}"
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def _measures(result: Record) -> list[str]:
    return list(dict.fromkeys(row["measure"] for row in result["means"]))


def _tested(result: Record) -> Mapping[tuple[str, str], Record]:
    return {(row["run"], row["measure"]): row for row in result["comparisons"]}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _difference(row: Record) -> str:
    return f"{100 * row['difference']:+.2f}"


def _effect(row: Record) -> str:
    return "-" if row["effect_size"] is None else f"{row['effect_size']:+.3f}"


def _counts(row: Record, separator: str) -> str:
    return separator.join(str(row[key]) for key in ("wins", "ties", "losses"))


def _interval(row: Record) -> str:
    return f"[{percent(row['low'])}, {percent(row['high'])}]"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
