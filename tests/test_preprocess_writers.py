"""What is written: the exact columns, reuse and resumption, constant memory."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convsearch.prompts import render
from convsearch.types import Conversation
from data_preprocess.options import PromptOptions
from data_preprocess.sources import BadRecords, Source
from data_preprocess.topiocqa_data import passages
from data_preprocess.writers import (
    ROW_GROUP_ROWS,
    OutputFolder,
    Row,
    read_golds,
    split_files,
    write_collection,
    write_splits,
)

RECORD = {
    "qid": "x_1_2",
    "conv_id": 1,
    "turn_id": 2,
    "question": "and his wife?",
    "context": ["who wrote Hamlet?", "William Shakespeare"],
    "answer": "Anne Hathaway",
    "gold_docids": ["d17", "d4"],
    "rewrite": "who was Shakespeare's wife?",
}


def _write(folder: Path, rows: list[Row], splits: tuple[str, ...] = ("train",), **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"data_source": "toy", "prompt": PromptOptions(), "bad": BadRecords()} | options
    return write_splits(folder, splits, rows, **arguments)


def _rows(count: int, split: str = "train") -> list[Row]:
    return [Row(split, RECORD | {"qid": f"x_{i // 5}_{i % 5}", "conv_id": i // 5}, f"here:{i}") for i in range(count)]


def test_parquet_has_exactly_the_columns_of_the_contract(tmp_path: Path) -> None:
    _write(tmp_path, [Row("train", RECORD, "here")])
    text = pa.string()
    expected = {
        "data_source": text,
        "prompt": pa.list_(pa.struct([("role", text), ("content", text)])),
        "ability": text,
        "reward_model": pa.struct([("style", text), ("ground_truth", pa.list_(text))]),
        "extra_info": pa.struct(
            [
                ("split", text),
                ("index", pa.int64()),
                ("answer", text),
                ("question", text),
                ("query_id", text),
                ("context", pa.list_(text)),
            ]
        ),
    }
    schema = pq.read_schema(tmp_path / "train.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        name: str(type_).replace("list<item:", "list<element:") for name, type_ in expected.items()
    }
    assert pq.read_table(tmp_path / "train.parquet").to_pylist() == [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": render(Conversation.from_record(RECORD))[0]["content"]}],
            "ability": "rewrite",
            "reward_model": {"style": "rule", "ground_truth": ["d17", "d4"]},
            "extra_info": {
                "split": "train",
                "index": 0,
                "answer": "Anne Hathaway",
                "question": "and his wife?",
                "query_id": "x_1_2",
                "context": ["who wrote Hamlet?", "William Shakespeare"],
            },
        }
    ]
    assert (tmp_path / "train.trec").read_text() == "x_1_2 0 d17 1\nx_1_2 0 d4 1\n"


def test_training_files_have_no_human_rewrite(tmp_path: Path) -> None:
    _write(tmp_path, [Row("train", RECORD, "a"), Row("test", RECORD, "b")], ("train", "test"))
    assert "rewrite" not in json.loads((tmp_path / "train.json").read_text())
    assert json.loads((tmp_path / "test.json").read_text()) == RECORD
    for name in ("train.parquet", "test.parquet"):
        assert "Shakespeare's wife" not in json.dumps(pq.read_table(tmp_path / name).to_pylist())


def test_prompt_style_and_history_are_the_options(tmp_path: Path) -> None:
    _write(tmp_path, [Row("train", RECORD, "a")], prompt=PromptOptions("compact", 0))
    row = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]
    assert row["prompt"] == list(render(Conversation.from_record(RECORD), "compact", 0))
    assert "Hamlet" not in row["prompt"][0]["content"]
    assert row["extra_info"]["context"] == RECORD["context"]  # the whole history stays at hand


def test_rows_are_written_in_row_groups_with_a_running_index(tmp_path: Path) -> None:
    counts = _write(tmp_path, _rows(2 * ROW_GROUP_ROWS + 10))
    file = pq.ParquetFile(tmp_path / "train.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [
        ROW_GROUP_ROWS,
        ROW_GROUP_ROWS,
        10,
    ]
    assert [row["index"] for row in file.read().column("extra_info").to_pylist()] == list(
        range(2 * ROW_GROUP_ROWS + 10)
    )
    assert counts == {"train": {"queries": 2010, "conversations": 402, "qrels": 4020}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qid": "a b"}, "here:9: field 'qid' or 'gold_docids' has white space"),
        ({"gold_docids": ["a\u00a0b"]}, "here:9: field 'qid' or 'gold_docids' has white space"),
        ({"qid": "x_0_0"}, "here:9: field 'qid' repeats 'x_0_0'"),
        ({"qid": "n", "question": " "}, "here:9: n: field 'question' must be a non-empty string"),
        ({"qid": "n", "context": ["odd"]}, "here:9: n: field 'context' must be a list of strings"),
    ],
)
def test_a_row_that_cannot_be_written_is_an_error_or_skipped(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [*_rows(2), Row("train", RECORD | change, "here:9")]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        _write(tmp_path / "a", rows)
    assert not list((tmp_path / "a").glob("*"))  # nothing half-written stays
    bad = BadRecords(limit=1)
    assert _write(tmp_path / "b", rows, bad=bad)["train"]["queries"] == 2
    assert bad.messages[0].startswith(message)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no turn with a gold passage for split 'test' of toy"):
        _write(tmp_path, _rows(3), ("train", "test"))


def test_a_gold_passage_that_the_collection_lacks_is_an_error(tmp_path: Path) -> None:
    collection = [("d4", "text"), ("d5", " ")]
    with pytest.raises(ValueError, match=r"gold passage 'd17' is not in the collection \(1 of 2 golds are not\)"):
        write_collection(tmp_path / "collection.jsonl", collection, {"d4", "d17"}, BadRecords())
    assert not (tmp_path / "collection.jsonl").exists()
    counts = write_collection(tmp_path / "collection.jsonl", collection, {"d4", "d17"}, BadRecords(limit=1))
    assert counts == {"passages": 2, "blank": 1, "missing_golds": 1}
    with pytest.raises(ValueError, match="has no passage"):
        write_collection(tmp_path / "empty.jsonl", [], set(), BadRecords())


def _step(
    folder: OutputFolder,
    source: Source,
    made: list[str],
    name: str = "train",
    split: str = "train",
    options: dict[str, Any] | None = None,
) -> None:
    def make(bad: BadRecords) -> dict[str, Any]:
        made.append(name)
        return _write(folder.path, _rows(4, split), (split,), bad=bad)

    folder.step(name, split_files(split), [source], options or {"style": "paper"}, make)


def test_files_are_reused_while_inputs_options_and_files_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text("[]")
    folder, made = OutputFolder(tmp_path / "out"), list[str]()
    _step(folder, Source(raw), made)
    _step(OutputFolder(tmp_path / "out"), Source(raw), made)
    assert made == ["train"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["wrote", "reused"]
    assert said[1].endswith("train: 4 queries, 1 conversations, 8 qrels")

    _step(folder, Source(raw), made, options={"style": "compact"})  # other options
    raw.write_text("[ ]")  # another input
    _step(folder, Source(raw), made, options={"style": "compact"})
    (tmp_path / "out" / "train.trec").write_text("cut")  # a damaged file
    _step(folder, Source(raw), made, options={"style": "compact"})
    (tmp_path / "out" / "manifest.json").write_text("{")  # a damaged manifest
    _step(folder, Source(raw), made, options={"style": "compact"})
    assert len(made) == 5
    assert read_golds(tmp_path / "out", ["train"]) == {"d17", "d4"}


def test_a_broken_run_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text("[]")
    folder, made = OutputFolder(tmp_path / "out"), list[str]()
    _step(folder, Source(raw), made)

    def breaks(bad: BadRecords) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.step("train", split_files("train"), [Source(raw)], {"style": "compact"}, breaks)
    assert (tmp_path / "out" / "train.json").exists()  # what was whole stays
    _step(folder, Source(raw), made)
    assert made == ["train", "train"]  # but is not trusted


def test_files_of_another_split_are_removed(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text("[]")
    folder, made = OutputFolder(tmp_path / "out"), list[str]()
    _step(folder, Source(raw), made, split="validation")
    _step(folder, Source(raw), made, split="train")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "train.json",
        "train.parquet",
        "train.trec",
    ]


def test_skipped_records_are_listed_again_and_a_stricter_limit_makes_the_files_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text("[]")

    def make(bad: BadRecords) -> dict[str, Any]:
        return _write(tmp_path / "out", [*_rows(2), *_rows(1)], bad=bad)

    for skip_bad in (1, 1):
        OutputFolder(tmp_path / "out", skip_bad).step("train", split_files("train"), [Source(raw)], {}, make)
        assert "skipped a malformed record: here:0: field 'qid' repeats 'x_0_0'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="repeats"):
        OutputFolder(tmp_path / "out", 0).step("train", split_files("train"), [Source(raw)], {}, make)


def test_memory_does_not_grow_with_the_collection(tmp_path: Path) -> None:
    """25,000 passages of 600 characters (15 MB) pass through in less than 2 MB."""

    def lines() -> Iterator[str]:
        yield "id\ttext\ttitle\n"
        for i in range(25_000):
            yield f"wiki:{i}\t{'word ' * 119}{i}\tTitle {i} [SEP] Part\n"

    path = tmp_path / "full_wiki_segments.tsv"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines())
    tracemalloc.start()
    bad = BadRecords()
    counts = write_collection(tmp_path / "collection.jsonl", passages(Source(path), bad), {"wiki:7"}, bad)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["passages"] == 25_000
    assert peak_bytes < 2_000_000 < path.stat().st_size / 7
    with open(tmp_path / "collection.jsonl", encoding="utf-8") as file:
        assert json.loads(file.readline()) == {"id": "wiki:0", "contents": f"Title 0 Part {'word ' * 119}0"}
