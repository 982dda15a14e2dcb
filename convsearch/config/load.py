"""From a command line to a frozen configuration.

A file under ``configs/`` may have three top-level nodes: ``sft`` and ``grpo``, each a part of the key tree of that
command, and ``names``, short names that only these files refer to (``${names.data}``). One experiment file therefore
describes both stages. On the command line, keys are written without the name of the node (``trainer.seed=2``); a plus
before a key is ignored.
"""

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from yaml import YAMLError  # type: ignore[import-untyped]

from convsearch.config.base import NO_EFFECT
from convsearch.config.grpo import GrpoConfig
from convsearch.config.sft import SftConfig
from convsearch.files import read_json

Kind = Literal["sft", "grpo"]
Config = TypeVar("Config", SftConfig, GrpoConfig)
MODELS: dict[str, type[SftConfig] | type[GrpoConfig]] = {"sft": SftConfig, "grpo": GrpoConfig}


def load_sft_config(argv: Sequence[str]) -> SftConfig:
    """The warm-up's configuration from ``argv``; --help prints the keys and exits. Raises ValueError for a mistake."""
    return _load("sft", SftConfig, argv)


def load_grpo_config(argv: Sequence[str]) -> GrpoConfig:
    """The RL stage's configuration from ``argv``; --help prints the keys and exits. Raises ValueError for a mistake."""
    return _load("grpo", GrpoConfig, argv)


def config_dir() -> Path:
    """The folder ``configs/`` of the checkout that this package is run from. Raises ValueError if there is none."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: run from a checkout installed with 'pip install -e .'")
    return folder


def help_text(kind: Kind, argv: Sequence[str] = ()) -> str:
    """Every key with its type, meaning and value (the default, or that of the experiment and overrides in ``argv``)."""
    tree = _compose(kind, argv)
    usage = f"python -m convsearch.{kind} [experiment=NAME] [GROUP=NAME ...] [KEY=VALUE ...] [--dry-run]"
    lines = [f"usage: {usage}   (Hydra's override syntax)", "", "groups (files under configs/):"]
    lines += [f"  {group}=  {', '.join(_options(group))}" for group in _groups()] + ["", "keys:"]
    for key, field in _leaves(MODELS[kind]):
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        value = _lookup(tree, key)
        shown = default if value is PydanticUndefined else _shown(value)
        lines += [f"  {key}={shown}  [{_type_name(field.annotation)}]", f"      {field.description}"]
    return "\n".join([*lines, ""])


def _load(kind: Kind, model: type[Config], argv: Sequence[str]) -> Config:
    if "--help" in argv or "-h" in argv:
        print(help_text(kind, [argument for argument in argv if argument not in ("--help", "-h")]))
        raise SystemExit(0)
    overrides = [argument for argument in argv if argument != "--dry-run"]
    tree = _compose(kind, overrides)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_sentence(kind, error.errors())) from None
    path = config.model.partial_pretrain if isinstance(config, SftConfig) else config.actor_rollout_ref.model.path
    model_max = _positions(Path(path))
    if model_max is not None:
        config.check_context(model_max)
    _warn_of_no_effect(model, overrides)
    if "--dry-run" in argv:
        print("\n".join(f"{key}={_shown(_lookup(config.model_dump(), key))}" for key, _ in _leaves(model)))
        print(f"dry run: the configuration of convsearch.{kind} is complete; nothing was started")
        raise SystemExit(0)
    return config


def _warn_of_no_effect(model: type[BaseModel], overrides: Sequence[str]) -> None:
    """One line on stderr (of rank 0) for each key of the command line that acts on nothing."""
    descriptions = {key: field.description or "" for key, field in _leaves(model)}
    for argument in (override.lstrip("+") for override in overrides):
        description = descriptions.get(argument.partition("=")[0], "")
        if description.startswith(NO_EFFECT) and os.environ.get("RANK", "0") == "0":
            print(f"warning: {argument} is {description}", file=sys.stderr)


def _compose(kind: Kind, argv: Sequence[str]) -> dict[str, Any]:
    """The key tree that the files and overrides make, as plain dicts and lists, before validation."""
    overrides = [_hydra_override(kind, argument) for argument in argv]
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = compose(config_name=kind, overrides=overrides)
        rooted = OmegaConf.create(_rooted(kind, OmegaConf.to_container(composed, resolve=False)))
        tree = OmegaConf.to_container(rooted, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"the configuration cannot be composed: {' '.join(str(error).split())}") from None
    assert isinstance(tree, dict)
    del tree["names"]
    return tree


def _rooted(kind: Kind, composed: Any) -> dict[str, Any]:
    """The ``kind`` node with ``names`` beside its keys, so that ${trainer.seed} in a file refers to its own node."""
    for node, value in composed.items():
        if node not in {*MODELS, "names"} or not isinstance(value, dict):
            rule = "only sft, grpo and names belong there, with keys below"
            raise ValueError(f"a file under {config_dir()} has '{node}: {value}' at its top: {rule}")
    return {**composed[kind], "names": composed["names"]}


def _hydra_override(kind: Kind, argument: str) -> str:
    """``argument`` in Hydra's form: a group without its plus, a key below its node. Raises ValueError if unknown."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        remedy = "quote a value that has spaces, commas or brackets as KEY=\"'VALUE'\""
        raise ValueError(f"'{argument}' is not KEY=VALUE: {remedy}") from None
    key = override.key_or_group
    if override.is_delete() or override.is_sweep_override() or override.package is not None:
        remedy = f"give {key} one value (null for none)"
        raise ValueError(f"'{argument}' deletes, sweeps or moves a key, which is not supported: {remedy}")
    if key in _groups():
        chosen = override.value()
        if not isinstance(chosen, dict):
            _check_option(key, chosen)
            return argument.lstrip("+")
    else:
        _check_key(kind, key, override.value())
    return f"++{kind}.{argument.lstrip('+')}"


