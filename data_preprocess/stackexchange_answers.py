"""Answers by a model behind an OpenAI-compatible endpoint, one line each; a killed run continues where it stopped."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from convsearch.cli import Unavailable
from convsearch.files import named_errors
from convsearch.prompts import render
from convsearch.types import Conversation
from data_preprocess.stackexchange_questions import Question

ATTEMPTS, FIRST_WAIT_S, TIMEOUT_S = 5, 1.0, 600.0
_THINKING = re.compile(r"\A\s*(?:<think>)?.*?</think>\s*", re.DOTALL)  # what a reasoning model puts before its answer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``Endpoint("http://127.0.0.1:8001/v1", "DeepSeek-R1", 8192)``; the key is $OPENAI_API_KEY, if it is set."""

    url: str
    model: str
    max_tokens: int

    def answer(self, question: str) -> str:
        """The model's answer without its thinking.

        Raises:
            Unavailable: no answer after some attempts, or an error that further attempts would not change.
        """
        messages = render(Conversation("q", (), question, ()), "rqr")
        body = json.dumps({"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens}).encode()
        headers = {"content-type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        problem = ""
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                return _THINKING.sub("", content or "", count=1).strip()
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code}"
                if error.code not in (408, 409, 429, 500, 502, 503, 504):
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_WAIT_S * 2**attempt)
        remedy = "correct this and run the same command again"
        raise Unavailable(f"{self.url} did not answer as {self.model} ({problem}): {remedy}")


def model_answers(
    questions: Sequence[Question], endpoint: Endpoint, path: Path, parallel: int, dropped: Counter[str]
) -> list[Question]:
    """The questions with the model's answers, which ``path`` keeps; empty answers are dropped and counted."""
    known = answered(path, endpoint.model)
    rest = [question for question in questions if question.qid not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(max(1, parallel))
    try:
        with named_errors(path), open(path, "a", encoding="utf-8") as file:
            answers = pool.map(lambda question: endpoint.answer(question.text), rest)
            bar = tqdm(answers, desc="answers", total=len(rest), unit=" questions", leave=False)
            for question, answer in zip(rest, bar, strict=True):
                record = {"qid": question.qid, "model": endpoint.model, "answer": answer}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                known[question.qid] = answer
    finally:
        pool.shutdown(cancel_futures=True)
    dropped["empty_answer"] += sum(not known[question.qid] for question in questions)
    return [replace(question, answers=(known[question.qid],)) for question in questions if known[question.qid]]


def answered(path: Path, model: str) -> dict[str, str]:
    """qid -> answer of an earlier run; cuts off a half-written last line.

    Raises:
        ValueError: the file is another model's.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found: dict[str, str] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        record = json.loads(line)
        if record["model"] != model:
            remedy = "name another --output, or move the file away"
            raise ValueError(f"{path}:{number}: an answer by {record['model']}, not {model}: {remedy}")
        found[record["qid"]] = record["answer"]
    return found
