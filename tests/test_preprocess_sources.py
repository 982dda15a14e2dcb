"""Reading: every form of file, every fault with its file, record and field; splitting by conversation."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_preprocess.sources import (
    BadRecords,
    Record,
    RecordError,
    Source,
    find_sources,
    open_source,
    pick,
    read_records,
    read_table,
)
from data_preprocess.splits import hold_out, partition

OBJECTS = [{"a": "x", "n": 1}, {"a": "ü", "n": 2.5}, {"a": [1, {"b": None}]}]


def _records(source: Source, bad: BadRecords | None = None) -> list[dict[str, Any]]:
    return [record.data for record in read_records(source, bad or BadRecords())]


def _as_array(path: Path) -> Source:
    path.write_text("\n " + json.dumps(OBJECTS), encoding="utf-8")
    return Source(path)


def _as_lines(path: Path) -> Source:
    path.write_text("\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in OBJECTS), encoding="utf-8")
    return Source(path)


def _as_gzip(path: Path) -> Source:
    path = path.with_suffix(".json.gz")
    path.write_bytes(gzip.compress(json.dumps(OBJECTS).encode()))
    return Source(path)


def _as_member(path: Path) -> Source:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/data.json", json.dumps(OBJECTS))
    return Source(path, "inner/data.json")


@pytest.mark.parametrize("make", [_as_array, _as_lines, _as_gzip, _as_member])
def test_array_lines_gzip_and_zip_give_the_same_records(make: Any, tmp_path: Path) -> None:
    assert _records(make(tmp_path / "data.json")) == OBJECTS


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert _records(Source(tmp_path / "empty.jsonl")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": ', r"data\.json: record 2: not JSON .*cut off or damaged"),
        (b'[{"a": 1}, 5]', r"data\.json: record 2: expected a JSON object, got 5; .*--skip-bad"),
        (b'{"a": 1}\n\n{"a"\n', r"data\.json:3: not a line of JSON"),
        (b'{"a": 1}\n[1]\n', r"data\.json:2: expected a JSON object, got \[1\]"),
        (b"<html>", r"data\.json: expected a JSON array or JSON lines, but it starts with b'<html>'"),
    ],
)
def test_a_malformed_file_names_file_and_record(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _records(Source(tmp_path / "data.json"))


def test_damaged_and_missing_archives_are_one_sentence(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([{"a": "x" * 1000} for _ in range(500)]).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.zip").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"cut\.json\.gz: the archive is damaged .*fetch it again"):
        _records(Source(tmp_path / "cut.json.gz"))
    with pytest.raises(ValueError, match=r"no\.zip: the archive is damaged"):
        find_sources(tmp_path)
    with pytest.raises(ValueError, match=r"gone\.json: no such file"), open_source(Source(tmp_path / "gone.json")):
        pass


def test_skip_bad_tolerates_that_many_and_lists_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\nbroken\n[]\n{"a": 2}\n', encoding="utf-8")
    bad = BadRecords(limit=2)
    assert _records(Source(path), bad) == [{"a": 1}, {"a": 2}]
    assert [message.split(": ")[0] for message in bad.messages] == [f"{path}:2", f"{path}:3"]
    with pytest.raises(
        ValueError, match=r"2 malformed records, but --skip-bad allows 1; the last one is .*data\.jsonl:3"
    ):
        _records(Source(path), BadRecords(limit=1))


@pytest.mark.parametrize(
    ("method", "field", "message"),
    [
        ("text", "none", "f.json: record 7: field 'none' is missing"),
        ("text", "blank", "f.json: record 7: field 'blank' is blank"),
        ("text", "n", "f.json: record 7: field 'n' must be a string, got 5"),
        ("number", "blank", "f.json: record 7: field 'blank' must be a whole number, got '  '"),
        ("number", "yes", "f.json: record 7: field 'yes' must be a whole number, got True"),
        ("number", "none", "f.json: record 7: field 'none' is missing"),
        ("texts", "mixed", "f.json: record 7: field 'mixed' must be a list of strings, got ['a', 1]"),
        ("objects", "mixed", "f.json: record 7: field 'mixed' must be a list of objects, got ['a', 1]"),
        ("docid", "two", "f.json: record 7: field 'two' has white space: 'a b'"),
        ("optional_text", "n", "f.json: record 7: field 'n' must be a string, got 5"),
    ],
)
def test_a_wrong_field_is_named(method: str, field: str, message: str) -> None:
    record = Record({"blank": "  ", "n": 5, "yes": True, "mixed": ["a", 1], "two": "a b"}, "f.json: record 7")
    with pytest.raises(RecordError) as caught:
        getattr(record, method)(field)
    assert str(caught.value) == message


def test_right_fields_are_read() -> None:
    record = Record({"t": " a ", "n": "12", "l": ["a ", ""], "o": [{"x": 1}], "null": None}, "here")
    assert (record.text("t"), record.number("n"), record.texts("l")) == ("a", 12, ["a", ""])
    assert record.objects("o")[0].where == "here, o[0]"
    assert (record.optional_text("null"), record.optional_text("gone"), record.optional_text("t")) == (None, None, "a")


def test_a_table_is_read_as_csv_does(tmp_path: Path) -> None:
    path = tmp_path / "wiki.tsv"
    path.write_text('id\ttext\ttitle\n1\t"two\nlines ""quoted"""\tA [SEP] B\n2\tplain "inside"\tC\n', encoding="utf-8")
    rows = list(read_table(Source(path), ("id", "text", "title"), BadRecords()))
    assert [row.data for row in rows] == [
        {"id": "1", "text": 'two\nlines "quoted"', "title": "A [SEP] B"},
        {"id": "2", "text": 'plain "inside"', "title": "C"},
    ]
    assert rows[1].where == f"{path}:4"


