"""The CACM collection: our BM25 gives the figures and the scores that Anserini's Lucene publishes for it."""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import ir_measures
import pytest
from helpers_retriever import build_bm25
from ir_measures import AP, P

CACM = Path(__file__).resolve().parents[2] / "shared/data/eval_oracles/cacm"
pytestmark = pytest.mark.skipif(not CACM.is_dir(), reason="the CACM collection is not in ../shared/data")


class Text(HTMLParser):
    """The text of a page, tags taken out and white space folded, as Anserini's HtmlCollection reads it."""

    @classmethod
    def of(cls, page: str) -> str:
        reader = cls()
        reader.parts = []
        reader.feed(page)
        reader.close()
        return " ".join("".join(reader.parts).split())

    parts: list[str]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def passages() -> Iterator[tuple[str, str]]:
    with tarfile.open(CACM / "cacm.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".html"):
                yield member.name.removesuffix(".html"), Text.of(file.read().decode("latin-1"))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, float]]]:
    root = tmp_path_factory.mktemp("cacm")
    (root / "c.jsonl").write_text(
        "".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages())
    )
    index = build_bm25(root / "c.jsonl", root / "index")
    topics = dict(
        re.findall(r"<DOCNO>\s*(\d+)\s*</DOCNO>(.*?)</DOC>", (CACM / "topics.cacm.txt").read_text(), re.DOTALL)
    )
    assert (index.num_passages, len(topics)) == (3204, 64)
    return dict(zip(topics, index.search(list(topics.values()), 1000), strict=True))


def test_published_figures(searched: dict[str, list[tuple[str, float]]]) -> None:
    # Anserini's regression for CACM, BM25 with k1 0.9 and b 0.4: MAP 0.3123, P@30 0.1942
    run = [
        ir_measures.ScoredDoc(qid, docid, -rank)
        for qid, hits in searched.items()
        for rank, (docid, _) in enumerate(hits)
    ]
    found = ir_measures.calc_aggregate([AP, P @ 30], ir_measures.read_trec_qrels(str(CACM / "qrels.cacm.txt")), run)
    assert {measure: round(value, 4) for measure, value in found.items()} == {AP: 0.3123, P @ 30: 0.1942}


def test_scores_of_a_published_run(searched: dict[str, list[tuple[str, float]]]) -> None:
    published: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for line in (CACM / "run.cacm-bm25.txt").read_text().splitlines():
        qid, _, docid, _, score, _ = line.split()
        published[qid].append((docid, float(score)))
    assert len(published) == 64
    for qid, hits in published.items():
        ours = dict(searched[qid])
        for docid, score in hits:
            assert ours[docid] == pytest.approx(score, abs=2e-4), (
                qid,
                docid,
            )  # the file has four decimals, and breaks ties by 1e-4
        lowest = hits[-1][1]
        assert {docid for docid, score in ours.items() if score > lowest + 2e-4} <= {docid for docid, _ in hits}
