"""BRIGHT: ``python -m eval.bright --task theoremqa_questions --documents DOCS --topics TOPICS --qrels QRELS [--queries REASONED.json]``.

Searches the original queries, or the reasoned ones in their place (or joined to them), takes out the documents that a query excludes, and prints nDCG@10
beside the published rows. Several tasks, or ``all``: the paths then hold {task} (earth_science) or {name} (earth-science).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convsearch.cli import run
from eval.bright_data import TASKS, Topic
from eval.search import Search

MEASURES = "nDCG@10 R@10 R@100 MRR"
BATCH = 128  # queries a search


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bright", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--task", nargs="+", required=True, choices=[*TASKS, "all"], help="one task, several, or all 12", metavar="TASK"
    )
    add(
        "--documents",
        required=True,
        help="parquet, JSON lines or JSON list of {id, contents or content}; or TheoremQA's own JSON",
    )
    add("--topics", required=True, help="parquet or JSON lines of {id, query, excluded_ids}, gzipped or not")
    add("--qrels", required=True, help="TREC qrels")
    add(
        "--queries", help="reasoned queries: {query: reasoned} as released, or the lines of convsearch.infer --task rqr"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--replace", action="store_true", help="search for the reasoned query alone (default)")
    how.add_argument("--join", action="store_true", help="search for the original query and the reasoned one behind it")
    add(
        "--bm25",
        default="lucene",
        choices=("lucene", "query-weighted"),
        help="plain Lucene, or BM25 weights on the query's terms too, as the published figures have (default lucene)",
    )
    add("--k1", type=float, default=0.9, help="BM25's term saturation (default 0.9)")
    add("--b", type=float, default=0.4, help="BM25's length normalisation (default 0.4)")
    add("--encoder", help="a dense encoder in place of BM25: an ANCE or sentence-transformers folder, or a hub name")
    add("--query_prefix", default="", help="put before each query for a dense encoder that wants an instruction")
    add("--max_length", type=int, default=512, help="tokens of a query or document for the encoder (default 512)")
    add(
        "--excluded",
        help="excluded ids, in place of those of the topics: JSON {qid: [ids]}, or records of {id, excluded_ids}",
    )
    add("--top_k", type=int, default=1000, help="documents a query, counted without the excluded ones (default 1000)")
    add("--measures", default=MEASURES, help=f"measures of eval.metrics (default {MEASURES!r})")
    add("--work", help="folder that keeps the indexes for the next run (default: none is kept)")
    add("--output_trec_file", help="also write the run; with several tasks the path holds {task}")
    add(
        "--json",
        action="store_true",
        help="print one object {measure: fraction}; several tasks: the means, and tasks under 'tasks'",
    )
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One task: means of the measures (0..1) and what a reader has to know behind them."""

    means: Mapping[str, float]
    notes: str


def texts_of(topics: Sequence[Topic], queries: str | None, join: bool) -> tuple[list[str], int]:
    """What is searched for, and how many topics have no reasoned query, so that the original stands in.

    Raises:
        ValueError: no topic has one: the file belongs to another task.
    """
    from eval.bright_data import read_reasoned

    if queries is None:
        return [topic.query for topic in topics], 0
    reasoned = read_reasoned(queries)
    found = [reasoned.of(topic) for topic in topics]
    if not any(found):
        raise ValueError(f"{queries} has a reasoned query for none of the {len(topics)} topics: is it of another task?")
    texts = [
        topic.query if text is None else f"{topic.query}\n{text}" if join else text
        for topic, text in zip(topics, found, strict=True)
    ]
    return texts, found.count(None)


def open_search(args: argparse.Namespace, documents: Mapping[str, str], folder: Path) -> Search:
    """A search function over the documents; what it needs on disk goes below ``folder``."""
    from convsearch.files import write_jsonl

    if args.encoder is None and args.bm25 == "query-weighted":
        from eval.query_weighted import QueryWeightedBm25

        return QueryWeightedBm25(documents.items(), args.k1, args.b).search
    collection = folder / "collection.jsonl"
    write_jsonl(collection, ({"id": docid, "contents": text} for docid, text in documents.items()))
    if args.encoder is None:
        from retriever_server.bm25 import build as bm25_build
        from retriever_server.bm25.index import Bm25Index

        bm25_build.build(collection, folder / "bm25", args.k1, args.b, overwrite=True, progress=sys.stderr.isatty())
        return Bm25Index.load(folder / "bm25").search
    from retriever_server.dense import build as dense_build
    from retriever_server.dense.index import DenseIndex

    place = folder / f"dense-{Path(args.encoder).name}"
    dense_build.build(
        [collection], place, args.encoder, dense_build.Settings(max_length=args.max_length, overwrite=True)
    )
    index = DenseIndex.load(place, args.encoder, max_length=args.max_length)
    return lambda queries, k: index.search([args.query_prefix + query for query in queries], k)


def without_excluded(hits: Sequence[tuple[str, float]], excluded: Sequence[str], top_k: int) -> list[tuple[str, float]]:
    hidden = frozenset(excluded)
    return [hit for hit in hits if hit[0] not in hidden][:top_k]


