"""The plan of an experiment before it starts: ``bash scripts/run.sh EXPERIMENT --dry-run`` pipes its commands in here.

The parser of each command reads its arguments (the trainers compose a configuration), so that a misspelt flag is found
before the run. Then the plan: GPUs, memory per GPU, steps, tokens per step, disk. Estimates come from the configuration
alone, without torch, data or weights. ``--variables`` prints what scripts/run.sh reads from the configuration.
"""

import argparse
import importlib
import io
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from hydra import compose, initialize_config_dir

from convsearch.cli import command_parser, run
from convsearch.config import GrpoConfig, SftConfig, config_dir, load_grpo_config, load_sft_config
from convsearch.config.base import TrainerSection
from convsearch.model.shapes import Shape, shape_of

GIB = 2**30
MEAN_RESPONSE_TOKENS = 386  # of the paper's samples (its section on efficiency)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the published data, in turns and passages."""

    train: int  # turns
    test: int
    passages: int
    kept: dict[str, int]  # rows that the warm-up of each model kept


SIZES = {
    "topiocqa": Sizes(45_450, 2_514, 25_700_592, {"qwen": 5_892, "llama": 6_034}),
    "qrecc": Sizes(29_596, 8_209, 54_573_064, {"qwen": 7_759, "llama": 6_623}),
}
DENSE_NUMBERS = 768  # of an ANCE vector


