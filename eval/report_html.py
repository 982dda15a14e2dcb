"""HTML that cannot be injected into: text is escaped unless it was built here."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Markup that is taken as it is; every other string is text."""

    __slots__ = ()


VOID = {"br", "circle", "line", "path", "meta", "link"}  # elements without content

Node = str | Html | Iterable["Node"] | None


def tag(name: str, *children: Node, **attributes: Any) -> Html:
    """``tag("p", "a < b", class_="x")`` is ``<p class="x">a &lt; b</p>``; None leaves an attribute out, ``_`` stands for ``-``."""
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
    """Escapes what is not markup and joins what is a sequence; None is nothing. Half surrogate pairs have no UTF-8 form and become '?'."""
    if node is None:
        return Html("")
    if isinstance(node, Html):
        return node
    if isinstance(node, str):
        return Html(html.escape(node.encode("utf-8", "replace").decode("utf-8")))
    return Html("".join(map(text, node)))


def table(head: Sequence[Node], rows: Iterable[Sequence[Node]], caption: Node = None, numeric_from: int = 1) -> Html:
    """A table whose first column names its rows; columns from ``numeric_from`` on stand to the right. It scrolls where it is too wide."""

    def cell(name: str, index: int, content: Node, scope: str | None = None) -> Html:
        return tag(name, content, class_="num" if index >= numeric_from else None, scope=scope)

    lines = [
        tag(
            "tr",
            [cell("th" if i == 0 else "td", i, content, "row" if i == 0 else None) for i, content in enumerate(row)],
        )
        for row in rows
    ]
    header = tag("thead", tag("tr", [cell("th", i, content, "col") for i, content in enumerate(head)]))
    return tag(
        "div",
        tag("table", tag("caption", caption) if caption else None, header, tag("tbody", lines)),
        class_="scroll",
        tabindex="0",
    )


def page(title: str, style: str, *body: Node) -> str:
    """A whole document that needs nothing from outside."""
    if "</" in style:
        raise AssertionError("a style sheet cannot close its own element")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}{tag("title", title)}\n<style>\n{style}</style>\n</head>\n{tag("body", body)}\n</html>\n'
