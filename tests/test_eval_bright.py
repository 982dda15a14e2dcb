"""eval.bright: hand-worked scores, parity with gensim, excluded ids, reasoned queries, BRIGHT's TheoremQA figures."""

import gzip
import json
import math
import random
from pathlib import Path

import helpers_rqr_oracles
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval import bright, bright_data, bright_table
from eval.query_weighted import QueryWeightedBm25
from retriever_server.text.analyzer import analyze

BRIGHT = Path(__file__).resolve().parents[2] / "shared" / "data" / "bright"
DOCUMENTS = {
    "q/1": "why do insects fly to light",
    "d 1": "insects fly to a lamp because they keep their back to the light",
    "d2": "phototaxis moves an organism towards the light",
    "d3": "a plant grows",
}
needs_bright = pytest.mark.skipif(not BRIGHT.is_dir(), reason="BRIGHT's queries are not beside the checkout")


def test_query_weighted_scores_by_hand() -> None:
    index = QueryWeightedBm25([("d1", "cat cat dog"), ("d2", "dog"), ("d3", "fish and chips")], k1=0.9, b=0.4)
    # lengths 3, 1, 2 ("and" is a stop word): mean 2; N = 3; df: cat 1, dog 2; the query "cat dog dog bird" has 3 known
    # terms
    idf_cat, idf_dog = math.log(4 / 1.5), math.log(4 / 2.5)
    norm_3, norm_1 = 0.9 * (0.6 + 0.4 * 3 / 2), 0.9 * (0.6 + 0.4 * 1 / 2)
    query = {"cat": idf_cat / (1 + norm_3), "dog": idf_dog * 2 / (2 + norm_3)}
    first = query["cat"] * idf_cat * 2 / (2 + norm_3) + query["dog"] * idf_dog / (1 + norm_3)
    second = query["dog"] * idf_dog / (1 + norm_1)
    assert index.scores(["cat dog dog bird"])[0] == pytest.approx([first, second, 0], rel=1e-6)
    assert [docid for docid, _ in index.search(["cat dog dog bird"], 5)[0]] == ["d1", "d2"]
    assert index.search(["", "bird"], 5) == [[], []]


def texts(count: int, seed: int) -> list[str]:
    rng, words = (
        random.Random(seed),
        [a + b for a in "bdkmpt" for b in ("ar", "ines", "ought", "ely", "ist", "oom", "ed")],
    )
    return [" ".join(rng.choices(words, range(1, len(words) + 1), k=rng.randint(0, 60))) for _ in range(count)]


