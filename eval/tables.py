"""Tables as text."""

from collections.abc import Mapping, Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1, least: Sequence[int] = (), gap: str = "  ") -> str:
    """Columns of equal width, the first ``left`` flush left, the others flush right.

    Args:
        least: least widths of the first columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(width, *least[i : i + 1], 0) for i, width in enumerate(widths)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)


def percent(value: float, digits: int = 2) -> str:
    """``percent(0.1234)`` is ``"12.34"``."""
    return f"{100 * value:.{digits}f}"


def measure_table(means: Mapping[str, float]) -> str:
    """One measure per line, in percent."""
    return aligned([[name, percent(value)] for name, value in means.items()], least=(0, 6))
