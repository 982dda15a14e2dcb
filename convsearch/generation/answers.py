"""The process behind a playground's rewriter: a line of JSON in, a line of JSON out."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import httpx

from convsearch.cli import Unavailable
from convsearch.parsing import parse_rewrite, thinking
from convsearch.prompts import STYLES, PromptStyle, render
from convsearch.types import Conversation, FinishReason

Generate = Callable[[Conversation, PromptStyle, int], tuple[str, FinishReason]]  # (conversation, style, seed) -> output
KEY = "OPENAI_API_KEY"
TIMEOUT_S = 300


def by_endpoint(endpoint: str, temperature: float, max_tokens: int) -> Generate:
    """Asks an OpenAI-compatible server. ``endpoint``: URL or URL#MODEL; default: its first model."""
    url, _, model = endpoint.partition("#")
    key = os.environ.get(KEY)
    client = httpx.Client(headers={"authorization": f"Bearer {key}"} if key else {}, timeout=TIMEOUT_S)

    def ask(path: str, body: dict[str, Any] | None) -> Any:
        address = f"{url.rstrip('/')}/{path}"
        try:
            response = client.get(address) if body is None else client.post(address, json=body)
            response.raise_for_status()
            return response.json()
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200].replace(key, "***") if key else error.response.text[:200]
            raise Unavailable(f"{address} answered {error.response.status_code}: {said}") from error
        except (httpx.HTTPError, ValueError) as error:
            remedy = "is it an OpenAI-compatible server, and does it run?"
            raise Unavailable(f"{address} did not answer ({error}): {remedy}") from error

    def generate(conversation: Conversation, style: PromptStyle, seed: int) -> tuple[str, FinishReason]:
        nonlocal model
        try:
            model = model or ask("models", None)["data"][0]["id"]
            options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
            body = {"model": model, "messages": render(conversation, style), **options}
            choice = ask("chat/completions", body)["choices"][0]
            finish: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
            return str(choice["message"]["content"] or ""), finish
        except (KeyError, IndexError, TypeError) as error:
            raise Unavailable(f"{url} does not answer in OpenAI's form: {error!r} is missing") from error

    return generate


def answer(line: str, generate: Generate, default_style: PromptStyle) -> dict[str, Any]:
    """The output line of an input line. A mistake in it, or an endpoint that fails, is an answer, too."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("a line must be a JSON object with 'question' and 'context'")
        conversation = Conversation.from_record({"qid": "playground", **record})
        style, seed = record.get("style") or default_style, record.get("seed", 1)
        if style not in STYLES or not isinstance(seed, int):
            choices = f"'style' must be one of {', '.join(STYLES)} and 'seed' a whole number"
            raise ValueError(f"{choices}, got {style!r} and {seed!r}")
        start = time.perf_counter()
        output, finish = generate(conversation, style, seed)
    except (ValueError, Unavailable) as error:
        return {"refused": str(error)}
    rewrite = parse_rewrite(output, finish)
    return {
        "rewrite": rewrite.text,
        "thinking": thinking(output),
        "output": output,
        "error": rewrite.error,
        "seconds": round(time.perf_counter() - start, 3),
    }
