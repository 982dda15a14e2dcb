"""The plan of an experiment before it starts: ``bash scripts/paper/topiocqa_qwen_ance.sh --dry-run`` pipes its commands in here.

Every command is held against its own parser (or composed, for the two trainers), so that a misspelt flag is found now and not after a day. Then what it
will take: GPUs, memory a GPU, steps, tokens a step, disk. Estimates come from the configuration alone: no torch, no data, no weights.
"""

import argparse
import importlib
import io
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field

from convsearch.cli import run
from convsearch.config import GrpoConfig, SftConfig, load_grpo_config, load_sft_config
from convsearch.model.shapes import Shape, shape_of

GIB = 2**30
MEAN_RESPONSE_TOKENS = 386  # of the paper's samples (its section on efficiency)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the published data."""

    train: int  # turns
    test: int
    passages: int
    kept: dict[str, int]  # rows that the two models' warm-up kept


SIZES = {
    "topiocqa": Sizes(45_450, 2_514, 25_700_592, {"qwen": 5_892, "llama": 6_034}),
    "qrecc": Sizes(29_596, 8_209, 54_573_064, {"qwen": 7_759, "llama": 6_623}),
}
DENSE_NUMBERS = 768  # of an ANCE vector


@dataclass(slots=True)
class Stage:
    """One stage: its commands, checked, and lines of figures."""

    name: str
    commands: list[list[str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


def read_stages(lines: Iterable[str]) -> list[Stage]:
    """``stage<TAB>command`` lines -> stages in their order. Raises ValueError for a line of another form."""
    stages: dict[str, Stage] = {}
    for line in lines:
        name, tab, command = line.rstrip("\n").partition("\t")
        if not tab:
            raise ValueError(f"{line!r} is not a line of a plan (stage, tab, command)")
        stages.setdefault(name, Stage(name)).commands.append(shlex.split(command))
    return list(stages.values())


def module_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """The module and the arguments of ``python -m MODULE ...``, with torchrun before it or not. Raises ValueError for anything else."""
    parts = [
        i for i, word in enumerate(command) if word == "-m" and command[i + 1 : i + 2] != ["torch.distributed.run"]
    ]
    if not parts or len(command) < parts[0] + 2:
        raise ValueError(f"{shlex.join(command)} runs no module of this project")
    return command[parts[0] + 1], list(command[parts[0] + 2 :])


def check(command: Sequence[str]) -> SftConfig | GrpoConfig | None:
    """Composes a trainer's configuration, or parses the arguments as the command itself would.

    Raises:
        ValueError: it would be refused; says how.
    """
    module, arguments = module_of(command)
    if module == "convsearch.sft":
        return load_sft_config(arguments)
    if module == "convsearch.grpo":
        return load_grpo_config(arguments)
    source = importlib.import_module("retriever_server.server" if module == "retriever_server" else module)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            if hasattr(source, "parse_args"):
                source.parse_args(arguments)
            else:
                _parser_of(source).parse_args(arguments)
    except SystemExit:
        raise ValueError(f"{module}: {said.getvalue().strip().splitlines()[-1]}") from None
    return None


def _parser_of(source: object) -> argparse.ArgumentParser:
    for name in ("parser", "build_parser", "arguments"):
        if callable(make := getattr(source, name, None)):
            parser = make()
            assert isinstance(parser, argparse.ArgumentParser)
            return parser
    raise ValueError(f"{source} has no parser to hold its arguments against")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, by what they are for. Weights, gradients and Adam's two moments are float32, in equal shares of the ranks."""

    state: float  # weights and moments, all the time
    gradients: float
    gathered: float  # the unit that is being computed and the next one, whole, in bfloat16
    activations: float
    logits: float
    reference: float
    sampler: float = 0.0

    @property
    def updating(self) -> float:
        """While the sampler sleeps."""
        return self.state + self.gradients + self.gathered + self.activations + self.logits + self.reference

    @property
    def sampling(self) -> float:
        return self.state + self.reference + self.sampler

    @property
    def peak(self) -> float:
        return max(self.updating, self.sampling)


def memory_of(shape: Shape, ranks: int, tokens: int, *, recompute: bool, chunk: int = 1024) -> Memory:
    """One rank's share in training ``tokens`` positions a pass; ``chunk`` scored tokens have logits at a time, in float32, with two copies."""
    kept = shape.layers * shape.hidden * 2.0  # a layer's input, in bfloat16
    one_layer = (8 * shape.hidden + 2 * shape.heads * shape.head_size + 4 * shape.inner) * 2.0
    return Memory(
        state=12.0 * shape.parameters / ranks,
        gradients=4.0 * shape.parameters / ranks,
        gathered=0.0 if ranks == 1 else 2.0 * (shape.embedding + 2 * shape.layer),
        activations=tokens * (kept + one_layer if recompute else shape.layers * one_layer),
        logits=3 * 4.0 * chunk * shape.vocabulary,
        reference=0.0,
    )


def grpo_memory(cfg: GrpoConfig, shape: Shape, gpu_bytes: float) -> Memory:
    """Of the RL stage with a colocated sampler, which frees its share while the policy trains."""
    from dataclasses import replace

    actor, ranks = cfg.actor_rollout_ref.actor, cfg.trainer.world_size
    memory = memory_of(
        shape, ranks, cfg.max_tokens_per_pass, recompute=cfg.actor_rollout_ref.model.enable_gradient_checkpointing
    )
    weights, moments = 4.0 * shape.parameters / ranks, 8.0 * shape.parameters / ranks
    resident = (0.0 if actor.fsdp_config.param_offload else weights) + (
        0.0 if actor.fsdp_config.optimizer_offload else moments
    )
    reference = 0.0 if cfg.actor_rollout_ref.ref.fsdp_config.param_offload or not actor.use_kl_loss else weights
    sampler = (
        gpu_bytes * cfg.actor_rollout_ref.rollout.gpu_memory_utilization
        if cfg.actor_rollout_ref.rollout.name == "vllm"
        else 0.0
    )
    return replace(memory, state=resident, reference=reference, sampler=sampler)


def sft_figures(cfg: SftConfig, shape: Shape | None, rows: int | None, ranks: int, gpu_gib: float) -> Iterator[str]:
    cfg.check_world(ranks)
    size = cfg.data.train_batch_size
    steps = cfg.trainer.total_training_steps or (rows // size * cfg.trainer.total_epochs if rows else None)
    yield f"{steps or '?'} steps of {size} rows on {ranks} GPUs" + (
        f" ({rows:,} rows kept in the paper)" if rows else ""
    )
    yield f"at most {size * cfg.data.max_length:,} tokens a step"
    if shape:
        tokens = cfg.data.micro_batch_size_per_gpu * cfg.data.max_length
        memory = memory_of(shape, ranks, tokens, recompute=cfg.model.enable_gradient_checkpointing)
        yield from _memory_lines(memory, gpu_gib)
        yield from _checkpoint_lines(shape, cfg.trainer.keep_checkpoints, cfg.trainer.best_metric is not None)


def grpo_figures(cfg: GrpoConfig, shape: Shape | None, rows: int | None, gpu_gib: float) -> Iterator[str]:
    size, n = cfg.data.train_batch_size, cfg.actor_rollout_ref.rollout.n
    steps = cfg.trainer.total_training_steps or (rows // size * cfg.trainer.total_epochs if rows else None)
    world = f"{cfg.trainer.world_size} GPUs ({cfg.trainer.nnodes} nodes of {cfg.trainer.n_gpus_per_node})"
    yield f"{steps or '?'} steps of {size} prompts x {n} samples on {world}" + (
        f", {rows:,} rows less the held-out ones" if rows else ""
    )
    most, likely = size * n * cfg.data.max_response_length, size * n * MEAN_RESPONSE_TOKENS
    prompts = size * cfg.data.max_prompt_length
    yield f"tokens a step: at most {most:,} sampled (about {min(most, likely):,} at the paper's mean length), at most {prompts:,} of prompts"
    if shape:
        yield from _memory_lines(grpo_memory(cfg, shape, gpu_gib * GIB), gpu_gib)
        yield from _checkpoint_lines(shape, cfg.trainer.keep_checkpoints, cfg.trainer.best_metric is not None)
    if steps:
        yield f"disk: about {steps * (10 * likely + 2 * n * prompts) / GIB:.1f} GiB of rollouts at most, before compression"


def _memory_lines(memory: Memory, gpu_gib: float) -> Iterator[str]:
    parts = {
        "weights and Adam": memory.state,
        "gradients": memory.gradients,
        "gathered layers": memory.gathered,
        "activations": memory.activations,
        "logits": memory.logits,
        "reference": memory.reference,
    }
    shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value)
    yield f"memory a GPU, training: {memory.updating / GIB:.1f} GiB ({shown})"
    if memory.sampler:
        yield f"memory a GPU, sampling: {memory.sampling / GIB:.1f} GiB (sampler {memory.sampler / GIB:.1f}, weights and Adam {memory.state / GIB:.1f})"
    if memory.peak > gpu_gib * GIB:
        yield (
            f"WARNING: {memory.peak / GIB:.1f} GiB is above the GPU's {gpu_gib:g}: lower the micro-batch or gpu_memory_utilization, "
            "or offload (actor_rollout_ref.actor.fsdp_config)"
        )


def _checkpoint_lines(shape: Shape, keep: int, best: bool) -> Iterator[str]:
    one, kept = 12.0 * shape.parameters / GIB, keep + 1 + best
    yield f"disk: {one:.1f} GiB a checkpoint, {kept} at a time with the one being written; {4.0 * shape.parameters / GIB:.1f} GiB for model/"


def index_figures(arguments: Sequence[str], passages: int) -> Iterator[str]:
    if "dense" in arguments:
        vectors, codes = 4.0 * passages * DENSE_NUMBERS / GIB, 1.0 * passages * DENSE_NUMBERS / GIB
        yield f"{passages:,} passages; disk: {vectors:.1f} GiB of vectors in float32, {codes:.1f} of codes"
    else:
        yield f"{passages:,} passages; disk: 6 bytes a posting and the texts (docs/serve.md)"


def describe(stages: Sequence[Stage], gpus: int, nodes: int, gpu_gib: float, name: str = "") -> None:
    """Checks every command and fills in the stages' figures. Raises ValueError for the first that would be refused."""
    sizes = next((SIZES[known] for known in SIZES if known in name), None)
    kept = next((sizes.kept[known] for known in sizes.kept if known in name), None) if sizes else None
    shape = _base_shape(name)
    for stage in stages:
        for number, command in enumerate(stage.commands):
            try:
                cfg = check(command)
            except ValueError as error:
                raise ValueError(f"stage {stage.name}: {error}") from None
            module, arguments = module_of(command)
            if isinstance(cfg, SftConfig):
                shape = shape_of(cfg.model.partial_pretrain)
                stage.figures += sft_figures(cfg, shape, kept, gpus, gpu_gib)
            elif isinstance(cfg, GrpoConfig):
                shape = shape_of(cfg.actor_rollout_ref.model.path) or shape
                stage.figures += grpo_figures(cfg, shape, sizes.train if sizes else None, gpu_gib)
                if cfg.trainer.nnodes != nodes:
                    raise ValueError(f"stage {stage.name}: trainer.nnodes={cfg.trainer.nnodes} on {nodes} nodes")
            elif module == "retriever_server.index" and sizes:
                stage.figures += index_figures(arguments, sizes.passages)
            elif module in ("convsearch.distill", "convsearch.infer") and sizes and number + 1 == len(stage.commands):
                questions = sizes.train if module == "convsearch.distill" else sizes.test
                weights = (
                    f"; {4.0 * shape.parameters / GIB:.1f} GiB of weights a GPU, the cache on top" if shape else ""
                )
                stage.figures.append(
                    f"{questions:,} questions, one sample each, on {gpus} GPUs (one process a GPU){weights}"
                )


def _base_shape(name: str) -> Shape | None:
    """Of the base model of a paper's experiment, where the warm-up's model is not on disk yet."""
    if not name:
        return None
    try:
        return shape_of(load_sft_config([f"experiment={name}"]).model.partial_pretrain)
    except ValueError:
        return None


def text_of(stages: Sequence[Stage], name: str) -> str:
    lines = [f"plan of {name}" if name else "plan"]
    for stage in stages:
        lines += ["", f"== {stage.name}"]
        for module, count in _counted(module_of(command)[0] for command in stage.commands):
            lines.append(f"   python -m {module}" + (f"  ({count} processes)" if count > 1 else ""))
        lines += [f"   {figure}" for figure in stage.figures]
    commands = sum(len(stage.commands) for stage in stages)
    return "\n".join(
        [*lines, "", f"dry run: {commands} commands of {len(stages)} stages are whole; nothing was started"]
    )


def _counted(names: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return list(counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convsearch.plan", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--name", default="", help="experiment; the paper's are known by their data's sizes")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs a node")
    parser.add_argument("--nodes", type=int, default=1, help="nodes")
    parser.add_argument("--gpu_gib", type=float, default=80.0, help="memory of a GPU, in GiB")
    parser.add_argument("--all_commands", action="store_true", help="print the commands in full, too")
    args = parser.parse_args()
    stages = read_stages(sys.stdin)
    describe(stages, args.gpus, args.nodes, args.gpu_gib, args.name)
    if args.all_commands:
        print("\n".join(shlex.join(command) for stage in stages for command in stage.commands), end="\n\n")
    print(text_of(stages, args.name))


if __name__ == "__main__":
    run(main)
