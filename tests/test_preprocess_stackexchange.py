"""StackExchange: the public shards, the reference's two forms, filters, a model's answers; and BRIGHT's files."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convsearch.trainers.data import read_examples
from data_preprocess import bright, stackexchange

INSTRUCTION = (
    "Instructions:\n1. Identify the essential problem.\n2. Think step by step.\n3. Draft an answer.\nQuestion: "
)
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> None:
        module = bright if arguments[0] == "bright" else stackexchange
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        module.main()

    return call


def shard(path: Path, rows: list[tuple[str, str, list[tuple[str, bool]]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [
        {
            "qid": number,
            "question": question,
            "answers": [
                {"answer_id": i, "pm_score": 1, "selected": selected, "text": text}
                for i, (text, selected) in enumerate(answers)
            ],
            "date": "2020/01/01",
            "metadata": [f"https://{site}/questions/{number}", f"https://{site}", "https://u"],
        }
        for number, (site, question, answers) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_are_filtered_counted_and_sampled_by_site(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [("accepted", True), ("other", False)]
    rows = [("biology.stackexchange.com", f"why {n}?", good) for n in range(30)]
    rows += [("stackoverflow.com", f"how {n}?", good) for n in range(5)] + [
        ("cooking.stackexchange.com", "salt?", good)
    ]
    shard(tmp_path / "in" / "data" / "bio" / "0.parquet", rows[:20])
    dropped = [
        ("math.stackexchange.com", "see https://i.imgur.com/a.png", good),
        ("math.stackexchange.com", "x" * 16_001, good),
        ("math.stackexchange.com", "no answer accepted", [("other", False)]),
        ("math.stackexchange.com", "an empty one accepted", [("  ", True)]),
        ("math.stackexchange.com", "x" * 16_000, good),
    ]
    shard(tmp_path / "in" / "data" / "z.parquet", rows[20:] + dropped + rows[:1])
    run(
        "se",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--max-per-site",
        12,
        "--validation-questions",
        3,
    )
    out = capsys.readouterr().out
    assert "sites: 12 biology, 1 math, 5 stackoverflow" in out
    for expected in ("1 with png", "1 too long", "2 empty answer", "1 repeated"):
        assert expected in out
    train, held_out = lines(tmp_path / "out" / "train.json"), lines(tmp_path / "out" / "validation.json")
    assert (len(train), len(held_out)) == (15, 3)
    examples = read_examples([str(tmp_path / "out" / "train.parquet")])
    assert all(example.positives == ("accepted",) for example in examples)
    assert examples[0].messages[0]["content"].endswith(f"Query: {examples[0].question}\n\n")
    collection = {record["id"]: record["contents"] for record in lines(tmp_path / "out" / "collection.jsonl")}
    assert all(collection[example.gold_docids[0]] == "accepted" for example in examples)
    again = {record["qid"] for record in train}
    (tmp_path / "in" / "data" / "z.parquet").rename(
        tmp_path / "in" / "data" / "a.parquet"
    )  # another order of the shards
    run(
        "se",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out2",
        "--max-per-site",
        12,
        "--validation-questions",
        3,
    )
    assert {record["qid"] for record in lines(tmp_path / "out2" / "train.json")} == again


def test_the_references_two_forms_give_the_same(run: Run, tmp_path: Path) -> None:
    raw = {INSTRUCTION + "why a?": "since b", "why c?": ["since d", "since e"], "see f.png": "g", "why h?": ["", " "]}
    (tmp_path / "V1.json").write_text(json.dumps(raw))
    built = [
        {
            "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": question}],
            "answer": json.dumps(
                {"query": question, "pos_docs_list": a if isinstance(a, list) else [a], "think_flag": False}
            ),
        }
        for question, a in raw.items()
    ]
    pq.write_table(pa.Table.from_pylist(built), tmp_path / "train.parquet")
    found = []
    for name in ("V1.json", "train.parquet"):
        run(
            "se",
            "--input",
            tmp_path / name,
            "--output",
            tmp_path / f"out-{name}",
            "--validation-questions",
            0,
            "--think",
        )
        examples = read_examples([str(tmp_path / f"out-{name}" / "train.parquet")])
        found.append({example.question: example.positives for example in examples})
        assert examples[0].messages[0]["role"] == "system"
        dropped = json.loads((tmp_path / f"out-{name}" / "manifest.json").read_text())["steps"]["splits"]["counts"][
            "dropped"
        ]
        assert dropped == {"with_png": 1, "empty_answer": 1}
    assert found == [{"why a?": ("since b",), "why c?": ("since d", "since e")}] * 2


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[Any]]]:
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            question = body["messages"][-1]["content"].partition("Query: ")[2].strip()
            asked.append((self.path, self.headers["authorization"], body["model"], question))
            status = 400 if question == "bad?" else 200
            answer = "" if question == "mute?" else f"<think>hm</think>\n\nanswer to {question}"
            data = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()


def test_a_models_answers_are_saved_one_by_one(
    run: Run,
    tmp_path: Path,
    endpoint: tuple[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, asked = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    rows = [{"site": "cs", "question": question} for question in ("one?", "two?", "mute?", "bad?")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "se",
        "--input",
        tmp_path / "q.jsonl",
        "--output",
        tmp_path / "out",
        "--answers",
        "model",
        "--endpoint",
        url,
        "--parallel",
        1,
    ]
    command += ["--model", "m", "--validation-questions", 0]
    with pytest.raises(RuntimeError, match="HTTP status 400"):
        run(*command)
    before, kept = len(asked), len(lines(tmp_path / "out" / "answers.jsonl"))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    run(*command)
    assert len(asked) == before + 3 - kept
    assert asked[0][:3] == ("/v1/chat/completions", "Bearer k", "m")
    assert "1 empty answer" in capsys.readouterr().out
    examples = read_examples([str(tmp_path / "out" / "train.parquet")])
    assert {example.question: example.positives for example in examples} == {
        q: (f"answer to {q}",) for q in ("one?", "two?")
    }


def test_flags_that_do_not_go_together(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --endpoint and --model"):
        run("se", "--input", tmp_path, "--output", tmp_path / "out", "--answers", "model")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("long", [False, True])
def test_bright(run: Run, tmp_path: Path, form: str, long: bool) -> None:
    kind, golds = ("long_documents", "gold_ids_long") if long else ("documents", "gold_ids")
    documents = [{"id": "a/1.txt", "content": "alpha"}, {"id": "b", "content": "beta"}, {"id": "b", "content": "beta"}]
    other = "gold_ids" if long else "gold_ids_long"
    examples = [
        {"id": "0", "query": "first?", "excluded_ids": ["N/A"], golds: ["a/1.txt", "a/1.txt"], other: ["N/A"]},
        {"id": "1", "query": "second?", "excluded_ids": ["a/1.txt"], golds: ["b"], other: ["N/A"]},
    ]
    for folder, rows in ((kind, documents), ("examples", examples)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / folder / "biology-00000-of-00001.parquet")
        else:
            (tmp_path / "in" / folder / "biology.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "bright",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--task",
        "biology",
        *(["--long"] if long else []),
    )
    out = tmp_path / "out" / ("biology_long" if long else "biology")
    assert lines(out / "collection.jsonl") == [{"id": "a/1.txt", "contents": "alpha"}, {"id": "b", "contents": "beta"}]
    assert (out / "qrels.trec").read_text() == "0 0 a/1.txt 1\n1 0 b 1\n"
    assert json.loads((out / "excluded.json").read_text()) == {"0": [], "1": ["a/1.txt"]}
    assert lines(out / "topics.jsonl")[1] == {"id": "1", "query": "second?", "excluded_ids": ["a/1.txt"]}