def search_topics(
    search: Search, topics: Sequence[Topic], texts: Sequence[str], top_k: int, documents: Mapping[str, str]
) -> dict[str, list[tuple[str, float]]]:
    """Query id -> its best ``top_k`` documents of those that it does not exclude."""
    excluded = [[docid for docid in topic.excluded if docid in documents] for topic in topics]
    found: dict[str, list[tuple[str, float]]] = {}
    for start in range(0, len(topics), BATCH):
        rows = range(start, min(start + BATCH, len(topics)))
        depth = min(top_k + max(len(excluded[i]) for i in rows), len(documents))
        for i, hits in zip(rows, search([texts[i] for i in rows], depth), strict=True):
            found[topics[i].qid] = without_excluded(hits, excluded[i], top_k)
    return found


def evaluate_task(args: argparse.Namespace, task: str) -> Outcome:
    """Everything for one task.

    Raises:
        ValueError: a file is wrong; one sentence that names it.
    """
    from eval.bright_data import read_documents, read_excluded, read_topics
    from eval.measures import parse_measures
    from eval.metrics import evaluate, notes
    from eval.runs import decreasing, from_mapping, read_qrels, write_run

    def path(pattern: str) -> str:
        return pattern.replace("{task}", task).replace("{name}", task.replace("_", "-"))

    documents, topics, qrels = (
        read_documents(path(args.documents)),
        read_topics(path(args.topics)),
        read_qrels(path(args.qrels)),
    )
    if args.excluded:
        excluded = read_excluded(path(args.excluded))
        topics = [Topic(topic.qid, topic.query, excluded.get(topic.qid, ())) for topic in topics]
    texts, without = texts_of(topics, args.queries and path(args.queries), args.join)
    with ExitStack() as stack:
        root = Path(args.work or stack.enter_context(TemporaryDirectory(prefix="bright-")))
        found = search_topics(open_search(args, documents, root / task), topics, texts, args.top_k, documents)
    if args.output_trec_file:
        write_run(path(args.output_trec_file), found.items(), "bright")
    # float32 scores that strictly decrease: ties stay in index order, where trec_eval would go by docid
    ranked = {
        qid: dict(zip([docid for docid, _ in hits], decreasing([score for _, score in hits]).tolist(), strict=True))
        for qid, hits in found.items()
    }
    evaluation = evaluate(from_mapping(ranked), qrels, parse_measures(args.measures))
    golds = {docid for docid, grade in zip(qrels.docids.to_pylist(), qrels.values.tolist(), strict=True) if grade > 0}
    remarks = [
        notes(evaluation),
        f"{len(documents)} documents, {sum(docid not in documents for docid in golds)} of {len(golds)} golds not among them",
    ]
    if without:
        remarks.append(f"{without} topics without a reasoned query (the original stands in)")
    return Outcome(evaluation.means(), "; ".join(remarks))


def published() -> dict[str, Any]:
    """The rows of eval/bright_published.json."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("bright_published.json").read_text(encoding="utf-8"))
    return table


def table(outcomes: Mapping[str, Outcome], label: str) -> str:
    """nDCG@10 by task and their mean in percent, under the published rows; a published mean is over the same tasks. Then the other measures."""
    rows = {
        f"{name} (published)": dict(zip(published()["tasks"], values, strict=True))
        for name, values in published()["rows"].items()
    }
    measures = list(next(iter(outcomes.values())).means)
    lead = "nDCG@10" if "nDCG@10" in measures else measures[0]
    rows[label] = {task: 100 * outcome.means[lead] for task, outcome in outcomes.items()}
    if lead != "nDCG@10":
        rows = {label: rows[label]}
    width = max(26, 2 + max(map(len, rows)))
    lines = [
        f"{lead:<{width}}"
        + "".join(f"{TASKS[task]:>7}" for task in outcomes)
        + (f"{'mean':>7}" if len(outcomes) > 1 else "")
    ]
    for name, values in rows.items():
        shown = [values[task] for task in outcomes]
        shown += [sum(shown) / len(shown)] if len(shown) > 1 else []
        lines.append(f"{name:<{width}}" + "".join(f"{value:>7.1f}" for value in shown))
    for measure in measures:
        if measure != lead:
            shown = [100 * outcome.means[measure] for outcome in outcomes.values()]
            shown += [sum(shown) / len(shown)] if len(shown) > 1 else []
            lines.append(f"{measure:<{width}}" + "".join(f"{value:>7.1f}" for value in shown))
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    tasks = list(TASKS) if "all" in args.task else list(dict.fromkeys(args.task))
    for name in ("documents", "topics", "qrels", "output_trec_file"):
        pattern = getattr(args, name)
        if len(tasks) > 1 and pattern and "{task}" not in pattern and "{name}" not in pattern:
            raise ValueError(
                f"--{name} {pattern} is one file for {len(tasks)} tasks: put {{task}} or {{name}} where the task's name stands"
            )
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        outcomes[task] = evaluate_task(args, task)
        print(f"{task}: {outcomes[task].notes}", file=sys.stderr)
    means = {
        measure: sum(o.means[measure] for o in outcomes.values()) / len(outcomes)
        for measure in outcomes[tasks[0]].means
    }
    if args.json:
        print(
            json.dumps(
                means if len(tasks) == 1 else means | {"tasks": {task: dict(o.means) for task, o in outcomes.items()}}
            )
        )
        return
    system = Path(args.encoder).name if args.encoder else f"BM25 {args.bm25}"
    print(table(outcomes, system + (", joined" if args.join else ", reasoned" if args.queries else ", raw")))


if __name__ == "__main__":
    run(main)
