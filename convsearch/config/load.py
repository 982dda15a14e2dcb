"""From a command line to a frozen configuration.

A file under ``configs/`` may hold three top-level nodes: ``sft`` and ``grpo``, each a piece of that command's key tree, and
``names``, short names that the pieces refer to (``${names.data}``) and that no program sees. Thus one experiment file describes
both stages. On the command line the keys stand without the node's name (``trainer.seed=2``), a plus before them changes nothing.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from convsearch.config.grpo import GrpoConfig
from convsearch.config.sft import SftConfig

Kind = Literal["sft", "grpo"]
Config = TypeVar("Config", SftConfig, GrpoConfig)
MODELS: dict[str, type[SftConfig] | type[GrpoConfig]] = {"sft": SftConfig, "grpo": GrpoConfig}


def load_sft_config(argv: Sequence[str]) -> SftConfig:
    """The warm-up's configuration from ``argv`` (no program name). For --help prints it and exits. Raises ValueError, one sentence."""
    return _load("sft", SftConfig, argv)


def load_grpo_config(argv: Sequence[str]) -> GrpoConfig:
    """The RL stage's configuration from ``argv`` (no program name). For --help prints it and exits. Raises ValueError, one sentence."""
    return _load("grpo", GrpoConfig, argv)


def config_dir() -> Path:
    """The folder ``configs/`` of the checkout that this package is run from. Raises ValueError where there is none."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: run from a checkout installed with 'pip install -e .'")
    return folder


def help_text(kind: Kind, argv: Sequence[str] = ()) -> str:
    """Every key with its type, its value (the default, or what the experiment and overrides of ``argv`` make of it) and what it means."""
    tree = _compose(kind, argv)
    groups = [f"  {group}=  {', '.join(_options(group))}" for group in _groups()]
    keys = []
    for key, field in _leaves(MODELS[kind]):
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        value = _lookup(tree, key)
        keys.append(
            f"  {key}={default if value is PydanticUndefined else _shown(value)}  [{_type_name(field)}]\n      {field.description}"
        )
    usage = f"usage: python -m convsearch.{kind} [experiment=NAME] [GROUP=NAME ...] [KEY=VALUE ...] [--dry-run]   (Hydra's override syntax)"
    return "\n".join([usage, "", "groups (files under configs/):", *groups, "", "keys:", *keys, ""])


def _load(kind: Kind, model: type[Config], argv: Sequence[str]) -> Config:
    if "--help" in argv or "-h" in argv:
        print(help_text(kind, [argument for argument in argv if argument not in ("--help", "-h")]))
        raise SystemExit(0)
    dry = "--dry-run" in argv
    argv = [argument for argument in argv if argument != "--dry-run"]
    tree = _compose(kind, argv)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_sentence(kind, error.errors())) from None
    path = config.model.partial_pretrain if isinstance(config, SftConfig) else config.actor_rollout_ref.model.path
    model_max = _positions(Path(path))
    if model_max is not None:
        config.check_context(model_max)
    if dry:
        print("\n".join(f"{key}={_shown(_lookup(config.model_dump(), key))}" for key, _ in _leaves(model)))
        print(f"dry run: the configuration of convsearch.{kind} is whole; nothing was started")
        raise SystemExit(0)
    return config


def _compose(kind: Kind, argv: Sequence[str]) -> dict[str, Any]:
    """The key tree, as plain dicts and lists, that the files and overrides make; not yet validated."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

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
    """The ``kind`` node with ``names`` beside its keys, so that ${trainer.seed} in a file means what it means on the command line."""
    for node, value in composed.items():
        if node not in {*MODELS, "names"} or not isinstance(value, dict):
            wrong = f"{node}: {value}"
            raise ValueError(
                f"a file under {config_dir()} has '{wrong}' at its top: only sft, grpo and names belong there, with keys below"
            )
    return {**composed[kind], "names": composed["names"]}


def _hydra_override(kind: Kind, argument: str) -> str:
    """``argument`` as Hydra has to see it: a group without its plus, a key below its node. Raises ValueError for what is not known."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        raise ValueError(
            f"'{argument}' is not KEY=VALUE: quote a value that has spaces, commas or brackets as KEY=\"'VALUE'\""
        ) from None
    key = override.key_or_group
    if override.is_delete() or override.is_sweep_override() or override.package is not None:
        raise ValueError(
            f"'{argument}' deletes, sweeps or moves a key, which is not offered: give {key} one value (null for none)"
        )
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
            raise ValueError(f"{group}={name}: there is no file configs/{group}/{name}.yaml, choose one of {known}")


def _check_key(kind: Kind, key: str, value: object) -> None:
    leaves = [name for name, _ in _leaves(MODELS[kind])]
    below = [name for name in leaves if name.startswith(f"{key}.")]
    if below and not isinstance(value, dict):
        raise ValueError(f"{key}={value} sets a whole section: name one of its keys, such as {below[0]}=VALUE")
    if key not in leaves and not below:
        raise ValueError(f"unknown key '{key}': the nearest known key is '{_nearest(key, leaves)}' (--help lists them)")


def _sentence(kind: Kind, errors: Sequence[ErrorDetails]) -> str:
    first, more = errors[0], len(errors) - 1
    leaves = [name for name, _ in _leaves(MODELS[kind])]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{key}': the nearest known key is '{_nearest(key, leaves)}' (--help lists them)"
    elif first["type"] == "missing" or (first["type"] == "too_short" and not first["input"]):
        below = next((name for name in leaves if name == key or name.startswith(f"{key}.")), key)
        required = [
            name
            for name, field in _leaves(MODELS[kind])
            if field.is_required() and (name == key or name.startswith(f"{key}."))
        ]
        text = f"{(required or [below])[0]} is not set: give it on the command line, or choose an experiment=NAME (--help lists them)"
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


def _type_name(field: FieldInfo) -> str:
    def name(annotation: Any) -> str:
        arguments = get_args(annotation)
        if annotation is type(None):
            return "null"
        if isinstance(annotation, type) and not arguments:
            return annotation.__name__
        if getattr(annotation, "__origin__", None) is Literal:
            return "|".join(map(str, arguments))
        if getattr(annotation, "__origin__", None) is tuple:
            inner = [name(argument) for argument in arguments if argument is not Ellipsis]
            return f"list of {inner[0]}" if Ellipsis in arguments else "[" + ", ".join(inner) + "]"
        if hasattr(annotation, "__metadata__"):
            return name(arguments[0])
        return "|".join(name(argument) for argument in arguments)

    return name(field.annotation)


def _groups() -> list[str]:
    return sorted(path.name for path in config_dir().iterdir() if path.is_dir())


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def _nearest(word: str, known: Sequence[str]) -> str:
    """The known word that reads most like ``word``; for a dotted key its last part counts most."""

    def likeness(candidate: str) -> float:
        tail = difflib.SequenceMatcher(None, word.rsplit(".", 1)[-1], candidate.rsplit(".", 1)[-1]).ratio()
        return tail + difflib.SequenceMatcher(None, word, candidate).ratio()

    return max(known, key=likeness)


def _positions(folder: Path) -> int | None:
    """``max_position_embeddings`` of a model folder's config.json; None where the model is not a local folder or does not say."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        positions = json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): the model's folder is damaged, export or fetch it again"
        ) from None
    return positions if isinstance(positions, int) else None
