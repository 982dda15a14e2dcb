"""What self-distillation promises.

1. k samples a conversation, each with the rank that the server gives it; the same whatever the batches and breaks.
2. Kept is what parses and has its gold passage within the rank limit; the best first, no output twice, at most
   --max_kept.
3. With --names, the best rewrite that needs no model is a candidate, before samples of the same rank.
4. The SFT parquet has the zero-shot prompt and trains; the yield adds up by reason and by turn.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pyarrow.parquet as pq
import pytest

from convsearch import checksums, sft
from convsearch import distill as command_line
from convsearch.generation import distill
from convsearch.generation.rewriter import build_rewriter
from convsearch.parsing import parse_rewrite
from convsearch.prompts import render
from convsearch.runs.tracking import read_metrics
from convsearch.types import Conversation, Turn

ROWS = helpers.conversation_rows(list(helpers.GOLDS))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.write_jsonl(tmp_path_factory.mktemp("distill") / "train.json", ROWS)


def command(model: Path, source: Path, output: Path, url: str, *flags: object) -> list[object]:
    fixed = [
        "--prompt_style",
        "compact",
        "--max_tokens",
        64,
        "--device",
        "cpu",
        "--threads",
        1,
        "--batch_size",
        32,
        "--k",
        6,
    ]
    form = ["--scaffold", "--think_tokens", 6, "--rewrite_tokens", 6, "--temperature", 1]
    return [
        "--model_name_or_path",
        model,
        "--input_path",
        source,
        "--output_dir",
        output,
        "--retriever_url",
        url,
        *fixed,
        *form,
        *flags,
    ]


def distilled(model: Path, source: Path, output: Path, url: str, *flags: object) -> str:
    status, printed = helpers.call(command_line.main, command(model, source, output, url, *flags))
    assert status == 0, printed
    return printed


def failed(model: Path, source: Path, output: Path, url: str, *flags: object) -> str:
    return helpers.one_sentence(*helpers.call(command_line.main, command(model, source, output, url, *flags)))


def test_samples_ranks_filter_and_parquet(
    form_llama: Path, conversations: Path, toy_server: str, toy_index: Path, tmp_path: Path
) -> None:
    from retriever_server.bm25.index import Bm25Index

    output = tmp_path / "out"
    printed = distilled(form_llama, conversations, output, toy_server, "--max_kept", 2, "--rank_limit", 4)
    samples = {line["qid"]: line["samples"] for line in helpers.read_jsonl(output / "samples.jsonl")}
    assert list(samples) == [row["qid"] for row in ROWS]
    assert {len(rows) for rows in samples.values()} == {6}
    index = Bm25Index.load(toy_index)
    for row in ROWS:
        for sample in samples[row["qid"]]:
            parsed = parse_rewrite(sample["output"])
            assert (sample["rewrite"], sample["error"]) == (parsed.text, None)
            assert [sample["rank"]] == index.gold_ranks([sample["rewrite"]], [row["gold_docids"]], 100)

    kept = {
        qid: {sample["output"].strip() for sample in rows if (sample["rank"] or 99) <= 4}
        for qid, rows in samples.items()
    }
    table = pq.read_table(output / "sft.parquet").to_pylist()
    assert len(table) == sum(min(2, len(outputs)) for outputs in kept.values())
    assert len(table) > 5
    for number, line in enumerate(table):
        extra = line["extra_info"]
        conversation = Conversation.from_record(next(row for row in ROWS if row["qid"] == extra["query_id"]))
        assert extra["answer"] in kept[extra["query_id"]]
        assert extra["index"] == number
        assert extra["prompt"] == render(conversation, "compact")[0]["content"]
        assert "Sagrada" not in extra["prompt"]  # the worked example was for sampling alone
        assert line["prompt"] == [{"role": "user", "content": extra["prompt"]}]
        assert line["reward_model"] == {"style": "rule", "ground_truth": list(conversation.gold_docids)}
    assert len({(line["extra_info"]["query_id"], line["extra_info"]["answer"]) for line in table}) == len(table)

    summary = json.loads((output / "yield.json").read_text())
    good = sum((sample["rank"] or 99) <= 4 for rows in samples.values() for sample in rows)
    assert (summary["rows"], summary["samples"], summary["by_reason"]["kept"]) == (len(table), 108, good)
    assert sum(summary["by_reason"].values()) == 108
    assert {turn: counts["samples"] for turn, counts in summary["by_turn"].items()} == {"1": 36, "2": 72}
    assert sum(counts.get("samples_kept", 0) for counts in summary["by_turn"].values()) == good
    assert f"{output / 'sft.parquet'}: {len(table)} rows to learn from" in printed
    assert "gold not found" in printed

    overrides = helpers.sft_overrides(
        form_llama, output / "sft.parquet", tmp_path / "sft", max_length=512, train_batch_size=4
    )
    assert helpers.call(sft.main, [*overrides, "trainer.total_training_steps=1"])[0] == 0
    assert read_metrics(tmp_path / "sft")[0]["loss"] > 0


def sample(output: str, rank: int | None, error: str | None = None) -> dict[str, Any]:
    return {"output": output, "rewrite": None if error else output, "error": error, "rank": rank}


RECORDS = [
    {"qid": "a", "question": "its food?", "context": ["q", "a"]},
    {"qid": "b", "question": "rome food", "context": []},
]
SAMPLES = {
    "a": [
        sample("rome", 3),
        sample("rome food", 1),
        sample("x", None, "no_tag"),
        sample("rome food", 1),
        sample("Its FOOD", 1),
    ],
    "b": [
        sample("far", None),
        sample("rome food", 2),
        sample("rome food!", 2),
        sample("y", None, "truncated"),
        sample("z", None, "no_tag"),
    ],
}


@pytest.mark.parametrize(
    ("flags", "kept", "reasons"),
    [
        (
            {},
            ["rome food"],
            {"kept": 3, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1, "gold below rank 1": 3},
        ),
        (
            {"rank_limit": 2},
            ["rome food", "rome food"],
            {"kept": 5, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1, "gold below rank 2": 1},
        ),
        (
            {"rank_limit": 3, "max_kept": 3},
            ["rome food", "Its FOOD", "rome", "rome food", "rome food!"],
            {"kept": 6, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1},
        ),
        (
            {"rank_limit": 3, "max_kept": 3, "drop_copies": True},  # a first turn may repeat its question
            ["rome food", "rome", "rome food", "rome food!"],
            {"kept": 5, "copy of the question": 1, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1},
        ),
    ],
)
def test_the_filter_by_hand(flags: dict[str, Any], kept: list[str], reasons: dict[str, int]) -> None:
    args = Namespace(**({"rank_limit": 1, "max_kept": 1, "drop_copies": False, "names": False} | flags))
    lines = {qid: {"named": sample("not asked for", 1), "samples": samples} for qid, samples in SAMPLES.items()}
    rows, summary = distill.select(args, RECORDS, lines)
    assert [row["output"] for row in rows] == kept
    assert summary["by_reason"] == reasons
    assert {turn: counts["samples"] for turn, counts in summary["by_turn"].items()} == {"1": 5, "2": 5}


@pytest.mark.parametrize(
    ("flags", "ranks", "kept", "reasons"),
    [
        (  # before the samples of rank 1; b has no sample of rank 1
            {},
            (1, 1),
            ["named a", "named b"],
            {"kept": 5, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1, "gold below rank 1": 3},
        ),
        (  # behind the samples of better ranks
            {"rank_limit": 3, "max_kept": 4},
            (3, 2),
            ["rome food", "Its FOOD", "named a", "rome", "named b", "rome food", "rome food!"],
            {"kept": 8, "form: no_tag": 2, "form: truncated": 1, "gold not found": 1},
        ),
        (  # a worse rank loses; one beyond the limit or not found is no candidate
            {"rank_limit": 2},
            (2, None),
            ["rome food", "rome food"],
            {"kept": 6, "form: no_tag": 2, "form: truncated": 1, "gold not found": 2, "gold below rank 2": 1},
        ),
    ],
)
def test_the_named_rewrite_is_a_candidate(
    flags: dict[str, Any], ranks: tuple[int, int | None], kept: list[str], reasons: dict[str, int]
) -> None:
    args = Namespace(**({"rank_limit": 1, "max_kept": 1, "drop_copies": False, "names": True} | flags))
    named = {qid: sample(f"named {qid}", rank) for qid, rank in zip("ab", ranks, strict=True)}
    lines = {qid: {"named": named[qid], "samples": samples} for qid, samples in SAMPLES.items()}
    rows, summary = distill.select(args, RECORDS, lines)
    assert [row["output"] for row in rows] == kept
    assert summary["by_reason"] == reasons
    assert {turn: counts["samples"] for turn, counts in summary["by_turn"].items()} == {"1": 6, "2": 6}


def test_names_alone_need_no_model(toy_server: str, toy_index: Path, tmp_path: Path) -> None:
    """Of each question the first of the rewrites with the best rank; a broken run goes on after its last whole line."""
    contexts = [[text.capitalize() for text in row["context"]] for row in ROWS]
    rows = [row | {"context": context} for row, context in zip(ROWS, contexts, strict=True)]
    source = helpers.write_jsonl(tmp_path / "train.json", rows)
    no_model, output = tmp_path / "no such folder", tmp_path / "out"
    distilled(no_model, source, output, toy_server, "--k", 0, "--names", "--rank_limit", 20)
    lines = helpers.read_jsonl(output / "samples.jsonl")
    for row, context, line in zip(ROWS, contexts, lines, strict=True):
        thought, rewrite = "The question is complete.", row["question"]
        town = context[1].split()[0] if context else "none"
        if context and town != "Rome":  # of passages with equal scores the first one leads: "its food?" finds Rome's
            thought, rewrite = f"The question is about {town}.", f"{town}: {row['question']}"
        wanted = f"<think>{thought}</think>\n<rewrite>{rewrite}</rewrite>"
        assert line == {
            "qid": row["qid"],
            "named": {"output": wanted, "rewrite": rewrite, "error": None, "rank": 1},
            "samples": [],
        }
    answers = [line["extra_info"]["answer"] for line in pq.read_table(output / "sft.parquet").to_pylist()]
    assert answers == [line["named"]["output"] for line in lines]
    summary = json.loads((output / "yield.json").read_text())
    assert (summary["rows"], summary["samples"], summary["by_reason"]) == (18, 18, {"kept": 18})

    whole = (output / "samples.jsonl").read_bytes()
    cut = whole.splitlines(keepends=True)
    (output / "samples.jsonl").write_bytes(b"".join(cut[:5]) + cut[5][:40])
    error = failed(no_model, source, output, toy_server, "--k", 0, "--names")
    assert f"samples.jsonl is damaged: its first {len(whole)} bytes are not those that were written" in error
    checksums.settings_of(output / "samples.jsonl").unlink()  # cut on purpose
    printed = distilled(no_model, source, output, f"embedded:{toy_index}", "--k", 0, "--names", "--batch_size", 4)
    assert "5 of 18 lines are there already and are kept" in printed
    assert (output / "samples.jsonl").read_bytes() == whole

    status, printed = helpers.call(command_line.main, command(no_model, source, output, toy_server, "--k", 0))
    assert (status, "--k is 0; it must be at least 1" in printed) == (2, True)
    bare = [{key: value for key, value in line.items() if key != "named"} for line in lines]
    helpers.write_jsonl(output / "samples.jsonl", bare)
    checksums.settings_of(output / "samples.jsonl").unlink()
    error = failed(no_model, source, output, toy_server, "--k", 0, "--names")
    assert "samples.jsonl was written without --names: leave it out, or name another --output_dir" in error


def test_the_best_topic_is_the_retrievers_choice() -> None:
    """The rank of the rewrite times the root of the topic's own; without any rank, the question stays."""
    ranks = {"Oslo: its food?": 1, "Oslo": 100, "Rome: its food?": 2, "Rome": 9, "food": 4}

    class Retriever:
        def gold_ranks(self, golds: list[tuple[str, ...]], texts: list[str]) -> list[int | None]:
            assert golds == [("r",)] * 4 + [("x",)]
            return [ranks.get(text) for text in texts]

    turns = (Turn("what of Rome", "far"), Turn("and of Oslo", "far"))
    part = [Conversation("a", turns, "its food?", ("r",)), Conversation("b", (), "why?", ("x",))]
    first, second = distill.best_names(Retriever(), part)  # type: ignore[arg-type]
    output = "<think>The question is about Rome.</think>\n<rewrite>Rome: its food?</rewrite>"
    assert first["named"] == {"output": output, "rewrite": "Rome: its food?", "error": None, "rank": 2}  # 6 below 10
    assert (second["named"]["rewrite"], second["named"]["rank"]) == ("why?", None)
    ranks |= {"its food?": 2}  # and the topic that it says itself is better than Rome
    assert distill.best_names(Retriever(), part)[0]["named"]["rewrite"] == "its food?"  # type: ignore[arg-type]