@dataclass(slots=True)
class Stage:
    """One stage: its commands and its lines of figures."""

    name: str
    commands: list[list[str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


def variables(overrides: Sequence[str]) -> str:
    """``names.runner`` of an experiment, the base model and the name of the index, as assignments for a shell.

    Raises:
        ValueError: the configuration of a trainer is refused, or a key of ``names.runner`` is unknown.
    """
    sft, grpo = load_sft_config(overrides), load_grpo_config(overrides)
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        known = compose("grpo").names.runner
        values = dict(compose("grpo", overrides=list(overrides)).names.runner)
    for key in values:
        if key not in known:
            raise ValueError(f"names.runner.{key} is unknown: choose one of {', '.join(known)} (configs/grpo.yaml)")
    values["base"] = sft.model.partial_pretrain
    values["index_name"] = grpo.retriever.index or f"{values['index'].split()[0]}_{Path(values['data']).name}"
    words = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
    return "\n".join(f"{key}={shlex.quote(word)}" for key, word in words.items())


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
    """Module and arguments of ``python -m MODULE ...`` or torchrun's. Raises ValueError if there is none."""
    modules = [i for i in range(1, len(command)) if command[i - 1] == "-m" and command[i] != "torch.distributed.run"]
    if not modules:
        raise ValueError(f"{shlex.join(command)} runs no module of this project")
    return command[modules[0]], list(command[modules[0] + 1 :])


def check(command: Sequence[str]) -> SftConfig | GrpoConfig | None:
    """Composes the configuration of a trainer, or parses the arguments as the command does.

    Raises:
        ValueError: the command would refuse them; says why.
    """
    module, arguments = module_of(command)
    if module == "convsearch.sft":
        return load_sft_config(arguments)
    if module == "convsearch.grpo":
        return load_grpo_config(arguments)
    source = importlib.import_module("retriever_server.server" if module == "retriever_server" else module)
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            parse = getattr(source, "parse_args", None) or source.build_parser().parse_args  # the first checks more
            parse(arguments)
    except SystemExit:
        raise ValueError(f"{module}: {errors.getvalue().strip().splitlines()[-1]}") from None
    return None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, by use. Weights, gradients and Adam's moments are float32, each rank with an equal share."""

    state: float  # weights and moments, at all times
    gradients: float
    gathered: float  # the layer that is computed and the next one, unsharded, in bfloat16
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
    """The memory of one rank that trains with ``tokens`` positions per pass. Logits: ``chunk`` tokens, 3 copies."""
    kept = shape.layers * shape.hidden * 2.0  # the input of each layer, in bfloat16
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
    """Of the RL stage with a sampler on the same GPU, which frees its memory while the policy trains."""
    roles, ranks = cfg.actor_rollout_ref, cfg.trainer.world_size
    actor, rollout, offload = roles.actor, roles.rollout, roles.actor.fsdp_config
    memory = memory_of(shape, ranks, cfg.max_tokens_per_pass, recompute=roles.model.enable_gradient_checkpointing)
    weights, moments = 4.0 * shape.parameters / ranks, 8.0 * shape.parameters / ranks
    resident = weights * (not offload.param_offload) + moments * (not offload.optimizer_offload)
    reference = weights * (actor.use_kl_loss and not roles.ref.fsdp_config.param_offload)
    sampler = gpu_bytes * rollout.gpu_memory_utilization * (rollout.name == "vllm")
    return replace(memory, state=resident, reference=reference, sampler=sampler)


def sft_figures(cfg: SftConfig, shape: Shape | None, rows: int | None, ranks: int, gpu_gib: float) -> Iterator[str]:
    cfg.check_world(ranks)
    size = cfg.data.train_batch_size
    steps = cfg.trainer.total_training_steps or (rows // size * cfg.trainer.total_epochs if rows else None)
    source = f" ({rows:,} rows kept in the paper)" if rows else ""
    yield f"{steps or '?'} steps of {size} rows on {ranks} GPUs{source}"
    yield f"at most {size * cfg.data.max_length:,} tokens per step"
    if shape:
        tokens = cfg.data.micro_batch_size_per_gpu * cfg.data.max_length
        memory = memory_of(shape, ranks, tokens, recompute=cfg.model.enable_gradient_checkpointing)
        yield from _memory_lines(memory, gpu_gib)
        yield _checkpoint_line(shape, cfg.trainer)


def grpo_figures(cfg: GrpoConfig, shape: Shape | None, rows: int | None, gpu_gib: float) -> Iterator[str]:
    size, n = cfg.data.train_batch_size, cfg.actor_rollout_ref.rollout.n
    steps = cfg.trainer.total_training_steps or (rows // size * cfg.trainer.total_epochs if rows else None)
    world = f"{cfg.trainer.world_size} GPUs ({cfg.trainer.nnodes} nodes of {cfg.trainer.n_gpus_per_node})"
    source = f", {rows:,} rows less the held-out ones" if rows else ""
    yield f"{steps or '?'} steps of {size} prompts x {n} samples on {world}{source}"
    most, likely = size * n * cfg.data.max_response_length, size * n * MEAN_RESPONSE_TOKENS
    prompts = size * cfg.data.max_prompt_length
    sampled = f"at most {most:,} sampled (about {min(most, likely):,} at the mean length of the paper)"
    yield f"tokens per step: {sampled}, at most {prompts:,} of prompts"
    if shape:
        yield from _memory_lines(grpo_memory(cfg, shape, gpu_gib * GIB), gpu_gib)
        yield _checkpoint_line(shape, cfg.trainer)
    if steps:
        rollouts = steps * (10 * likely + 2 * n * prompts) / GIB
        yield f"disk: at most about {rollouts:.1f} GiB of rollouts, before compression"


def _memory_lines(memory: Memory, gpu_gib: float) -> Iterator[str]:
    names = ("weights and Adam", "gradients", "gathered layers", "activations", "logits", "reference")
    parts = zip(names, astuple(memory), strict=False)  # the sampler comes last, and sleeps
    shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts if value)
    yield f"memory per GPU, training: {memory.updating / GIB:.1f} GiB ({shown})"
    if memory.sampler:
        shown = f"sampler {memory.sampler / GIB:.1f}, weights and Adam {memory.state / GIB:.1f}"
        yield f"memory per GPU, sampling: {memory.sampling / GIB:.1f} GiB ({shown})"
    if memory.peak > gpu_gib * GIB:
        remedy = "lower the micro-batch or gpu_memory_utilization, or offload (actor_rollout_ref.actor.fsdp_config)"
        yield f"WARNING: {memory.peak / GIB:.1f} GiB is above the {gpu_gib:g} GiB of the GPU: {remedy}"


def _checkpoint_line(shape: Shape, trainer: TrainerSection) -> str:
    most = trainer.keep_checkpoints + 1 + (trainer.best_metric is not None)
    one, model = 12.0 * shape.parameters / GIB, 4.0 * shape.parameters / GIB
    return f"disk: {one:.1f} GiB per checkpoint, at most {most} at a time; {model:.1f} GiB for model/"


def index_figure(arguments: Sequence[str], passages: int) -> str:
    disk = "6 bytes per posting, and the texts (docs/retrievers.md)"
    if "dense" in arguments:
        codes = 1.0 * passages * DENSE_NUMBERS / GIB
        disk = f"{4 * codes:.1f} GiB of vectors in float32, {codes:.1f} of codes"
    return f"{passages:,} passages; disk: {disk}"


def describe(stages: Sequence[Stage], gpus: int, nodes: int, gpu_gib: float, name: str = "") -> None:
    """Checks every command and adds figures to the stages. Raises ValueError for the first command that is refused."""
    sizes = next((SIZES[known] for known in SIZES if known in name), None)
    kept = next((sizes.kept[known] for known in sizes.kept if known in name), None) if sizes else None
    # The shape of the base model, while the model of the warm-up is not on disk.
    shape = shape_of(load_sft_config([f"experiment={name}"]).model.partial_pretrain) if name else None
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
                stage.figures.append(index_figure(arguments, sizes.passages))
            elif module in ("convsearch.distill", "convsearch.infer") and sizes and number + 1 == len(stage.commands):
                questions = sizes.train if module == "convsearch.distill" else sizes.test
                stage.figures.append(f"{questions:,} questions, one sample each, one process on each of {gpus} GPUs")
                if shape:
                    stage.figures.append(f"{4.0 * shape.parameters / GIB:.1f} GiB of weights per GPU, plus the cache")


def text_of(stages: Sequence[Stage], name: str) -> str:
    lines = [f"plan of {name}" if name else "plan"]
    for stage in stages:
        lines += ["", f"== {stage.name}"]
        for module, count in Counter(module_of(command)[0] for command in stage.commands).items():
            lines.append(f"   python -m {module}" + (f"  ({count} times)" if count > 1 else ""))
        lines += [f"   {figure}" for figure in stage.figures]
    count = sum(len(stage.commands) for stage in stages)
    return "\n".join([*lines, "", f"dry run: {count} commands of {len(stages)} stages are valid; nothing was started"])


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.plan", __doc__)
    add = parser.add_argument
    add("--name", default="", help="experiment; the sizes of TopiOCQA and QReCC are known")
    add("--gpus", type=int, default=8, help="GPUs per node")
    add("--nodes", type=int, default=1, help="nodes")
    add("--gpu_gib", type=float, default=80.0, help="memory of one GPU, in GiB")
    add("--all_commands", action="store_true", help="also print the commands in full")
    add("--variables", nargs="+", metavar="GROUP=NAME", help="only print the variables of an experiment, for a shell")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.variables:
        print(variables(args.variables))
        return
    stages = read_stages(sys.stdin)
    describe(stages, args.gpus, args.nodes, args.gpu_gib, args.name)
    if args.all_commands:
        print("\n".join(shlex.join(command) for stage in stages for command in stage.commands), end="\n\n")
    print(text_of(stages, args.name))


if __name__ == "__main__":
    run(main)
