"""Query files -> runs -> measures with any retriever: what eval.bm25 and eval.ance share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from convsearch.files import atomic_write
from convsearch.retriever.client import RetrieverClient
from eval.measures import evaluate_files, notes
from eval.queries import Hits, Search, read_queries
from eval.runs import write_run
from eval.tables import measure_table
from retriever_server.searcher import FUSED_DEPTH, fuse

RRF_K = 60  # Cormack, Clarke and Büttcher (SIGIR 2009)
BATCH = 256  # queries per call, so that the progress bar moves


@dataclass(frozen=True, slots=True)
class Job:
    """What to search for and where the results go; ``qrels`` None leaves out the measures."""

    query_files: Sequence[str]
    run_names: Sequence[str]
    output_dir: Path
    query_type: str
    top_k: int
    qrels: str | None
    rel_threshold: int = 1
    max_words: int | None = None
    tag: str = "bm25"
    fuse: str = "none"  # rrf: search all rewrites of a line and fuse their lists by reciprocal rank

    def __post_init__(self) -> None:
        files, names = len(self.query_files), len(self.run_names)
        if files != names:
            raise ValueError(f"{files} query files and {names} run names: give one name per file")
        if self.top_k < 1:
            raise ValueError(f"the passages per query must be at least 1, got {self.top_k}")
        if self.fuse != "none" and self.query_type != "rewrite":
            raise ValueError(f"--fuse {self.fuse} fuses rewrites, not the query type {self.query_type}: leave one out")


def through_server(url: str) -> Search:
    """Searches a running retriever_server."""
    client = RetrieverClient(url)
    return lambda queries, k: [[(hit.docid, hit.score) for hit in hits] for hits in client.search(queries, k)]


def search_and_score(search: Search, job: Job) -> None:
    """Writes for each query file a run and ``<run>.metrics.json``; prints both and how many rewrites fell back."""
    for path, name in zip(job.query_files, job.run_names, strict=True):
        output = job.output_dir / name
        fallbacks = _search_file(search, path, output, job)
        print(f"{path} -> {output}" + (f"; {fallbacks} rewrites fell back to the raw question" if fallbacks else ""))
        if job.qrels is None:
            continue
        evaluation = evaluate_files(output, job.qrels, rel_threshold=job.rel_threshold)
        print(f"{measure_table(evaluation.means())}\n({notes(evaluation)})")
        with atomic_write(output.with_suffix(".metrics.json")) as file:
            json.dump(evaluation.means() | {"fallbacks": fallbacks}, file, indent=1)


def _search_file(search: Search, path: str, output: Path, job: Job) -> int:
    fused = job.fuse != "none"
    queries, fallbacks = read_queries(path, job.query_type, fused)
    texts = {qid: [" ".join(text.split()[: job.max_words]) for text in found] for qid, found in queries.items()}
    unique = list(dict.fromkeys(chain.from_iterable(texts.values())))
    depth = max(job.top_k, FUSED_DEPTH) if fused else job.top_k
    hits: dict[str, Hits] = {}
    for start in tqdm(range(0, len(unique), BATCH), desc=f"searching {Path(path).name}", unit="batch", leave=False):
        part = unique[start : start + BATCH]
        hits |= zip(part, search(part, depth), strict=True)
    results = {qid: hits[found[0]] for qid, found in texts.items()}
    if fused:  # a rewrite that was drawn twice counts twice
        lists = {qid: [[docid for docid, _ in hits[text]] for text in found] for qid, found in texts.items()}
        results = {qid: fuse(found, RRF_K)[: job.top_k] for qid, found in lists.items()}
    write_run(output, results.items(), job.tag)
    return fallbacks
