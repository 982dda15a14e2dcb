"""What inference promises.

1. Every input line comes out once, in order, with its own fields; what does not parse falls back to the raw question
   and is counted.
2. A line depends on seed and query alone: not on batches, --limit, or how often the command was broken off.
3. Of n samples the texts that parse are kept; the line is that of the first of them.
4. Finished lines are kept as they are; a half-written one is made again; a file of other data is left alone.
"""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest

from convsearch import checksums
from convsearch import infer as command_line
from convsearch.generation import infer
from convsearch.generation.rewriter import build_rewriter
from convsearch.parsing import parse_rewrite, thinking
from convsearch.types import Completion

ROWS = helpers.conversation_rows(list(helpers.GOLDS))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"topic": f"Größe {number}"} for number, row in enumerate(ROWS)]
    return helpers.write_jsonl(tmp_path_factory.mktemp("infer") / "dev.json", rows)


def command(model: Path, source: Path, output: Path, *flags: object) -> list[object]:
    fixed = ["--prompt_style", "compact", "--max_tokens", 40, "--device", "cpu", "--threads", 1, "--batch_size", 16]
    return ["--model_name_or_path", model, "--input_path", source, "--output_path", output, *fixed, *flags]


def rewritten(model: Path, source: Path, output: Path, *flags: object) -> tuple[list[dict[str, Any]], str]:
    status, printed = helpers.call(command_line.main, command(model, source, output, *flags))
    assert status == 0, printed
    return helpers.read_jsonl(output), printed


def failed(model: Path, source: Path, output: Path, *flags: object) -> str:
    return helpers.one_sentence(*helpers.call(command_line.main, command(model, source, output, *flags)))


