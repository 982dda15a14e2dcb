"""StackExchange questions with their answers as positives -> RQR's training rows (arXiv 2506.11603, section 4.1).

The positives are the accepted answers (V2), or a model's (V1):

    python -m data_preprocess.stackexchange --input stack-exchange-preferences/data --output data/stackexchange
    python -m data_preprocess.stackexchange ... --answers model --endpoint http://127.0.0.1:8001/v1 --model NAME

The input is one of: a folder of parquet shards of HuggingFaceH4/stack-exchange-preferences (streamed), RQR's own JSON
{question: answer or answers}, the parquet that its build_dataset.py makes of it, or JSON lines of {query, gold_answer}.
Questions with ".png", over 16,000 characters, or without an answer are dropped and counted. Writes train and validation
(conversations of one turn, qrels, parquet with extra_info.positives), and collection.jsonl of all positives, for rank
rewards.
"""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import DEFAULT_SEED, count, data_parser

SITES = ("stackoverflow", "biology", "chemistry", "codereview", "cs", "earthscience", "economics", "math", "robotics")


def build_parser() -> argparse.ArgumentParser:
    parser = data_parser("stackexchange", __doc__)
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="PLACE", help="folder, or files of a form above")
    add("--answers", choices=("accepted", "model"), default="accepted", help="whose answers are the positives")
    add("--endpoint", metavar="URL", help="OpenAI-compatible, ending in /v1; the key is $OPENAI_API_KEY")
    add("--model", help="the model that answers")
    add("--max-tokens", type=count, default=8192, metavar="N", help="of an answer")
    add("--parallel", type=count, default=8, metavar="N", help="requests at a time")
    add("--sites", nargs="+", default=[*SITES], metavar="SITE", help="first words of their addresses")
    add("--max-per-site", type=count, default=1200, metavar="N", help="at most N questions per site; 0: all")
    add("--max-chars", type=count, default=16_000, metavar="N", help="at most N characters per question")
    add("--validation-questions", type=count, default=64, metavar="N", help="questions held out; 0: none")
    add("--think", action="store_true", help="prompt for <think>..</think> <answer>..</answer> (form=answer)")
    add("--seed", type=int, default=DEFAULT_SEED, help="seed of sample and split")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if (arguments.answers == "model") != (arguments.endpoint is not None and arguments.model is not None):
        raise ValueError("--answers model needs --endpoint and --model, and --answers accepted takes neither")
    from data_preprocess.stackexchange_rows import convert

    convert(arguments)


if __name__ == "__main__":
    cli.run(main)
