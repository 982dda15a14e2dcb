"""Whether an index has the gold passages of the data: found out before the first step."""

from collections.abc import Sequence

from convsearch.retriever.client import RetrieverClient


def rows_without_gold(
    retriever: RetrieverClient, golds: Sequence[tuple[str, Sequence[str]]], where: str, skip_bad: int, flag: str
) -> set[int]:
    """The numbers of the queries of which a gold passage is not in the index: at most ``skip_bad``.

    Args:
        golds: (query id, docids of its gold passages) of each query.
        where: the files, for the error.
        flag: how users set ``skip_bad``, for the error.

    Raises:
        ValueError: there are more, or the index has none of the gold passages; names count, files and examples.
        RetrieverError: as ``RetrieverClient.missing``.
    """
    docids = sorted({docid for _, own in golds for docid in own})
    absent = set(retriever.missing(docids))
    bad = {number: docid for number, (_, own) in enumerate(golds) for docid in own if docid in absent}
    index = retriever.index_id() if bad else ""
    if docids and len(absent) == len(docids):
        fault = f"the index {index} has none of the {len(docids)} gold passages of {where}, for example {docids[0]!r}"
        raise ValueError(f"{fault}: use the index of their collection")
    if len(bad) > skip_bad:
        first = ", ".join(f"{golds[number][0]} ({docid})" for number, docid in list(bad.items())[:3])
        fault = f"{len(bad)} of {len(golds)} queries of {where} have a gold passage that the index {index} lacks"
        remedy = f"use the index of their collection, or leave them out with {flag}={len(bad)}"
        raise ValueError(f"{fault}, for example {first}: {remedy}")
    if bad:
        print(f"{where}: {len(bad)} of {len(golds)} queries are left out, because the index lacks their gold passage")
    return set(bad)
