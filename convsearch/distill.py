"""Warm-up data without human rewrites: the base model rewrites the training set, the retriever says which are good.

``python -m convsearch.distill --model_name_or_path BASE --input_path train.json --output_dir DIR
--retriever_url embedded:INDEX`` writes all samples with their gold ranks (samples.jsonl) and those that are kept
(sft.parquet). Run the same command again to go on.
"""

import argparse

from convsearch.cli import command_parser, run
from convsearch.generation.options import MODEL_NAMES, add_sampling_flags


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.distill", __doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the base model: folder or hub name")
    names = "Get_SFT: with the worked example; ConvSearch-R1: zero-shot prompt, for a model that has learned the form"
    add("--model_name", default="Get_SFT", choices=MODEL_NAMES, help=names)
    add("--input_path", required=True, help="training conversations, one JSON object per line")
    add("--output_dir", required=True, help="folder for samples.jsonl, sft.parquet and yield.json")
    add("--retriever_url", default="", help="http://host:port or embedded:INDEX_FOLDER; default: $RETRIEVER_URL")
    add("--retriever_index", default=None, help="name of the server's index; default: its first")
    add("--k", type=int, default=1, help="samples per conversation (paper: 1); 0, with --names: no model")
    add("--rank_limit", type=int, default=1, help="worst gold rank that is kept (paper: 1)")
    add("--max_kept", type=int, default=1, help="samples kept per conversation, best ranks first")
    add("--drop_first_turns", action="store_true", help="leave out questions without a history: they need no rewrite")
    add("--skip_bad", type=int, default=0, help="questions that may be left out because the index lacks a gold passage")
    copies = "leave out rewrites that only repeat the question although it has a history (not in the paper)"
    add("--drop_copies", action="store_true", help=copies)
    named = "also try the question as it is, and with topics of its history before it (English; not in the paper)"
    add("--names", action="store_true", help=named)
    shuffled = "shuffle the questions with this seed before --limit; default: file order"
    add("--shuffle_seed", type=int, default=None, help=shuffled)
    add_sampling_flags(parser, max_tokens=1024)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, least in (("k", 0 if args.names else 1), ("rank_limit", 1), ("max_kept", 1), ("skip_bad", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    return args


def main() -> None:
    args = parse_args()
    from convsearch.generation.distill import distill

    distill(args)


if __name__ == "__main__":
    run(main)
