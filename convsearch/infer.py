"""Conversations -> rewrites.

``python -m convsearch.infer --model_name_or_path MODEL --input_path dev.json --output_path rewrites.jsonl``

Each input line gives one output line with ``rewrite`` (the text to search for), ``reasoning_content``, ``output``,
``rewrite_error`` and ``fallback``. If nothing parses, the rewrite is the raw question, counted and reported: leaving
such lines out would inflate the metrics. Run the same command again to go on: finished lines are kept. ``--n 4`` draws
four samples and adds ``rewrites``, for ``eval.bm25 --fuse rrf``. ``--task rqr`` writes reasoned queries of single
questions (BRIGHT's topics, or conversations), with RQR's prompt and sampling.
"""

import argparse
import sys

from convsearch.cli import command_parser, run
from convsearch.generation.options import MODEL_NAMES, RQR_SAMPLING, add_sampling_flags


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.infer", __doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="model folder or hub name")
    names = "ConvSearch-R1: zero-shot prompt; Get_SFT: with the worked example"
    add("--model_name", default="ConvSearch-R1", choices=MODEL_NAMES, help=names)
    add(
        "--task", default="rewrite", choices=("rewrite", "rqr"), help="rewrite conversations, or RQR's reasoned queries"
    )
    add("--think", action="store_true", help="rqr: <think> </think> <answer> </answer>; the answer is the query")
    add("--input_path", required=True, help="conversations, one JSON object per line; rqr: also BRIGHT's topics")
    add("--output_path", required=True, help="rewrites, one JSON object per line")
    add("--n", type=int, default=1, help="samples per line; above 1 a line also has 'rewrites', the texts that parse")
    add_sampling_flags(parser, max_tokens=4096)
    add("--dp_size", type=int, default=1, help="accepted, without effect: one process samples all lines")
    add("--gpus_per_dp_rank", type=int, default=1, help="accepted, without effect")
    add("--dp_master_ip", default="127.0.0.1", help="accepted, without effect")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(argv)[0].task == "rqr":
        parser.set_defaults(**RQR_SAMPLING)
    args = parser.parse_args(argv)
    if args.think and args.task != "rqr":
        parser.error("--think belongs to --task rqr: the other task always thinks")
    if args.n < 1:
        parser.error(f"--n is {args.n}; it must be at least 1")
    if args.n > 1 and args.temperature == 0:
        parser.error(f"--n {args.n} needs samples that differ: raise --temperature above 0, which is greedy")
    if args.task == "rqr":
        args.prompt_style = "rqr_think" if args.think else "rqr"
    for name in ("dp_size", "gpus_per_dp_rank", "dp_master_ip"):
        if (value := getattr(args, name)) != parser.get_default(name):
            print(f"warning: --{name} {value} is accepted, without effect", file=sys.stderr)
    return args


def main() -> None:
    args = parse_args()
    from convsearch.generation.infer import infer

    infer(args)


if __name__ == "__main__":
    run(main)
