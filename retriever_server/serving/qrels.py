"""The gold passages that a server knows by query id."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from retriever_server.searcher import Searcher

log = logging.getLogger("retriever_server")


def read_qrels(paths: Sequence[Path]) -> dict[str, list[str]]:
    """query id -> docids judged relevant (above 0), from TREC qrels lines "qid 0 docid relevance".

    Raises:
        ValueError: a file is missing, or a line does not have this form; names file and line.
    """
    qrels: dict[str, list[str]] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no qrels file {path}")
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if not fields:
                    continue
                if len(fields) != 4 or not fields[3].lstrip("-").isdigit():
                    raise ValueError(f"{path}:{number}: expected 'qid 0 docid relevance', got {line.strip()[:80]!r}")
                if int(fields[3]) > 0:
                    qrels.setdefault(fields[0], []).append(fields[2])
    return qrels


def warn_of_missing(qrels: Mapping[str, Sequence[str]], index: Searcher) -> None:
    """Logs how many gold docids are not in the index."""
    missing = {docid for docids in qrels.values() for docid in index.missing(docids)}
    if missing:
        what = f"{len(missing)} gold docids of --trec_path, for example {min(missing)!r}, are not in the index"
        log.warning(f"{what}: their queries will be answered with an error")