def test_every_line_comes_out_once_with_its_fields(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    inputs = helpers.read_jsonl(conversations)
    lines, printed = rewritten(form_llama, conversations, tmp_path / "out.jsonl", "--temperature", 1)
    assert [{key: line[key] for key in row} for line, row in zip(lines, inputs, strict=True)] == inputs
    for line in lines:
        parsed = parse_rewrite(line["output"])  # none of these is truncated and parses
        assert line["rewrite_error"] is not None or parsed.text == line["rewrite"]
        assert line["fallback"] is (line["rewrite_error"] is not None)
        assert line["rewrite"] == (line["question"] if line["fallback"] else parsed.text)
        assert line["reasoning_content"] == thinking(line["output"])
    errors = Counter(line["rewrite_error"] for line in lines)
    assert 0 < errors[None] < 18  # both outcomes occur
    assert f"18 rewrites, {18 - errors[None]} fell back to the raw question ({(18 - errors[None]) / 18:.1%})" in printed
    for name, count in errors.items():
        assert name is None or f"{name} {count}" in printed


def test_a_model_without_the_form_falls_back_on_every_line(
    tiny_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    lines, printed = rewritten(tiny_llama, conversations, tmp_path / "out.jsonl", "--limit", 5)
    assert [line["rewrite"] for line in lines] == [row["question"] for row in ROWS[:5]]
    assert all(line["fallback"] and line["rewrite_error"] for line in lines)
    assert "5 rewrites, 5 fell back to the raw question (100.0%)" in printed
    scaffolded, printed = rewritten(
        tiny_llama, conversations, tmp_path / "s.jsonl", "--scaffold", "--think_tokens", 6, "--rewrite_tokens", 6
    )
    assert not any(line["fallback"] for line in scaffolded)
    assert "18 rewrites, 0 fell back to the raw question\n" in printed


def test_a_line_depends_on_seed_and_query_alone(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    first, _ = rewritten(form_llama, conversations, tmp_path / "1.jsonl", "--temperature", 1, "--seed", 3)
    again, _ = rewritten(form_llama, conversations, tmp_path / "2.jsonl", "--temperature", 1, "--seed", 3)
    small, _ = rewritten(
        form_llama, conversations, tmp_path / "3.jsonl", "--temperature", 1, "--seed", 3, "--batch_size", 1
    )
    backwards = helpers.write_jsonl(tmp_path / "back.json", helpers.read_jsonl(conversations)[::-1])
    turned, _ = rewritten(form_llama, backwards, tmp_path / "4.jsonl", "--temperature", 1, "--seed", 3)
    assert first == again == small == turned[::-1]
    other, _ = rewritten(form_llama, conversations, tmp_path / "5.jsonl", "--temperature", 1, "--seed", 4)
    assert sum(left["output"] != right["output"] for left, right in zip(first, other, strict=True)) > 5
    greedy = [
        rewritten(form_llama, conversations, tmp_path / f"g{seed}.jsonl", "--temperature", 0, "--seed", seed)[0]
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]


def test_finished_lines_are_kept_and_a_half_written_one_is_made_again(
    form_llama: Path, conversations: Path, tmp_path: Path
) -> None:
    flags = ("--temperature", 1)
    whole = tmp_path / "whole.jsonl"
    rewritten(form_llama, conversations, whole, *flags)
    content = whole.read_bytes()
    lines = content.splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    half = lines[7][: lines[7].index("ö".encode()) + 1]  # ends within a character
    broken.write_bytes(b"".join(lines[:7]) + half)
    _, printed = rewritten(form_llama, conversations, broken, *flags)
    assert "7 of 18 lines are there already and are kept" in printed
    assert broken.read_bytes() == content
    marked = content.replace(b'"output": "', b'"output": "kept ', 1)
    broken.write_bytes(marked)
    error = failed(form_llama, conversations, broken, *flags)
    assert f"{broken} is damaged: its first {len(content)} bytes are not those that were written" in error
    checksums.settings_of(broken).unlink()  # changed on purpose
    _, printed = rewritten(form_llama, conversations, broken, *flags)
    assert "18 of 18 lines are there already" in printed
    assert broken.read_bytes() == marked


def test_lines_of_other_settings_are_never_continued(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rewritten(form_llama, conversations, output, "--temperature", 1, "--limit", 4)
    before = output.read_bytes()
    sentence = failed(form_llama, conversations, output, "--temperature", 0.5)
    assert f"{output} was sampled with --temperature 1.0, now it is 0.5" in sentence
    assert "--seed 1, now it is 2" in failed(form_llama, conversations, output, "--temperature", 1, "--seed", 2)
    assert output.read_bytes() == before
    lines, _ = rewritten(form_llama, conversations, output, "--temperature", 1)
    assert len(lines) == 18


def test_a_limit_is_a_prefix_that_grows(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole.jsonl", tmp_path / "grown.jsonl"
    rewritten(form_llama, conversations, whole)
    assert len(rewritten(form_llama, conversations, grown, "--limit", 4)[0]) == 4
    assert len(rewritten(form_llama, conversations, grown, "--limit", 9)[0]) == 9
    rewritten(form_llama, conversations, grown)
    assert grown.read_bytes() == whole.read_bytes()
    assert len(rewritten(form_llama, conversations, grown, "--limit", 4)[0]) == 18  # nothing is taken away


def test_the_model_name_chooses_the_prompt(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    from convsearch.types import Conversation

    for name, expected in (("ConvSearch-R1", False), ("Get_SFT", True)):
        args = command_line.parse_args(
            [str(part) for part in command(form_llama, conversations, tmp_path / "o", "--model_name", name)]
        )
        rewriter = build_rewriter(args)
        text = rewriter.tokenizer.decode(rewriter.prompt_ids(Conversation.from_record(ROWS[1])))
        assert ("Sagrada" in text) is expected
        assert text.endswith("<|im_start|>assistant\n")


def test_mistakes_are_one_sentence(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rewritten(form_llama, conversations, output, "--limit", 2)
    before = output.read_bytes()
    other = helpers.write_jsonl(tmp_path / "other.json", [row | {"qid": f"x{row['qid']}"} for row in ROWS])
    assert f"{output}:1: query 'c0_1' is not in the input; the file belongs to other data" in failed(
        form_llama, other, output
    )
    assert output.read_bytes() == before
    assert f"{conversations}:1: not a line that this command writes" in failed(form_llama, conversations, conversations)
    output.write_bytes(before + b"{damaged\n")
    assert f"{output}:3: not a line of JSON" in failed(form_llama, conversations, output)
    fresh = tmp_path / "fresh.jsonl"
    twice = helpers.write_jsonl(tmp_path / "twice.json", [*ROWS, ROWS[4]])
    assert f"{twice}:19: query 'c4_2' is in line 5 already" in failed(form_llama, twice, fresh)
    odd = helpers.write_jsonl(tmp_path / "odd.json", [ROWS[0], ROWS[1] | {"context": ["only a question"]}])
    assert f"{odd}:2: c1_2: field 'context' must be" in failed(form_llama, odd, fresh)
    nameless = helpers.write_jsonl(
        tmp_path / "nameless.json", [{key: value for key, value in ROWS[0].items() if key != "qid"}]
    )
    assert f"{nameless}:1: field 'qid'" in failed(form_llama, nameless, fresh)
    assert str(tmp_path / "none.json") in failed(form_llama, tmp_path / "none.json", fresh)
    assert "is not a model folder" in failed(tmp_path, conversations, fresh)
    assert "leaves no room for a prompt" in failed(form_llama, conversations, fresh, "--max_tokens", 2000)
    assert "temperature = -1.0" in failed(form_llama, conversations, fresh, "--temperature", -1)
    assert "each must be at least 1" in failed(form_llama, conversations, fresh, "--scaffold", "--think_tokens", 0)
    assert not fresh.exists()


def test_several_samples_keep_the_texts_that_parse(form_llama: Path, conversations: Path, tmp_path: Path) -> None:
    one, _ = rewritten(form_llama, conversations, tmp_path / "one.jsonl", "--temperature", 1)
    many, _ = rewritten(form_llama, conversations, tmp_path / "many.jsonl", "--temperature", 1, "--n", 3)
    small, _ = rewritten(
        form_llama, conversations, tmp_path / "s.jsonl", "--temperature", 1, "--n", 3, "--batch_size", 1
    )
    assert many == small
    assert not any("rewrites" in line for line in one)
    for single, line in zip(one, many, strict=True):  # the first of the samples is the single one
        assert line["rewrite"] == line["rewrites"][0]
        assert single["fallback"] or {**line, "rewrites": 0} == {**single, "rewrites": 0}
    assert sum(line["fallback"] for line in many) < sum(line["fallback"] for line in one)
    assert {len(line["rewrites"]) for line in many} > {1}
    assert "--n 1, now it is 3" in failed(
        form_llama, conversations, tmp_path / "one.jsonl", "--temperature", 1, "--n", 3
    )
    for flags, words in ((("--n", 0), "--n is 0"), (("--n", 2, "--temperature", 0), "raise --temperature above 0")):
        status, printed = helpers.call(command_line.main, command(form_llama, conversations, tmp_path / "x", *flags))
        assert status == 2
        assert words in printed


def test_the_line_of_several_samples_by_hand() -> None:
    texts = ["no tags", "<think>a</think><rewrite>one</rewrite>", "<think>b</think><rewrite>two</rewrite>"]
    completions = [Completion((), (), text, "stop") for text in texts]
    line = infer.outcome({"qid": "1", "question": "q?"}, completions)
    assert (line["rewrite"], line["rewrites"], line["reasoning_content"]) == ("one", ["one", "two"], "a")
    line = infer.outcome({"qid": "1", "question": "q?"}, [completions[0]] * 2)
    assert (line["rewrite"], line["rewrites"], line["rewrite_error"]) == ("q?", ["q?"], "no_tag")


@pytest.mark.slow
def test_kill_dash_nine_loses_nothing(form_llama: Path, tmp_path: Path) -> None:
    """Killed three times as soon as some more lines are there; the file ends as that of an undisturbed run, byte for
    byte."""
    rows = [row | {"qid": f"{row['qid']}_{copy}"} for copy in range(150) for row in ROWS]
    source = helpers.write_jsonl(tmp_path / "many.json", rows)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    rewritten(form_llama, source, whole, "--temperature", 1)
    for _ in range(3):
        before = killed.stat().st_size if killed.exists() else 0
        process = helpers.start("convsearch.infer", command(form_llama, source, killed, "--temperature", 1))
        deadline = time.monotonic() + 90
        while not (killed.exists() and killed.stat().st_size > before) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.communicate()
        assert process.stdout is not None
        process.stdout.close()
        assert before < killed.stat().st_size < whole.stat().st_size
    status, printed = helpers.finish("convsearch.infer", command(form_llama, source, killed, "--temperature", 1))
    assert status == 0, printed
    assert "lines are there already and are kept" in printed
    assert killed.read_bytes() == whole.read_bytes()
    assert len({json.loads(line)["qid"] for line in killed.read_bytes().splitlines()}) == len(rows)


def test_rqr_writes_reasoned_queries_of_topics_and_goes_on_where_it_stopped(form_llama: Path, tmp_path: Path) -> None:
    topics = helpers.write_jsonl(
        tmp_path / "topics.jsonl", [{"id": str(i), "query": f"why {i}?", "excluded_ids": ["x"]} for i in range(5)]
    )
    flags = [
        "--model_name_or_path",
        form_llama,
        "--input_path",
        topics,
        "--task",
        "rqr",
        "--max_tokens",
        12,
        "--device",
        "cpu",
        "--threads",
        1,
    ]
    for output, more in (("whole.jsonl", []), ("parts.jsonl", ["--limit", 2]), ("parts.jsonl", [])):
        status, printed = helpers.call(command_line.main, [*flags, "--output_path", tmp_path / output, *more])
        assert status == 0, printed
    lines = helpers.read_jsonl(tmp_path / "whole.jsonl")
    assert [(line["qid"], line["question"]) for line in lines] == [(str(i), f"why {i}?") for i in range(5)]
    assert all(line["rewrite"] == (line["output"].strip() or line["question"]) for line in lines)
    assert sorted(map(str, helpers.read_jsonl(tmp_path / "parts.jsonl"))) == sorted(map(str, lines))
    settings = json.loads((tmp_path / "whole.jsonl.settings.json").read_text())
    assert (
        settings | {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "prompt_style": "rqr"}
        == settings
    )


def test_rqr_in_think_mode_searches_for_the_answer_alone() -> None:
    completion = Completion((), (), "<think>so</think>\n<answer>an answer</answer>", "stop")
    line = infer.outcome({"qid": "1", "question": "q?"}, [completion], "answer")
    assert (line["rewrite"], line["reasoning_content"], line["fallback"]) == ("an answer", "so", False)
    assert infer.outcome({"qid": "1", "question": "q?"}, [completion], "rewrite")["rewrite_error"] == "no_tag"
