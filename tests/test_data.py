"""Reading training rows, fitting them to a length, and the order in which they are drawn."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.files import write_jsonl
from convsearch.model.loading import encode_chat, load_tokenizer
from convsearch.parquet import read_rows
from convsearch.trainers.data import (
    batch_of,
    fit_length,
    middling_first,
    read_examples,
    stream_of,
)
from convsearch.types import Example, Message

CHAT = [{"role": "user", "content": "rewrite: and his wife?"}]
EXTRA = {
    "split": "train",
    "index": 0,
    "answer": "",
    "question": "and his wife?",
    "query_id": "t_1_2",
    "context": ["who?", "he"],
}
ROW: dict[str, Any] = {
    "data_source": "topiocqa",
    "prompt": CHAT,
    "ability": "rewrite",
    "reward_model": {"style": "rule", "ground_truth": ["d17", "d18"]},
    "extra_info": EXTRA,
}


def parquet(path: Path, *rows: dict[str, Any]) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


# --- GRPO rows


def test_rows_of_several_files_in_order(tmp_path: Path) -> None:
    other = {**ROW, "extra_info": {**EXTRA, "query_id": "t_1_3", "question": "and when?"}}
    paths = [parquet(tmp_path / "a.parquet", ROW, other), parquet(tmp_path / "b.parquet", ROW)]
    first = Example("t_1_2", ({"role": "user", "content": "rewrite: and his wife?"},), "and his wife?", ("d17", "d18"))
    examples = read_examples(paths)
    assert examples == [first, Example("t_1_3", first.messages, "and when?", ("d17", "d18")), first]


@pytest.mark.parametrize(
    ("truth", "golds"), [("d17", ("d17",)), (["d17"], ("d17",)), ([17, 18], ("17", "18")), ("12 a", ("12 a",))]
)
def test_one_gold_passage_as_the_reference_writes_it_or_a_list(
    tmp_path: Path, truth: Any, golds: tuple[str, ...]
) -> None:
    row = {**ROW, "reward_model": {"style": "rule", "ground_truth": truth}}
    assert read_examples([parquet(tmp_path / "a.parquet", row)])[0].gold_docids == golds


def test_the_prompt_may_have_another_name_and_several_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": ""}, *CHAT]
    row = {name: value for name, value in ROW.items() if name != "prompt"} | {"chat": chat}
    assert read_examples([parquet(tmp_path / "a.parquet", row)], "chat")[0].messages == tuple(chat)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"extra_info": {"question": "and his wife?"}}, "query_id"),
        ({"extra_info": {**EXTRA, "query_id": None}}, "query_id"),  # not the string "None"
        ({"extra_info": {"query_id": "t_1_2"}}, "question"),
        ({"extra_info": "t_1_2"}, "query_id"),
        ({"reward_model": {"style": "rule"}}, "ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": None}}, "ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": []}}, "ground_truth"),
        ({"reward_model": {"style": "rule", "ground_truth": ""}}, "ground_truth"),
        ({"prompt": "and his wife?"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [{"content": "x"}]}, "role"),
        ({"prompt": [{"role": "user", "content": None}]}, "content"),
    ],
)
def test_a_row_of_another_form_is_named_by_file_row_and_field(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    path = parquet(tmp_path / "a.parquet", {**ROW, **changes})
    with pytest.raises(ValueError) as raised:
        read_examples([path])
    assert (
        str(raised.value)
        == f"{path}: row 0 is not of the GRPO form: field '{field}' is missing, empty or of the wrong type"
    )


def test_a_column_that_is_missing_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"prompt": CHAT, "extra_info": EXTRA})
    with pytest.raises(ValueError, match=rf"^{path}: column 'reward_model' is missing; it has prompt, extra_info$"):
        read_examples([path])


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    absent, text, cut = tmp_path / "no.parquet", tmp_path / "text.parquet", tmp_path / "cut.parquet"
    text.write_text("qid,question\n")
    cut.write_bytes(Path(parquet(tmp_path / "a.parquet", ROW)).read_bytes()[:-20])
    with pytest.raises(
        ValueError,
        match=rf"^{absent}: no such file; write it with data_preprocess \(GRPO\) or convsearch.distill \(SFT\)$",
    ):
        read_examples([str(absent)])
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no such file"):
        read_examples([str(tmp_path)])
    for path in (text, cut):
        with pytest.raises(ValueError, match=rf"^{path}: not a parquet file, or damaged \("):
            read_examples([str(path)])


def test_files_without_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), path)
    with pytest.raises(ValueError, match=rf"^{path}: no rows$"):
        read_examples([str(path)])


def test_parquet_rows_have_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", *({"n": n, "text": str(n)} for n in range(5)))
    assert list(read_rows(path, ["n"], remedy="")) == [{"n": n} for n in range(5)]


# --- lengths


def examples_of(*lengths: int) -> list[Example]:
    return [Example(f"q{length}", (), "q", ("d",), prompt_ids=tuple(range(1, length + 1))) for length in lengths]


def test_long_rows_are_left_out_or_cut_or_an_error() -> None:
    rows = examples_of(5, 9, 10, 11, 30)
    assert fit_length(rows, 10, True, "error") == rows[:3]
    assert [len(row.prompt_ids) for row in fit_length(rows, 10, False, "left")] == [5, 9, 10, 10, 10]
    assert fit_length(rows, 30, False, "error") == rows
    too_long = "row 3 has 11 prompt tokens, above data.max_prompt_length=10: raise it, set data.filter_overlong"
    with pytest.raises(ValueError, match=f"^{too_long}"):
        fit_length(rows, 10, False, "error")
    none_left = "all 5 prompts are longer than data.max_prompt_length=4; the shortest has 5 tokens"
    with pytest.raises(ValueError, match=f"^{none_left}$"):
        fit_length(rows, 4, True, "error")


@pytest.mark.parametrize(
    ("limit", "left", "right"),
    [(5, (1, 2, 3), (1, 2, 3)), (3, (1, 2, 3), (1, 2, 3)), (2, (2, 3), (1, 2)), (1, (3,), (1,))],
)
def test_truncation(limit: int, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    for side, expected in (("left", left), ("right", right)):
        (row,) = fit_length(examples_of(3), limit, False, side)
        assert row.prompt_ids == expected


# --- order


def test_order_without_shuffling() -> None:
    assert [batch_of(range(7), 3, step, 0, shuffle=False) for step in range(4)] == [
        [0, 1, 2],
        [3, 4, 5],
        [0, 1, 2],
        [3, 4, 5],
    ]


@settings(max_examples=30)
@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(0, 2**31),
    st.integers(0, 5),
)
def test_an_epoch_draws_every_row_once_but_for_an_incomplete_last_batch(
    sizes: tuple[int, int], seed: int, epoch: int
) -> None:
    num_items, batch_size = sizes
    per_epoch = num_items // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    batches = {
        step: batch_of(range(num_items), batch_size, step, seed) for step in reversed(steps)
    }  # asked for in any order
    drawn = [row for step in steps for row in batches[step]]
    assert all(len(batch) == batch_size for batch in batches.values())
    assert len(drawn) == len(set(drawn)) == per_epoch * batch_size
    assert set(drawn) <= set(range(num_items))
    assert all(batch_of(range(num_items), batch_size, step, seed) == batch for step, batch in batches.items())


def test_seeds_and_epochs_are_shuffled_anew() -> None:
    orders = [batch_of(range(200), 200, epoch, seed) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(200)) != order for order in orders)


def test_the_other_rows_follow_a_batch() -> None:
    """In an order that is fixed for all time by seed and step, so that a resumed run goes on with the same rows."""
    assert list(stream_of("abcdefg", 3, 0, seed=5, shuffle=False)) == list("abcedfg")
    assert list(stream_of("abcdefg", 3, 1, seed=5, shuffle=False)) == list("defabgc")
    assert list(stream_of("abcdefg", 3, 3, seed=5, shuffle=False)) == list("defbgca")
    for step in range(9):
        rows = list(stream_of(range(50), 8, step, seed=1))
        assert rows[:8] == batch_of(range(50), 8, step, seed=1)
        assert sorted(rows) == list(range(50))
    assert len({tuple(stream_of(range(50), 8, step, seed))[8:] for step in range(9) for seed in (1, 2)}) == 18


def test_prompts_of_middling_difficulty_come_first(tmp_path: Path) -> None:
    """Mean reciprocal ranks: a 1, b (1 + 0) / 2, c 0, d (1/2 + 1/3) / 2 = 0.42; e and f have no samples: 0.25."""
    ranks = {"a": [1, 1], "b": [1, None], "c": [None, None], "d": [2, 3], "other": [1, 2]}
    lines = [{"qid": qid, "samples": [{"rank": rank} for rank in some]} for qid, some in ranks.items()]
    path, examples = tmp_path / "samples.jsonl", [Example(qid, (), "", ("d",)) for qid in "abcdef"]
    write_jsonl(path, lines)
    orders = {"".join(row.qid for row in middling_first(examples, path, seed)) for seed in range(40)}
    assert orders == {f"bd{x}{y}" for x in ("ef", "fe") for y in ("ac", "ca")}
    assert middling_first(examples, path, 3) == middling_first(examples, path, 3)
    with pytest.raises(ValueError, match=r"has none of the training prompts: give that of their own warm-up"):
        middling_first([Example("z", (), "", ("d",))], path, 1)
    write_jsonl(
        path, [{"qid": "a", "named": {"rank": 1}, "samples": []}, {"qid": "b", "named": {"rank": 2}, "samples": []}]
    )
    assert [row.qid for row in middling_first(examples[:2], path, 1)] == ["b", "a"]  # no samples: the rank with a name
    for wrong in ({"qid": "a"}, {"qid": "a", "samples": []}, {"qid": "a", "samples": [{"rank": "1"}]}):
        write_jsonl(path, [lines[0], wrong])
        with pytest.raises(ValueError, match=r"samples\.jsonl:2: not a line of samples\.jsonl"):
            middling_first(examples, path, 1)


@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "system", "Ignore this. ", "\n", "é", " "]), max_size=9))
def test_control_tokens_in_a_text_stay_text(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    messages: tuple[Message, ...] = ({"role": "user", "content": text}, {"role": "assistant", "content": "yes"})
    ids = encode_chat(tokenizer, messages)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (3, 2)  # those of the template
    wanted = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == wanted
    if "<|" not in text:
        assert ids == tuple(tokenizer.encode(wanted, add_special_tokens=False))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(str(tiny_llama))


def test_fewer_rows_than_a_batch() -> None:
    with pytest.raises(ValueError, match=r"^7 rows do not fill one batch of data.train_batch_size=8; lower it$"):
        batch_of(range(7), 8, 0, 0)
