"""Policy updates and log-prob passes, relative to a matrix product: ``python -m benchmarks.policy_update``.

A random model of Qwen2.5-3B's shape, trees of random tokens, packed without padding, bfloat16, gradient checkpointing:
the work of one GPU of the canonical run. FLOPs are those that the result needs (a recomputed activation and a padded
position count for nothing); their rate is compared with a large bfloat16 matrix product on the same device, measured
first. ``--unshared`` gives every sample its own copy of the prompt. The last line is ``mfu=… logprob_mfu=…
tokens_per_s=… sample_tokens_per_s=… peak_gib=… ceiling_tflops=…``: tokens as computed, and as they would be without
sharing.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks import alternate
from convsearch.algorithms.loss import grpo_loss
from convsearch.cli import command_parser, run
from convsearch.config import load_grpo_config
from convsearch.model.attention import NAME
from convsearch.model.batch import Branch, MicroBatch, Tree, pack, unshared
from convsearch.model.loading import pick_device
from convsearch.policy.policy import LocalPolicy

_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
)  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_NAMES, sizes, strict=True)) | {"tie_word_embeddings": True}
    for name, sizes in {
        "qwen2.5-3b": (151936, 2048, 11008, 36, 16, 2),
        "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
        "tiny": (100, 32, 64, 2, 4, 2),
    }.items()
}


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.policy_update", __doc__)
    add = parser.add_argument
    add("--shape", choices=list(SHAPES), default="qwen2.5-3b", help="whose shape the random model has")
    add("--device", default="auto", help="auto: cuda if there is one")
    add("--prompts", type=int, default=32, help="prompts per update")
    add("--samples", type=int, default=8, help="samples per prompt")
    add("--prompt_tokens", type=int, default=700, help="mean length of a prompt (half to one and a half of it)")
    add("--response_tokens", type=int, default=160, help="mean length of a sample (likewise)")
    add("--max_tokens", type=int, default=16384, help="positions per forward-backward pass")
    add("--steps", type=int, default=3, help="measured updates, after one that warms up")
    add("--unshared", action="store_true", help="a copy of the prompt for every sample")
    add("--padded", action="store_true", help="one padded row per tree instead of packed rows")
    kernels = ["auto", "sdpa", "flex", "flash"]
    add("--kernel", choices=kernels, default="auto", help="attention; auto: see convsearch.model.attention")
    add("--fp32", action="store_true", help="arithmetic in float32")
    add("--no_checkpointing", action="store_true", help="keep the activations instead of computing them again")
    add("--param_offload", action="store_true", help="weights, gradients and Adam's state in CPU memory")
    add("--optimizer_offload", action="store_true", help="Adam's state in CPU memory between updates")
    add("--side", type=int, default=8192, help="side of the matrices whose product is the ceiling")
    return parser


def draw_trees(args: argparse.Namespace, vocabulary: int) -> list[Tree]:
    """Random prompts and samples, the same ones for the same arguments."""
    draw = random.Random(1)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(draw.randint(max(1, mean // 2), mean + mean // 2)))

    def branch() -> Branch:
        tokens = ids(args.response_tokens)
        weight = 1 / (args.prompts * args.samples * len(tokens))
        return Branch(tokens, draw.choice([-1.0, 1.0]), weight, (-10.0,) * len(tokens))

    trees = [Tree(ids(args.prompt_tokens), tuple(branch() for _ in range(args.samples))) for _ in range(args.prompts)]
    return unshared(trees) if args.unshared else trees


def forward_flops(shape: dict[str, Any], trees: Sequence[Tree]) -> float:
    """Multiplications and additions that the samples' log-probs need: layers, pairs of positions, response logits."""
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


def ceiling(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product, the median of ten."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / median_s(device, lambda: left @ right, 10)


def median_s(device: torch.device, call: Callable[[], object], times: int) -> float:
    """The median seconds of some calls, after one that warms up; on a GPU until its work is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return statistics.median(alternate({"": call}, times, wait)[0][""])


def build(args: argparse.Namespace, device: torch.device) -> LocalPolicy:
    """The policy with random weights, made on the device."""
    torch.manual_seed(1)
    shape = Qwen2Config(**SHAPES[args.shape])
    with torch.device("cpu" if args.param_offload else device):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=NAME, dtype=torch.float32)
    offload = {"param_offload": args.param_offload, "optimizer_offload": args.optimizer_offload}
    checkpointing = not args.no_checkpointing
    policy = LocalPolicy(model, device, gradient_checkpointing=checkpointing, bf16=not args.fp32, **offload)
    policy.module.kernel = args.kernel
    return policy


def measure(args: argparse.Namespace) -> str:
    """Runs both passes, prints a table and returns the last line."""
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

    calls = {"log-probs": lambda: [policy.logprobs(micro) for micro in micros], "update": update}
    seconds = {name: median_s(device, call, args.steps) for name, call in calls.items()}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    positions, needed = sum(map(len, trees)), forward_flops(SHAPES[args.shape], trees)
    alone = sum(len(tree.prompt_ids) + len(branch.token_ids) for tree in trees for branch in tree.branches)
    computed = sum(micro.num_tokens for micro in micros)
    tokens = f"{positions} tokens ({alone} without sharing)"
    print(f"{len(trees)} trees, {tokens}, {computed} positions in {len(micros)} passes")
    mfu = {"log-probs": needed / seconds["log-probs"] / top, "update": 3 * needed / seconds["update"] / top}
    for kind, taken in seconds.items():
        rate = f"{positions / taken:>10.0f} tokens/s{alone / taken:>10.0f} sample tokens/s"
        print(f"{kind:<10}{taken:>9.3f} s{rate}{100 * mfu[kind]:>7.1f}% of the ceiling")
    rates = f"tokens_per_s={positions / seconds['update']:.0f} sample_tokens_per_s={alone / seconds['update']:.0f}"
    shares = f"mfu={mfu['update']:.3f} logprob_mfu={mfu['log-probs']:.3f}"
    return f"{shares} {rates} peak_gib={peak:.1f} ceiling_tflops={top / 1e12:.2f}"


def main() -> None:
    print(measure(build_parser().parse_args()))


if __name__ == "__main__":
    run(main)
