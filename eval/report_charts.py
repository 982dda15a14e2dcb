"""Charts as inline SVG. Their colours are the page's, so that one file serves light and dark."""

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
    """A series of a chart; ``colour`` is 1 or 2. It is drawn as dots, or raw and as a running mean."""

    name: str
    points: Points
    colour: int = 1
    dots: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose ``low`` and ``high``: ``ticks(0.1, 1.9)`` is 0, 0.5, 1, 1.5, 2."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def running_mean(points: Points, window: int = WINDOW) -> list[tuple[float, float]]:
    """The mean of each value and those before it, at most ``window`` of them."""
    values = [y for _, y in points]
    return [(x, sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)) for i, (x, _) in enumerate(points)]


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> Html:
    """A figure of curves over the steps; its text form has the first, last, lowest and highest value of each series."""
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

    parts = [node for mark in marks for node in _rule(place(left, mark)[1], f"{mark:g}", WIDTH)]
    for step in ticks(left, right, 5):
        if left <= step <= right and step == int(step):
            x = place(step, marks[0])[0]
            parts.append(tag("text", f"{step:g}", x=x, y=HEIGHT - 8, text_anchor="middle"))
    for line in shown:
        parts += _drawn(line, place)
    svg = _svg(f"{title}, {unit}", "; ".join(map(_described, shown)), parts, WIDTH, HEIGHT)
    return tag("figure", tag("h3", title, " ", tag("span", unit, class_="unit small")), svg, class_="chart")


def _described(line: Line) -> str:
    values = [y for _, y in line.points]
    ends = f"from {values[0]:.3g} to {values[-1]:.3g}"
    return f"{line.name}: {ends}, lowest {min(values):.3g}, highest {max(values):.3g}"


def _svg(title: str, described: str, parts: Sequence[Html], width: int, height: int) -> Html:
    head = tag("title", title), tag("desc", described)
    return tag("svg", head, parts, viewBox=f"0 0 {width} {height}", role="img")


def _rule(y: float, label: str, width: int) -> list[Html]:
    """A horizontal line with its label at the left."""
    line = tag("line", x1=LEFT, x2=width - RIGHT, y1=y, y2=y, class_="axis")
    return [line, tag("text", label, x=LEFT - 6, y=y + 4, text_anchor="end")]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _drawn(line: Line, place: Place) -> list[Html]:
    curve = [place(*point) for point in line.points]
    raw = tag("path", d=_path(curve), class_=f"curve raw s{line.colour}")
    if not line.dots:
        smooth = [place(*point) for point in running_mean(line.points)]
        return [raw, tag("path", d=_path(smooth), class_=f"curve s{line.colour}")]
    dots = [raw]
    for (cx, cy), (x, y) in zip(curve, line.points, strict=True):
        tip = tag("title", f"{line.name}, step {x:g}: {y:.4g}")
        dots.append(tag("circle", tip, cx=cx, cy=cy, r=4, class_=f"d{line.colour}"))
    return dots


def stacked(title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]]) -> Html:
    """Shares (each column's sum to 1) as stacked bars, the first name at the bottom.

    Args:
        columns: (label, share of each name).
    """
    width, height = 1000, 260
    slot = (width - LEFT - RIGHT) / len(columns)
    bar = max(0.5, min(slot - 3, 64)) if slot > 4 else slot
    span = height - TOP - BOTTOM
    shares = (0, 0.25, 0.5, 0.75, 1)
    parts = [node for s in shares for node in _rule(round(TOP + (1 - s) * span, 1), f"{s:.0%}", width)]
    every = max(1, math.ceil(len(columns) / 12))
    for i, (label, found) in enumerate(columns):
        x, y = LEFT + i * slot + (slot - bar) / 2, float(TOP + span)
        for j, share in enumerate(found):
            y -= share * span
            if share:
                tip = tag("title", f"{label}: {names[j]} {share:.1%}")
                sides = {"width": round(bar, 2), "height": round(share * span, 2)}
                parts.append(tag("rect", tip, x=round(x, 2), y=round(y, 2), **sides, class_=f"r{j + 1}"))
        if i % every == 0:
            middle, shown = round(x + bar / 2, 1), label.removeprefix("step ")
            parts.append(tag("text", shown, x=middle, y=height - 8, text_anchor="middle"))
    (first, before), (last, after) = columns[0], columns[-1]
    described = "; ".join(
        f"{name}: {before[j]:.0%} in {first}, {after[j]:.0%} in {last}" for j, name in enumerate(names)
    )
    wide = tag("div", _svg(title, described, parts, width, height), class_="wide")
    key = legend([(name, f"r{j + 1}") for j, name in enumerate(names)])
    return tag("figure", tag("div", wide, class_="scroll", tabindex="0"), key, class_="chart")


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    items = [tag("li", tag("span", class_=f"swatch {style}"), name) for name, style in entries]
    return tag("ul", items, class_="legend")


def interval_bar(mean: float, low: float, high: float, top: float) -> Html:
    """A row's mean as a dot on its interval, in units of ``top``, the right edge. The next cell has the numbers."""
    x = [round(4 + value / top * 152, 1) for value in (low, mean, high)]
    parts = [
        tag("line", x1=4, x2=156, y1=9, y2=9, class_="axis"),
        tag("line", x1=x[0], x2=x[2], y1=9, y2=9, class_="s1", stroke_width=3),
        tag("circle", cx=x[1], cy=9, r=5, class_="d1"),
    ]
    return tag("svg", parts, viewBox="0 0 160 18", class_="interval", aria_hidden="true")
