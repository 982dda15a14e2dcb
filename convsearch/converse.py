"""The process behind a playground's rewriter: conversations on standard input, rewrites on standard output.

``echo '{"context": ["who wrote Hamlet?", "Shakespeare"], "question": "and his wife?"}' | python -m convsearch.converse
--model_name_or_path MODEL`` answers ``{"rewrite": ..., "thinking": ..., "output": ..., "error": ..., "seconds": ...}``,
or ``{"refused": a sentence}``. It ends with its input. With ``--endpoint`` an OpenAI-compatible server writes; its key
is read from the environment variable OPENAI_API_KEY and from nowhere else.
"""

import argparse
import json
import os
import sys

from convsearch.cli import command_parser, run
from convsearch.prompts import STYLES


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.converse", "JSON lines in, rewrites out.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_name_or_path", help="model folder or hub name")
    endpoint = "http://HOST/v1 of an OpenAI-compatible server; default: its first model"
    source.add_argument("--endpoint", metavar="URL[#MODEL]", help=endpoint)
    parser.add_argument("--prompt_style", default="paper", choices=STYLES, help="for lines without a 'style'")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--max_tokens", type=int, default=512, help="limit of an output, in tokens")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    from convsearch.generation.answers import answer, by_endpoint

    if args.endpoint is None:
        from convsearch.generation.rewriter import by_model  # torch

        generate = by_model(args.model_name_or_path, args.prompt_style, args.temperature, args.max_tokens)
    else:
        generate = by_endpoint(args.endpoint, args.temperature, args.max_tokens)
    for line in sys.stdin:
        if line.strip():
            print(json.dumps(answer(line, generate, args.prompt_style)), file=answers, flush=True)


if __name__ == "__main__":
    run(main)