def test_names_come_with_the_samples_of_the_model(
    form_llama: Path, conversations: Path, toy_server: str, tmp_path: Path
) -> None:
    distilled(form_llama, conversations, tmp_path, toy_server, "--limit", 3, "--rank_limit", 20)
    bare = helpers.read_jsonl(tmp_path / "samples.jsonl")
    for name in ("samples.jsonl", "samples.jsonl.settings.json"):
        (tmp_path / name).unlink()
    distilled(form_llama, conversations, tmp_path, toy_server, "--limit", 3, "--rank_limit", 20, "--names")
    both = helpers.read_jsonl(tmp_path / "samples.jsonl")
    assert [line["samples"] for line in both] == [line["samples"] for line in bare]
    assert [line["named"]["rewrite"] for line in both] == [row["question"] for row in ROWS[:3]]  # no capital: no name
    assert json.loads((tmp_path / "yield.json").read_text())["samples"] == 3 * 7
    distilled(form_llama, conversations, tmp_path, toy_server, "--limit", 3, "--rank_limit", 20)  # and without them


@pytest.mark.slow
def test_a_broken_run_goes_on(
    form_llama: Path, conversations: Path, toy_server: str, toy_index: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    distilled(form_llama, conversations, whole, toy_server)
    lines = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    broken.mkdir()
    (broken / "samples.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    printed = distilled(
        form_llama, conversations, broken, f"embedded:{toy_index}", "--batch_size", 12
    )  # another server, other batches
    assert "5 of 18 lines are there already and are kept" in printed
    assert (broken / "samples.jsonl").read_bytes() == b"".join(lines)
    for name in ("sft.parquet", "yield.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    printed = distilled(
        form_llama, conversations, broken, "", "--rank_limit", 3
    )  # all is there: no server is needed to filter anew
    assert "18 of 18 lines are there already" in printed
    strict, loose = (json.loads((folder / "yield.json").read_text())["rows"] for folder in (whole, broken))
    assert loose > strict


def test_limits_and_first_turns(form_llama: Path, conversations: Path, toy_server: str, tmp_path: Path) -> None:
    distilled(form_llama, conversations, tmp_path, toy_server, "--drop_first_turns", "--limit", 5, "--rank_limit", 20)
    asked = [line["qid"] for line in helpers.read_jsonl(tmp_path / "samples.jsonl")]
    assert asked == [row["qid"] for row in ROWS if row["context"]][:5]
    distilled(form_llama, conversations, tmp_path, toy_server, "--limit", 3, "--rank_limit", 20)  # fewer than are there
    summary = json.loads((tmp_path / "yield.json").read_text())
    assert summary["samples"] == 18


def test_the_model_name_chooses_the_prompt(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    for flags, expected in (([], True), (["--model_name", "ConvSearch-R1"], False)):
        args = command_line.parse_args([str(part) for part in command(form_llama, conversations, tmp_path, "", *flags)])
        rewriter = build_rewriter(args)
        prompt = rewriter.tokenizer.decode(rewriter.prompt_ids(Conversation.from_record(ROWS[1])))
        assert ("Sagrada" in prompt) is expected


def test_nothing_kept_says_what_to_try_and_keeps_the_samples(
    tiny_llama: Path, conversations: Path, toy_server: str, tmp_path: Path
) -> None:
    arguments = [
        part for part in command(tiny_llama, conversations, tmp_path, toy_server, "--limit", 4) if part != "--scaffold"
    ]
    status, printed = helpers.call(command_line.main, arguments)
    error = helpers.one_sentence(status, printed)
    assert "no sample of 24 was kept; raise --k or --rank_limit, or use --scaffold" in error
    assert "form: " in printed
    assert len(helpers.read_jsonl(tmp_path / "samples.jsonl")) == 4
    assert not (tmp_path / "sft.parquet").exists()


def test_mistakes_are_one_sentence(form_llama: Path, conversations: Path, toy_server: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    distilled(form_llama, conversations, output, toy_server)
    error = failed(form_llama, conversations, output, toy_server, "--k", 3)
    assert "samples.jsonl has 6 samples per conversation, not --k 3" in error
    other = helpers.write_jsonl(tmp_path / "other.json", [row | {"qid": f"x{row['qid']}"} for row in ROWS])
    assert "samples.jsonl:1: query 'c0_1' is not in the input" in failed(form_llama, other, output, toy_server)
    fresh = tmp_path / "fresh"
    bare = helpers.write_jsonl(tmp_path / "bare.json", [ROWS[0], ROWS[1] | {"gold_docids": []}])
    assert f"{bare}: c1_2 has no gold passage" in failed(form_llama, bare, fresh, toy_server)
    unknown = helpers.write_jsonl(tmp_path / "unknown.json", [ROWS[0] | {"gold_docids": ["atlantis"]}])
    assert "atlantis" in failed(form_llama, unknown, fresh, toy_server)
    assert "no retriever: set retriever.url (or RETRIEVER_URL)" in failed(form_llama, conversations, fresh, "")
    assert "max_tokens = 20 is below" in failed(form_llama, conversations, fresh, toy_server, "--max_tokens", 20)
    assert not (fresh / "samples.jsonl").exists() or (fresh / "samples.jsonl").stat().st_size == 0
