"""One task of BRIGHT: searches for its queries, takes out the documents that a query excludes, and measures."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from convsearch.files import write_jsonl
from eval.bright_data import Topic, read_documents, read_excluded, read_reasoned, read_topics
from eval.bright_table import Outcome
from eval.measures import evaluate, notes, parse_measures
from eval.queries import Hits, Search
from eval.query_weighted import QueryWeightedBm25
from eval.runs import decreasing, from_mapping, read_qrels, write_run
from retriever_server.bm25 import build as bm25_build
from retriever_server.bm25.index import Bm25Index
from retriever_server.dense import build as dense_build
from retriever_server.dense.index import DenseIndex

BATCH = 128  # queries per search


def open_search(args: argparse.Namespace, documents: Mapping[str, str], folder: Path) -> Search:
    """A search function over the documents; its index is written below ``folder``."""
    if args.encoder is None and args.bm25 == "query-weighted":
        return QueryWeightedBm25(documents.items(), args.k1, args.b).search
    collection = folder / "collection.jsonl"
    write_jsonl(collection, ({"id": docid, "contents": text} for docid, text in documents.items()))
    if args.encoder is None:
        bm25_build.build([collection], folder / "bm25", args.k1, args.b, overwrite=True, progress=sys.stderr.isatty())
        return Bm25Index.load(folder / "bm25").search
    place = folder / f"dense-{Path(args.encoder).name}"
    settings = dense_build.Settings(max_length=args.max_length, overwrite=True)
    dense_build.build([collection], place, args.encoder, settings)
    index = DenseIndex.load(place, args.encoder, max_length=args.max_length)
    return lambda queries, k: index.search([args.query_prefix + query for query in queries], k)


def texts_of(topics: Sequence[Topic], queries: str | None, join: bool) -> tuple[list[str], int]:
    """The texts to search for, and for how many topics it is the original query because they have no reasoned one.

    Raises:
        ValueError: no topic has one: the file belongs to another task.
    """
    if queries is None:
        return [topic.query for topic in topics], 0
    reasoned = read_reasoned(queries)
    found = [reasoned.of(topic) for topic in topics]
    if not any(found):
        raise ValueError(f"{queries} has a reasoned query for none of the {len(topics)} topics: is it of another task?")
    pairs = zip(topics, found, strict=True)
    texts = [topic.query if text is None else f"{topic.query}\n{text}" if join else text for topic, text in pairs]
    return texts, found.count(None)


def without_excluded(hits: Hits, excluded: Sequence[str], top_k: int) -> Hits:
    hidden = frozenset(excluded)
    return [hit for hit in hits if hit[0] not in hidden][:top_k]


def search_topics(
    search: Search, topics: Sequence[Topic], texts: Sequence[str], top_k: int, documents: Mapping[str, str]
) -> dict[str, Hits]:
    """Query id -> its best ``top_k`` documents of those that it does not exclude."""
    excluded = [[docid for docid in topic.excluded if docid in documents] for topic in topics]
    found: dict[str, Hits] = {}
    for start in range(0, len(topics), BATCH):
        rows = range(start, min(start + BATCH, len(topics)))
        depth = min(top_k + max(len(excluded[i]) for i in rows), len(documents))
        for i, hits in zip(rows, search([texts[i] for i in rows], depth), strict=True):
            found[topics[i].qid] = without_excluded(hits, excluded[i], top_k)
    return found


def evaluate_task(args: argparse.Namespace, task: str) -> Outcome:
    """Everything for one task; ``args`` are the flags of eval.bright.

    Raises:
        ValueError: a file is wrong; one sentence that names it.
    """

    def path(pattern: str) -> str:
        return pattern.replace("{task}", task).replace("{name}", task.replace("_", "-"))

    documents, topics = read_documents(path(args.documents)), read_topics(path(args.topics))
    qrels = read_qrels(path(args.qrels))
    if args.excluded:
        excluded = read_excluded(path(args.excluded))
        topics = [Topic(topic.qid, topic.query, excluded.get(topic.qid, ())) for topic in topics]
    texts, without = texts_of(topics, args.queries and path(args.queries), args.join)
    with ExitStack() as stack:
        root = Path(args.work or stack.enter_context(TemporaryDirectory(prefix="bright-")))
        found = search_topics(open_search(args, documents, root / task), topics, texts, args.top_k, documents)
    if args.output_trec_file:
        write_run(path(args.output_trec_file), found.items(), "bright")
    # float32 scores that strictly decrease: ties stay in index order, and trec_eval would order them by docid
    ranked = {
        qid: dict(zip([docid for docid, _ in hits], decreasing([score for _, score in hits]).tolist(), strict=True))
        for qid, hits in found.items()
    }
    evaluation = evaluate(from_mapping(ranked), qrels, parse_measures(args.measures))
    golds = {docid for docid, grade in zip(qrels.docids.to_pylist(), qrels.values.tolist(), strict=True) if grade > 0}
    missing = f"{sum(docid not in documents for docid in golds)} of {len(golds)} golds not among them"
    remarks = [notes(evaluation), f"{len(documents)} documents, {missing}"]
    if without:
        remarks.append(f"{without} topics without a reasoned query (the original is used)")
    return Outcome(evaluation.means(), "; ".join(remarks))
