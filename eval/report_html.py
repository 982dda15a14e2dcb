"""HTML that is safe from injection: text is escaped unless this module made it."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convsearch.pages import STYLE


class Html(str):
    """Markup, which is not escaped; every other string is text."""

    __slots__ = ()


VOID = {"br", "circle", "line", "path", "meta", "link"}  # elements without content

Node = str | Html | Iterable["Node"] | None


def tag(name: str, *children: Node, **attributes: Any) -> Html:
    """``tag("p", "a < b", class_="x")`` is ``<p class="x">a &lt; b</p>``.

    None leaves an attribute out; ``_`` in its name becomes ``-``.
    """
    words = [
        f'{key.rstrip("_").replace("_", "-")}="{text(str(value))}"' if value is not True else key
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    opening = " ".join([name, *words])
    if name in VOID and not children:
        return Html(f"<{opening}/>")
    return Html(f"<{opening}>{text(children)}</{name}>")


def text(node: Node) -> Html:
    """Escapes what is not markup and joins what is a sequence; None is nothing.

    Half a surrogate pair has no UTF-8 form and becomes '?'.
    """
    if node is None:
        return Html("")
    if isinstance(node, Html):
        return node
    if isinstance(node, str):
        return Html(html.escape(node.encode("utf-8", "replace").decode("utf-8")))
    return Html("".join(map(text, node)))


def table(head: Sequence[Node], rows: Iterable[Sequence[Node]], caption: Node = None, numeric_from: int = 1) -> Html:
    """A table whose first column names its rows; columns from ``numeric_from`` on are flush right."""

    def line(contents: Sequence[Node], names: Sequence[str], scopes: Sequence[str | None]) -> Html:
        cells = enumerate(zip(contents, names, scopes, strict=True))
        return tag("tr", [tag(n, c, class_="num" if i >= numeric_from else None, scope=s) for i, (c, n, s) in cells])

    others = len(head) - 1
    lines = [line(row, ["th"] + ["td"] * others, ["row"] + [None] * others) for row in rows]
    header = tag("thead", line(head, ["th"] * len(head), ["col"] * len(head)))
    content = tag("table", tag("caption", caption) if caption else None, header, tag("tbody", lines))
    return tag("div", content, class_="scroll", tabindex="0")


def section(title: str, about: Node, *content: Node) -> Html:
    anchor = title.lower().replace(" ", "-")
    head = tag("h2", title, id=anchor), tag("p", about, class_="muted small")
    return tag("section", head, content, class_="panel", aria_labelledby=anchor)


def stylesheet() -> str:
    """The look of all pages, then that of reports."""
    paths = STYLE, Path(__file__).with_name("report.css")
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def page(title: str, style: str, *body: Node) -> str:
    """A self-contained document."""
    assert "</" not in style, "a style sheet cannot close its own element"
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
        f"{tag('title', title)}\n<style>\n{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{tag("body", body)}\n</html>\n'