def _check_option(group: str, chosen: object) -> None:
    options = _options(group)
    for name in chosen if isinstance(chosen, list) else [chosen]:
        if name is not None and str(name) not in options:
            known = ", ".join(options)
            raise ValueError(f"{group}={name}: configs/{group}/{name}.yaml does not exist, choose one of {known}")


def _check_key(kind: Kind, key: str, value: object) -> None:
    leaves = [name for name, _ in _leaves(MODELS[kind])]
    below = [name for name in leaves if name.startswith(f"{key}.")]
    if below and not isinstance(value, dict):
        raise ValueError(f"{key}={value} sets a whole section: set one of its keys, for example {below[0]}=VALUE")
    if key not in leaves and not below:
        raise ValueError(_unknown(key, leaves))


def _sentence(kind: Kind, errors: Sequence[ErrorDetails]) -> str:
    first, more = errors[0], len(errors) - 1
    leaves = dict(_leaves(MODELS[kind]))
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = _unknown(key, list(leaves))
    elif first["type"] == "missing" or (first["type"] == "too_short" and not first["input"]):
        below = [name for name in leaves if name == key or name.startswith(f"{key}.")]
        name = next((name for name in below if leaves[name].is_required()), below[0])
        text = f"{name} is not set: set it on the command line, or choose an experiment=NAME (--help lists them)"
    elif first["type"] == "value_error":
        text = f"{key}: {message}" if key else message
    else:
        text = f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"
    return text + (f" (and {more} more)" if more else "")


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every value below ``model``, in the order of the classes."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return PydanticUndefined
        tree = tree[part]
    return tree


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _type_name(annotation: Any) -> str:
    arguments, origin = get_args(annotation), getattr(annotation, "__origin__", None)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        inner = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else "[" + ", ".join(inner) + "]"
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    return "|".join(_type_name(argument) for argument in arguments)


def _groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _unknown(word: str, known: Sequence[str]) -> str:
    """The error for an unknown key, with the most similar known key; the last part of a dotted key counts most."""

    def similarity(candidate: str) -> float:
        tail = difflib.SequenceMatcher(None, word.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]).ratio()
        return tail + difflib.SequenceMatcher(None, word, candidate).ratio()

    return f"unknown key '{word}': the nearest known key is '{max(known, key=similarity)}' (--help lists them)"


def _positions(folder: Path) -> int | None:
    """``max_position_embeddings`` of a model folder's config.json; None if there is no such file or value."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    positions = read_json(path, "export or download the model again").get("max_position_embeddings")
    return positions if isinstance(positions, int) else None
