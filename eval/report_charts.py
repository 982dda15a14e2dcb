"""Charts as inline SVG, drawn by hand: their colours are the page's, so that one file serves light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.report_html import Html, tag

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 210, 46, 10, 10, 26
WINDOW = 5  # steps of the running mean


@dataclass(frozen=True, slots=True)
class Line:
    """A series of a chart; ``colour`` is 1 or 2. With ``dots`` it is drawn point by point, else raw and as a running mean."""

    name: str
    points: Points
    colour: int = 1
    dots: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from the first at or below ``low`` to the first at or above ``high``: ``ticks(0.1, 1.9)`` is 0, 0.5, 1, 1.5, 2."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def running_mean(points: Points, window: int = WINDOW) -> list[tuple[float, float]]:
    """Each value's mean with those before it, ``window`` at most."""
    values = [y for _, y in points]
    return [(x, sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)) for i, (x, _) in enumerate(points)]


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> Html:
    """A figure of curves over the steps; its text form names the first, last, lowest and highest value of each series."""
    shown = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.colour, line.dots) for line in lines]
    shown = [line for line in shown if line.points]
    if not shown:
        return Html("")
    xs, ys = [x for line in shown for x, _ in line.points], [y for line in shown for _, y in line.points]
    marks = ticks(min(ys), max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (marks[-1] - y) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [_grid(place(left, mark)[1], f"{mark:g}") for mark in marks]
    parts += [_step_label(place(x, marks[0])[0], x) for x in _whole_steps(left, right)]
    for line in shown:
        parts += _drawn(line, place)
    described = "; ".join(
        f"{line.name}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}, lowest {min(y for _, y in line.points):.3g}, "
        f"highest {max(y for _, y in line.points):.3g}"
        for line in shown
    )
    svg = tag(
        "svg",
        tag("title", f"{title}, {unit}"),
        tag("desc", described),
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )
    return tag("figure", tag("h3", title, " ", tag("span", unit, class_="unit small")), svg, class_="chart")


def _grid(y: float, label: str) -> Html:
    rule = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis")
    return Html(rule + tag("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"))


def _step_label(x: float, step: float) -> Html:
    return tag("text", f"{step:g}", x=x, y=HEIGHT - 8, text_anchor="middle")


def _whole_steps(left: float, right: float) -> list[float]:
    return [mark for mark in ticks(left, right, 5) if left <= mark <= right and mark == int(mark)]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _drawn(line: Line, place: Place) -> list[Html]:
    curve = [place(*point) for point in line.points]
    if line.dots:
        dots = [
            tag(
                "circle",
                tag("title", f"{line.name}, step {x:g}: {y:.4g}"),
                cx=at[0],
                cy=at[1],
                r=4,
                class_=f"d{line.colour}",
            )
            for at, (x, y) in zip(curve, line.points, strict=True)
        ]
        return [tag("path", d=_path(curve), class_=f"curve raw s{line.colour}"), *dots]
    smooth = [place(*point) for point in running_mean(line.points)]
    return [
        tag("path", d=_path(curve), class_=f"curve raw s{line.colour}"),
        tag("path", d=_path(smooth), class_=f"curve s{line.colour}"),
    ]


def stacked(title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]]) -> Html:
    """Shares (each column's sum to 1) as stacked bars, the first name at the bottom; ``columns``: (label, share of each name)."""
    width, height = 1000, 260
    slot = (width - LEFT - RIGHT) / len(columns)
    bar = max(0.5, min(slot - 3, 64)) if slot > 4 else slot
    span = height - TOP - BOTTOM
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = round(TOP + (1 - share) * span, 1)
        parts.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, class_="axis"))
        parts.append(tag("text", f"{share:.0%}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    every = max(1, math.ceil(len(columns) / 12))
    for i, (label, shares) in enumerate(columns):
        x, y = LEFT + i * slot + (slot - bar) / 2, TOP + span
        for j, share in enumerate(shares):
            y -= share * span
            if share:
                tip = tag("title", f"{label}: {names[j]} {share:.1%}")
                parts.append(
                    tag(
                        "rect",
                        tip,
                        x=round(x, 2),
                        y=round(y, 2),
                        width=round(bar, 2),
                        height=round(share * span, 2),
                        class_=f"r{j + 1}",
                    )
                )
        if i % every == 0:
            parts.append(
                tag("text", label.removeprefix("step "), x=round(x + bar / 2, 1), y=height - 8, text_anchor="middle")
            )
    described = "; ".join(
        f"{name}: {columns[0][1][j]:.0%} in {columns[0][0]}, {columns[-1][1][j]:.0%} in {columns[-1][0]}"
        for j, name in enumerate(names)
    )
    svg = tag("svg", tag("title", title), tag("desc", described), parts, viewBox=f"0 0 {width} {height}", role="img")
    return tag(
        "figure",
        tag("div", tag("div", svg, class_="wide"), class_="scroll", tabindex="0"),
        legend([(name, f"r{j + 1}") for j, name in enumerate(names)]),
        class_="chart",
    )


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    return tag(
        "ul", [tag("li", tag("span", class_=f"swatch {style}"), name) for name, style in entries], class_="legend"
    )


def interval_bar(mean: float, low: float, high: float, top: float) -> Html:
    """A row's mean as a dot on its interval, both in units of ``top``, the right edge; the numbers stand in the next cell."""
    x = [round(4 + value / top * 152, 1) for value in (low, mean, high)]
    parts = [
        tag("line", x1=4, x2=156, y1=9, y2=9, class_="axis"),
        tag("line", x1=x[0], x2=x[2], y1=9, y2=9, class_="s1", stroke_width=3),
        tag("circle", cx=x[1], cy=9, r=5, class_="d1"),
    ]
    return tag("svg", parts, viewBox="0 0 160 18", class_="interval", aria_hidden="true")
