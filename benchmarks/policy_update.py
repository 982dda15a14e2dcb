"""How fast a policy update and a log-prob pass are, against what the device's matrix product reaches: ``python -m benchmarks.policy_update``.

A random model of Qwen2.5-3B's shape, trees of random tokens, packed without padding, bfloat16, gradient checkpointing: what one GPU of the canonical run
computes. FLOPs are those that the result needs (a recomputed activation and a padded position count for nothing); their rate is held against a large
bfloat16 matrix product on the same device, measured first. ``--unshared`` gives every sample its own copy of the prompt. The last line is
``mfu=… logprob_mfu=… tokens_per_s=… sample_tokens_per_s=… peak_gib=… ceiling_tflops=…``: tokens as computed, and as they would be without sharing.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convsearch.cli import run

if TYPE_CHECKING:
    import torch

    from convsearch.model.batch import MicroBatch, Tree

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.policy_update",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-3b", help="whose shape the random model has")
    top.add_argument("--device", default="auto", help="auto: cuda where there is one")
    top.add_argument("--prompts", type=int, default=32, help="prompts an update")
    top.add_argument("--samples", type=int, default=8, help="samples a prompt")
    top.add_argument(
        "--prompt_tokens", type=int, default=700, help="mean length of a prompt (they vary by a half to either side)"
    )
    top.add_argument("--response_tokens", type=int, default=160, help="mean length of a sample (likewise)")
    top.add_argument("--max_tokens", type=int, default=16384, help="positions a forward-backward pass")
    top.add_argument("--steps", type=int, default=3, help="measured updates, after one that warms up")
    top.add_argument("--unshared", action="store_true", help="a copy of the prompt for every sample")
    top.add_argument("--padded", action="store_true", help="a row a tree, padded, instead of packed rows")
    top.add_argument(
        "--kernel",
        choices=["auto", "sdpa", "flex", "flash"],
        default="auto",
        help="attention; auto: see convsearch.model.attention",
    )
    top.add_argument("--fp32", action="store_true", help="arithmetic in float32")
    top.add_argument(
        "--no_checkpointing", action="store_true", help="keep the activations instead of computing them again"
    )
    top.add_argument("--param_offload", action="store_true", help="weights, gradients and Adam's state in CPU memory")
    top.add_argument("--optimizer_offload", action="store_true", help="Adam's state in CPU memory between updates")
    top.add_argument("--side", type=int, default=8192, help="side of the matrices whose product is the ceiling")
    return top


def draw_trees(args: argparse.Namespace, vocabulary: int) -> list["Tree"]:
    """Random prompts and samples, the same ones for the same arguments."""
    from convsearch.model.batch import Branch, Tree, unshared

    draw = random.Random(1)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(draw.randint(max(1, mean // 2), mean + mean // 2)))

    def branch() -> Branch:
        tokens = ids(args.response_tokens)
        return Branch(
            tokens, draw.choice([-1.0, 1.0]), 1 / (args.prompts * args.samples * len(tokens)), (-10.0,) * len(tokens)
        )

    trees = [Tree(ids(args.prompt_tokens), tuple(branch() for _ in range(args.samples))) for _ in range(args.prompts)]
    return unshared(trees) if args.unshared else trees


def forward_flops(shape: dict[str, Any], trees: Sequence["Tree"]) -> float:
    """Multiplications and additions that the log-probs of the samples need: layers, visible pairs of positions, logits of response tokens."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_size = hidden // heads * shape["num_key_value_heads"]
    weights = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * shape["intermediate_size"]
    positions = sum(map(len, trees))
    responses = sum(len(branch.token_ids) for tree in trees for branch in tree.branches)
    pairs = 0
    for tree in trees:
        prompt = len(tree.prompt_ids)
        pairs += prompt * (prompt + 1) // 2
        pairs += sum(len(b.token_ids) * prompt + len(b.token_ids) * (len(b.token_ids) + 1) // 2 for b in tree.branches)
    layers: float = shape["num_hidden_layers"] * (2.0 * weights * positions + 4.0 * hidden * pairs)
    logits: float = 2.0 * shape["vocab_size"] * hidden * responses
    return layers + logits


def ceiling(device: "torch.device", dtype: "torch.dtype", side: int) -> float:
    """FLOP/s of a square matrix product, the median of ten."""
    import torch

    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = timed(device, lambda: left @ right, 10)
    rate: float = 2.0 * side**3 / statistics.median(seconds)
    return rate


def timed(device: "torch.device", call: Callable[[], object], times: int) -> list[float]:
    """Seconds of each call, after one that warms up; on a GPU until its work is done."""
    import torch

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for number in range(times + 1):
        start = finished()
        call()
        if number:
            seconds.append(finished() - start)
    return seconds


def build(args: argparse.Namespace, device: "torch.device") -> Any:
    """The policy under its random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from convsearch.model.attention import NAME
    from convsearch.policy.policy import LocalPolicy

    torch.manual_seed(1)
    with torch.device("cpu" if args.param_offload else device):
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(**SHAPES[args.shape]), attn_implementation=NAME, dtype=torch.float32
        )
    policy = LocalPolicy(
        model,
        device,
        gradient_checkpointing=not args.no_checkpointing,
        bf16=not args.fp32,
        param_offload=args.param_offload,
        optimizer_offload=args.optimizer_offload,
    )
    policy.module.kernel = args.kernel
    return policy


def measure(args: argparse.Namespace) -> str:
    """Runs both passes, prints a table and returns the last line."""
    import torch

    from convsearch.algorithms.loss import grpo_loss
    from convsearch.config import load_grpo_config
    from convsearch.model.batch import pack
    from convsearch.model.loading import pick_device

    device = pick_device(args.device)
    trees = draw_trees(args, SHAPES[args.shape]["vocab_size"])
    micros: list[MicroBatch] = list(pack(trees, args.max_tokens, remove_padding=not args.padded))
    top = ceiling(device, torch.float32 if args.fp32 else torch.bfloat16, args.side)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}: matrix product of {args.side} x {args.side}: {top / 1e12:.2f} TFLOP/s")
    policy = build(args, device)
    cfg = load_grpo_config(["algorithm=grpo", "data.train_files=none", "actor_rollout_ref.model.path=none"])
    loss = grpo_loss(cfg.actor_rollout_ref.actor, cfg.algorithm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def update() -> None:
        for micro in micros:
            policy.forward_backward(micro, loss)
        assert policy.optim_step(1e-6)["skipped"] == 0

    seconds = {
        "log-probs": statistics.median(timed(device, lambda: [policy.logprobs(micro) for micro in micros], args.steps)),
        "update": statistics.median(timed(device, update, args.steps)),
    }
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    positions, needed = sum(map(len, trees)), forward_flops(SHAPES[args.shape], trees)
    alone = sum(len(tree.prompt_ids) + len(branch.token_ids) for tree in trees for branch in tree.branches)
    computed = sum(micro.num_tokens for micro in micros)
    print(
        f"{len(trees)} trees, {positions} tokens ({alone} without sharing), {computed} positions in {len(micros)} passes"
    )
    mfu = {"log-probs": needed / seconds["log-probs"] / top, "update": 3 * needed / seconds["update"] / top}
    for kind, taken in seconds.items():
        rate = f"{positions / taken:>10.0f} tokens/s{alone / taken:>10.0f} sample tokens/s"
        print(f"{kind:<10}{taken:>9.3f} s{rate}{100 * mfu[kind]:>7.1f}% of the ceiling")
    rates = f"tokens_per_s={positions / seconds['update']:.0f} sample_tokens_per_s={alone / seconds['update']:.0f}"
    return f"mfu={mfu['update']:.3f} logprob_mfu={mfu['log-probs']:.3f} {rates} peak_gib={peak:.1f} ceiling_tflops={top / 1e12:.2f}"


def main() -> None:
    print(measure(parser().parse_args()))


if __name__ == "__main__":
    run(main)
