"""Conversations on standard input, rewrites on standard output, a JSON object a line: the process behind a playground's rewriter.

``echo '{"context": ["who wrote Hamlet?", "Shakespeare"], "question": "and his wife?"}' | python -m convsearch.converse --model_name_or_path MODEL``
answers ``{"rewrite": ..., "thinking": ..., "output": ..., "error": ..., "seconds": ...}``, or ``{"refused": a sentence}``. It ends with its input.
With ``--endpoint`` an OpenAI-compatible server writes; its key is taken from the environment variable OPENAI_API_KEY and from nowhere else.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from convsearch.cli import Unavailable
from convsearch.cli import run as run_main
from convsearch.prompts import STYLES, PromptStyle
from convsearch.types import Conversation, FinishReason

Generate = Callable[
    [Conversation, PromptStyle, int], tuple[str, FinishReason]
]  # (conversation, prompt style, seed) -> output
KEY = "OPENAI_API_KEY"
TIMEOUT_S = 300


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convsearch.converse", description="JSON lines in, rewrites out.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_name_or_path", help="model folder or hub name")
    source.add_argument(
        "--endpoint",
        metavar="URL[#MODEL]",
        help="http://HOST/v1 of an OpenAI-compatible server; its first model by default",
    )
    parser.add_argument("--prompt_style", default="paper", choices=STYLES, help="where a line has no 'style' (paper)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    parser.add_argument("--max_tokens", type=int, default=512, help="tokens of an output at most (512)")
    return parser


def by_model(args: argparse.Namespace) -> Generate:
    """Loads the model; torch is imported here."""
    from convsearch.generation.rewriter import Rewriter
    from convsearch.sampling.hf import SamplingConfig

    rewriter = Rewriter(
        args.model_name_or_path, SamplingConfig(args.temperature, 1.0, 0, args.max_tokens, 1), style=args.prompt_style
    )

    def generate(conversation: Conversation, style: PromptStyle, seed: int) -> tuple[str, FinishReason]:
        rewriter.style = style
        completion = next(rewriter.slices([conversation], 1, seed, 1))[1][0]
        return completion.text, completion.finish_reason

    return generate


def by_endpoint(args: argparse.Namespace) -> Generate:
    """Asks ``/chat/completions`` below the address."""
    import httpx

    from convsearch.prompts import render

    url, _, model = args.endpoint.partition("#")
    key = os.environ.get(KEY)
    client = httpx.Client(headers={"authorization": f"Bearer {key}"} if key else {}, timeout=TIMEOUT_S)

    def ask(path: str, body: dict[str, Any] | None) -> Any:
        address = f"{url.rstrip('/')}/{path}"
        try:
            answer = client.get(address) if body is None else client.post(address, json=body)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200].replace(key, "***") if key else error.response.text[:200]
            raise Unavailable(f"{address} answered {error.response.status_code}: {said}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable(
                f"{address} did not answer ({error}): is it an OpenAI-compatible server, and does it run?"
            ) from error

    def generate(conversation: Conversation, style: PromptStyle, seed: int) -> tuple[str, FinishReason]:
        nonlocal model
        try:
            model = model or ask("models", None)["data"][0]["id"]
            body = {
                "model": model,
                "messages": render(conversation, style),
                "temperature": args.temperature,
                "max_tokens": args.max_tokens,
                "seed": seed,
            }
            choice = ask("chat/completions", body)["choices"][0]
            return str(choice["message"]["content"] or ""), "length" if choice.get(
                "finish_reason"
            ) == "length" else "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise Unavailable(f"{url} answers in another form than OpenAI's: {error!r} is missing") from error

    return generate


def answer(line: str, generate: Generate, default_style: PromptStyle) -> dict[str, Any]:
    """The output line for an input line; what is wrong with it, or with the endpoint, is an answer too."""
    from convsearch.parsing import parse_rewrite, thinking

    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("a line must be a JSON object with 'question' and 'context'")
        conversation = Conversation.from_record({"qid": "playground", **record})
        style, seed = record.get("style") or default_style, record.get("seed", 1)
        if style not in STYLES or not isinstance(seed, int):
            raise ValueError(
                f"'style' must be one of {', '.join(STYLES)} and 'seed' a whole number, got {style!r} and {seed!r}"
            )
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


def main() -> None:
    args = arguments().parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    generate = by_model(args) if args.endpoint is None else by_endpoint(args)
    for line in sys.stdin:
        if line.strip():
            print(json.dumps(answer(line, generate, args.prompt_style)), file=answers, flush=True)


if __name__ == "__main__":
    run_main(main)
