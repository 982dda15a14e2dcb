"""Which words of a passage match a query, by the analyzer: "running" matches "runs", "cat" not "category"."""

from retriever_server.text import word_break
from retriever_server.text.analyzer import analyze


def marked(query: str, text: str) -> list[tuple[str, bool]]:
    """The text in consecutive pieces, each with whether it is a word whose index terms are in the query.

    ``marked("dogs run", "A dog, running")`` is ``[("A ", False), ("dog", True), (", ", False), ("running", True)]``
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # a page cannot show half surrogate pairs
    terms = set(analyze(query))
    pieces: list[tuple[str, bool]] = []
    end = written = 0
    for token in word_break.tokens(text):
        start = text.index(token, end)
        end = start + len(token)
        if terms.intersection(analyze(token)):
            if start > written:
                pieces.append((text[written:start], False))
            pieces.append((token, True))
            written = end
    if written < len(text):
        pieces.append((text[written:], False))
    return pieces