def assert_as_gensim(documents: list[str], queries: list[str], folder: Path) -> None:
    bags = {"documents": list(map(analyze, documents)), "queries": list(map(analyze, queries))}
    expected = helpers_rqr_oracles.ask("gensim", bags, folder)
    index = QueryWeightedBm25([(f"d{i}", text) for i, text in enumerate(documents)])
    assert expected.any(axis=1).mean() > 0.9
    np.testing.assert_allclose(index.scores(queries), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_query_weighted_scores_are_gensims(tmp_path: Path) -> None:
    assert_as_gensim(texts(300, 1), texts(200, 2), tmp_path)


@needs_bright
@pytest.mark.slow
def test_query_weighted_scores_are_gensims_on_brights_queries(tmp_path: Path) -> None:
    queries = [topic.query for task in ("theoremqa-questions", "biology") for topic in topics_of(task)]
    assert_as_gensim(list(bright_data.read_documents(BRIGHT / "theoremqa_test.json").values()), queries[:200], tmp_path)


def topics_of(name: str) -> list[bright_data.Topic]:
    return bright_data.read_topics(BRIGHT / f"topics.bright-{name}-original.jsonl.gz")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"id": docid, "content": text} for docid, text in DOCUMENTS.items()]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    topics = [
        {"id": "t1", "query": DOCUMENTS["q/1"], "excluded_ids": ["q/1", "elsewhere"], "gold_ids": ["d2"]},
        {"id": "t2", "query": "what grows\n", "excluded_ids": ["N/A"]},
    ]
    with gzip.open(tmp_path / "topics.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(topic) + "\n" for topic in topics)
    (tmp_path / "qrels.txt").write_text("t1\t0\td2\t1\nt2\t0\td3\t1\n")
    (tmp_path / "reasoned.json").write_text(json.dumps({DOCUMENTS["q/1"]: "phototaxis of an organism"}, indent=1))
    return tmp_path


def evaluate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, files: Path, *more: str
) -> tuple[dict[str, float], str]:
    given = [
        "--documents",
        f"{files}/documents.jsonl",
        "--topics",
        f"{files}/topics.jsonl.gz",
        "--qrels",
        f"{files}/qrels.txt",
    ]
    monkeypatch.setattr("sys.argv", ["bright", "--task", "biology", *given, "--json", *more])
    bright.main()
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.parametrize("form", ["lucene", "query-weighted"])
def test_excluded_documents_are_removed_and_reasoned_queries_are_used(
    capsys, monkeypatch, files: Path, form: str
) -> None:
    def call(*more: str) -> tuple[dict[str, float], str]:
        return evaluate(capsys, monkeypatch, files, "--bm25", form, *more)

    raw, err = call()  # t1 finds d 1 before d2, for its own text is excluded; t2 finds d3
    assert raw["nDCG@10"] == pytest.approx((1 / math.log2(3) + 1) / 2)
    assert "4 documents, 0 of 2 golds not among them" in err
    reasoned, err = call("--queries", f"{files}/reasoned.json")
    assert reasoned["nDCG@10"] == 1
    assert "1 topics without a reasoned query" in err
    (files / "reasoned.json").write_text(json.dumps({DOCUMENTS["q/1"]: "nothing that helps"}))
    replaced, _ = call("--queries", f"{files}/reasoned.json")
    joined, _ = call("--queries", f"{files}/reasoned.json", "--join", "--documents", f"{files}/documents.parquet")
    assert (replaced["nDCG@10"], joined) == (0.5, raw)
    (files / "excluded.json").write_text(json.dumps({"t1": ["d2"]}))
    none, _ = call("--excluded", f"{files}/excluded.json")  # now t1's gold is excluded
    assert none["nDCG@10"] == 0.5


def test_lines_of_infer_are_read_without_fallbacks(files: Path) -> None:
    rows = [{"qid": "t1", "rewrite": "r1", "fallback": False}, {"qid": "t2", "rewrite": "what grows", "fallback": True}]
    (files / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reasoned = bright_data.read_reasoned(files / "made.jsonl")
    assert [reasoned.of(topic) for topic in bright_data.read_topics(files / "topics.jsonl.gz")] == ["r1", None]


def test_all_tasks_have_one_table_with_the_published_rows(capsys, monkeypatch, files: Path) -> None:
    for task in ("biology", "earth-science"):
        for name in ("documents.jsonl", "topics.jsonl.gz", "qrels.txt"):
            (files / f"{task}.{name}").write_bytes((files / name).read_bytes())
    given = [
        f"--{flag}={files}/{{name}}.{name}"
        for flag, name in (("documents", "documents.jsonl"), ("topics", "topics.jsonl.gz"))
    ]
    monkeypatch.setattr(
        "sys.argv", ["bright", "--task", "biology", "earth_science", *given, f"--qrels={files}/{{name}}.qrels.txt"]
    )
    bright.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["nDCG@10", "Bio", "Ear", "mean"]
    assert lines[2].split()[-3:] == ["46.0", "47.1", f"{(46.0 + 47.1) / 2:.1f}"]
    assert lines[4].split()[-3:] == ["81.5", "81.5", "81.5"]


def test_published_means_are_those_of_the_rows() -> None:
    table = bright_table.PUBLISHED
    assert len(bright_table.TASKS) == 12
    for name, values in table["rows"].items():
        assert sum(values) / 12 == pytest.approx(table["means"][name], abs=0.06)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        (
            "documents",
            '{"id": "a", "content": "x"}\n{"id": "a", "content": "y"}\n',
            ":2: the id 'a' had another text before",
        ),
        ("documents", '{"id": "a"}\n', "none of the fields contents, content, text is a text"),
        ("topics", '{"id": "t1", "query": "x", "excluded_ids": "all"}\n', "excluded_ids must be a list"),
        ("queries", '{"another question": "reasoned"}', "has a reasoned query for none of the 2 topics"),
    ],
)
def test_a_faulty_file_is_named(capsys, monkeypatch, files: Path, name: str, text: str, part: str) -> None:
    (files / "faulty.json").write_text(text)
    if name != "queries":
        (files / "faulty.json").rename(files / "faulty.jsonl")
    faulty = next(files.glob("faulty.*"))
    with pytest.raises(ValueError, match=part.replace("(", r"\(")):
        evaluate(capsys, monkeypatch, files, f"--{name}", str(faulty))


