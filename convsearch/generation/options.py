"""The flags that distillation and inference share. Light: imported before the arguments are parsed."""

import argparse

from convsearch.prompts import STYLES

# RQR's sampling at inference (arXiv 2506.11603, and the script of its evaluation).
RQR_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 500}
FORMS = {"rqr": "text", "rqr_think": "answer"}  # prompt style -> form of its outputs; all others: "rewrite"
# The reference's names of output forms. Ours has one parser, so a name only chooses the prompt.
MODEL_NAMES = ("ConvSearch-R1", "Get_SFT")


def add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How to sample, which prompt, where the model runs."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="share of the probability that is sampled from")
    add("--top_k", type=int, default=0, help="number of tokens that are sampled from; 0: all")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: tokens of prompt and output become less likely")
    add("--max_tokens", type=int, default=max_tokens, help="limit of an output, in tokens")
    add("--seed", type=int, default=1, help="seed of the samples")
    add("--limit", type=int, default=None, help="use only the first LIMIT lines")
    add("--prompt_style", default="paper", choices=STYLES, help="the published prompt, or a shorter one")
    add("--max_history_turns", type=int, default=None, help="newest turns that stay in the prompt; default: all")
    add("--batch_size", type=int, default=64, help="sequences decoded at once")
    add("--scaffold", action="store_true", help="write the tags for the model (for small models; not in the paper)")
    add("--think_tokens", type=int, default=24, help="with --scaffold: limit of the thinking, in tokens")
    add("--rewrite_tokens", type=int, default=32, help="with --scaffold: limit of the rewrite, in tokens")
    types = "type of the arithmetic; auto: bf16 if the processor multiplies it, else fp32"
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help=types)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    add("--threads", type=int, default=None, help="CPU threads; default: torch decides")