def test_a_row_with_other_columns_and_an_unclosed_quote_are_named(tmp_path: Path) -> None:
    path = tmp_path / "wiki.tsv"
    path.write_text("id\ttext\ttitle\n1\tonly two\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"wiki\.tsv:2: expected 3 columns \(id, text, title\), got 2"):
        list(read_table(Source(path), ("id", "text", "title"), BadRecords()))
    path.write_text('1\t"never closed\n' + "x" * 1000 + "\n" * 1100000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"wiki\.tsv:\d+: not a row .*field larger than field limit"):
        list(read_table(Source(path), ("id", "text", "title"), BadRecords()))


def test_files_are_found_in_folders_and_zips_at_folder_boundaries(tmp_path: Path) -> None:
    (tmp_path / "a" / "all_history").mkdir(parents=True)
    (tmp_path / "a" / "all_history" / "train.json").write_text("[]")
    (tmp_path / "a" / "not_all_history_train.json").write_text("[]")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("deep/dev.json", "[]")
    sources = find_sources(tmp_path)
    assert pick(sources, "all_history/train.json") == Source(tmp_path / "a" / "all_history" / "train.json")
    assert pick(sources, "history/train.json") is None
    assert pick(sources, "nowhere.json", "dev.json") == Source(tmp_path / "z.zip", "deep/dev.json")
    with pytest.raises(ValueError, match="no such file or folder"):
        find_sources(tmp_path / "gone")


conversation_sets = st.sets(st.integers(0, 10_000), min_size=2, max_size=60)


@given(conversation_sets, st.integers(0, 5), st.data())
def test_held_out_conversations_are_nested_and_independent_of_order(
    conv_ids: set[int], seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(conv_ids) - 1))
    held_out = hold_out(conv_ids, count, seed)
    assert len(held_out) == count
    assert held_out < {str(conv_id) for conv_id in conv_ids}
    assert hold_out(data.draw(st.permutations(sorted(conv_ids))), count, seed) == held_out
    assert hold_out(conv_ids, max(0, count - 1), seed) <= held_out


@given(conversation_sets, st.integers(0, 5), st.lists(st.integers(0, 100), min_size=1, max_size=4).filter(any))
def test_a_partition_covers_all_and_keeps_its_fractions(conv_ids: set[int], seed: int, weights: list[int]) -> None:
    fractions = {f"s{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    placed = partition(conv_ids, fractions, seed)
    assert set(placed) == {str(conv_id) for conv_id in conv_ids}
    for split, fraction in fractions.items():
        assert abs(sum(where == split for where in placed.values()) - fraction * len(conv_ids)) <= 1
    assert placed == partition(sorted(conv_ids, reverse=True), fractions, seed)


def test_golden_split() -> None:
    """Locks the hash: another one would move conversations between train and test unseen."""
    assert sorted(hold_out(range(10), 3, 13)) == ["6", "7", "9"]
    assert sorted(range(10), key=lambda i: hashlib.sha256(f"13:{i}".encode()).digest())[:3] == [6, 9, 7]
    assert hold_out(range(10), 3, 13) != hold_out(range(10), 3, 14)


@pytest.mark.parametrize("count", [2, 3, -1])
def test_holding_out_everything_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="leaves no conversation to train on"):
        hold_out([1, 2], count, 13)


@pytest.mark.parametrize("fractions", [{"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}])
def test_fractions_must_add_up(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="add up to 1, got train"):
        partition([1, 2], fractions, 13)