@needs_bright
@pytest.mark.slow
def test_theoremqa_questions(capsys, monkeypatch) -> None:
    """Lucene itself gives the same; words as they stand, stop words included, find less: 19.5 and 24.7."""
    name = "theoremqa-questions"
    given = [
        "--documents",
        "theoremqa_test.json",
        "--topics",
        f"topics.bright-{name}-original.jsonl.gz",
        "--qrels",
        f"qrels.bright-{name}.txt",
    ]
    figures = {}
    for queries in ([], ["--queries", "tongsearch-qr-1.5b_reasoned_queries.json.gz"]):
        for form in ("lucene", "query-weighted"):
            monkeypatch.chdir(BRIGHT)
            monkeypatch.setattr(
                "sys.argv", ["bright", "--task", "theoremqa_questions", *given, *queries, "--bm25", form, "--json"]
            )
            bright.main()
            figures[form, bool(queries)] = round(100 * json.loads(capsys.readouterr().out)["nDCG@10"], 1)
    assert figures == {
        ("lucene", False): 22.1,
        ("query-weighted", False): 26.9,
        ("lucene", True): 30.4,
        ("query-weighted", True): 30.6,
    }


def release(folder: Path) -> None:
    """BRIGHT's folders as they are released, for all tasks.

    The first query excludes the only document that it finds; its reasoned form finds the gold document.
    """
    for number, task in enumerate(bright_table.TASKS):
        documents = [{"id": f"{task}/{i}.txt", "content": f"topic{i} of {task}"} for i in range(14)]
        examples = [
            {
                "id": "0",
                "query": f"topic{number + 1}",
                "excluded_ids": [f"{task}/{number + 1}.txt"],
                "gold_ids": [f"{task}/0.txt"],
            }
        ]
        examples += [{"id": "1", "query": "topic13\n", "excluded_ids": ["N/A"], "gold_ids": [f"{task}/13.txt"]}]
        for kind, rows in (("documents", documents), ("examples", examples)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / kind / f"{task}-00000-of-00001.parquet")
        (folder / f"{task}.json").write_text(json.dumps({f"topic{number + 1}": "topic0", "topic13": "topic13"}))


@pytest.mark.slow
def test_all_12_tasks_from_the_release_to_the_table(capsys, monkeypatch, tmp_path: Path) -> None:
    from data_preprocess import bright as preprocess

    release(tmp_path)
    monkeypatch.setattr("sys.argv", ["bright", "--input", str(tmp_path), "--output", str(tmp_path / "out")])
    preprocess.main()
    place = f"{tmp_path}/out/{{task}}"
    given = [
        "--task",
        "all",
        "--documents",
        f"{place}/collection.jsonl",
        "--topics",
        f"{place}/topics.jsonl",
        "--qrels",
        f"{place}/qrels.trec",
    ]
    capsys.readouterr()
    for queries, found in (([], 50.0), (["--queries", f"{tmp_path}/{{task}}.json"], 100.0)):
        monkeypatch.setattr("sys.argv", ["bright", *given, *queries, "--bm25", "query-weighted"])
        bright.main()
        printed = capsys.readouterr().out.splitlines()
        assert len(set(map(len, printed))) == 1  # the columns stand under one another
        lines = [line.split() for line in printed]
        assert lines[0] == ["nDCG@10", *bright_table.TASKS.values(), "mean"]
        assert lines[1][-1] == "14.5"  # the published mean of the raw queries
        assert lines[4][-13:] == [f"{found:.1f}"] * 13
