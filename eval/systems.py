"""The systems of a run folder: their names, the best constant rule, and the words of questions that rewrites keep."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from convsearch.files import read_jsonl
from eval.measures import evaluate_files
from retriever_server.text.analyzer import analyze

# file stem -> the name it has in results.json, in the order of the table; other runs follow under their file names
SYSTEMS = {
    "raw": "raw question",
    "previous_question": "previous question + question",
    "previous_answer": "previous answer + question",
    "previous": "previous turn + question",
    "history": "all history",
    "zero_shot": "base model, zero-shot",
    "sft": "after SFT",
    "grpo": "after GRPO",
    "grpo_sample": "after GRPO, one sample",
    "grpo_fused": "after GRPO, samples fused",
    "written": "written rewrites (oracle)",
}
# file stem -> the file of its queries, if it is not <stem>.jsonl
QUERIES = {"written": "test.json", "grpo_sample": "grpo_samples.jsonl", "grpo_fused": "grpo_samples.jsonl"}
# Those whose queries a model wrote. The report looks into the first that has both a run and its rewrites.
REWRITERS = ("grpo", "grpo_sample", "grpo_fused", "sft", "zero_shot")


def best_rule(qrels: str | Path, runs: Sequence[str | Path]) -> str:
    """File stem of the run with the highest MRR, of equal ones the first by name; for rules on validation questions.

    Raises:
        ValueError: there is no run, or a file is wrong; names file and line.
    """
    if not runs:
        raise ValueError(f"a best constant rule needs runs on the questions of {qrels}: name at least one")
    by_name = sorted(map(Path, runs), key=lambda run: run.stem)
    return max(by_name, key=lambda run: evaluate_files(run, qrels, "MRR").means()["MRR"]).stem


def rule_row(name: str) -> str:
    """The name of the table's row for the rule that ``best_rule`` chose."""
    return f"best constant rule ({name}, by validation)"


def kept_words(path: str | Path, qids: Iterable[str]) -> float:
    """Mean share of a question's content words that its rewrite keeps, over ``qids``; ``rewrites``: their mean.

    Content words are the distinct index terms (Lucene's English analyzer: stems, no stop words). A question without
    any is left out.

    Raises:
        ValueError: a line lacks a text, or the file has none of the queries with a content word.
    """
    wanted, shares = set(qids), []
    for number, record in read_jsonl(path):
        question, rewrites = record.get("question"), record.get("rewrites") or [record.get("rewrite")]
        if not all(isinstance(text, str) for text in (question, *rewrites)):
            raise ValueError(f"{path}:{number}: needs 'question' and 'rewrite' (strings): give rewrites, or none")
        words = set(analyze(str(question)))
        if words and record.get("qid") in wanted:
            shares += [np.mean([len(words & set(analyze(text))) / len(words) for text in rewrites])]
    if not shares:
        raise ValueError(f"{path} has none of the questions of the qrels: give the rewrites of the run")
    return float(np.mean(shares))
