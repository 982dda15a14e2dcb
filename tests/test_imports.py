"""Who may import whom: parts meet at files and HTTP, never at each other's insides.

1. convsearch imports neither data_preprocess nor retriever_server nor eval.
2. data_preprocess and retriever_server import of the project at most convsearch's messages, prompts, files and command-line manners.
3. eval imports those, the HTTP client and retriever_server's searchers, not its server.
4. The shared four do without torch, so that a server or a conversion never loads it on their account.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("convsearch", "data_preprocess", "eval", "retriever_server")
SHARED_FOUR = ("convsearch.types", "convsearch.prompts", "convsearch.files", "convsearch.cli")
SERVER_SIDE = ("retriever_server.server", "retriever_server.serving.app", "retriever_server.__main__")
HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "pandas",
    "scipy",
    "numba",
    "fastapi",
    "uvicorn",
    "pyarrow",
    "httpx",
    "matplotlib",
)


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, in functions too; a name that is a module of the package counts as that module."""
    package = ".".join(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = root.joinpath(*base.split("."), alias.name)
                yield (
                    node.lineno,
                    f"{base}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else base,
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
            "run_module",
        ):
            yield from ((node.lineno, argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def allowed(importer: str, module: str) -> bool:
    """Whether code of the package ``importer`` may import ``module``."""
    target = module.partition(".")[0]
    if target == importer or target not in PACKAGES:
        return True
    if importer == "convsearch":
        return False
    if module in SHARED_FOUR:
        return True
    return importer == "eval" and (
        module == "convsearch.retriever.client" or (target == "retriever_server" and module not in SERVER_SIDE)
    )


def breaches(root: Path) -> list[str]:
    """One line for every import that breaks the rule: file, line, module."""
    return [
        f"{path.relative_to(root)}:{line} imports {module}"
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for line, module in imported(path, root)
        if not allowed(package, module)
    ]


def test_every_import_keeps_the_rule() -> None:
    assert all((ROOT / package).is_dir() for package in PACKAGES)
    assert breaches(ROOT) == []


PLANTED = [
    ("convsearch", "from retriever_server.bm25.index import Bm25Index", "retriever_server.bm25.index"),
    ("convsearch", "def f():\n    import eval.metrics", "eval.metrics"),
    ("convsearch", "import importlib\nimportlib.import_module('data_preprocess.demo')", "data_preprocess.demo"),
    ("convsearch", "from ..eval import metrics", "eval.metrics"),
    ("data_preprocess", "from convsearch import grpo", "convsearch.grpo"),
    ("data_preprocess", "from convsearch.sampling.hf import HfSampler", "convsearch.sampling.hf"),
    ("data_preprocess", "from retriever_server import index", "retriever_server.index"),
    ("retriever_server", "import convsearch.parsing as parsing", "convsearch.parsing"),
    ("retriever_server", "from eval.runs import read_run", "eval.runs"),
    ("eval", "from convsearch.model.loading import load", "convsearch.model.loading"),
    ("eval", "from retriever_server.server import main", "retriever_server.server"),
    ("eval", "from data_preprocess import writers", "data_preprocess.writers"),
]


@pytest.mark.parametrize(("package", "code", "module"), PLANTED)
def test_an_import_that_breaks_the_rule_is_named(tmp_path: Path, package: str, code: str, module: str) -> None:
    for name in (
        "convsearch/grpo",
        "eval/metrics",
        "retriever_server/index",
        "data_preprocess/writers",
        f"{package}/planted",
    ):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code if name.endswith("planted") else "")
    assert breaches(tmp_path) == [f"{package}/planted.py:{code.count(chr(10)) + 1} imports {module}"]


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("retriever_server", "from convsearch.cli import run\nfrom convsearch import files, types"),
        ("data_preprocess", "from convsearch.prompts import render\nfrom . import planted"),
        (
            "eval",
            "from convsearch.retriever.client import RetrieverClient\nfrom retriever_server.bm25.index import Bm25Index\nimport numpy",
        ),
        ("convsearch", "import torch\nfrom convsearch.types import Turn\nfrom .planted import x\nimport evaluate"),
    ],
)
def test_an_import_that_keeps_the_rule_is_let_be(tmp_path: Path, package: str, code: str) -> None:
    for name in ("types", "files"):
        (tmp_path / "convsearch").mkdir(exist_ok=True)
        (tmp_path / "convsearch" / f"{name}.py").touch()
    (tmp_path / package).mkdir(exist_ok=True)
    (tmp_path / package / "planted.py").write_text(code)
    assert breaches(tmp_path) == []


def test_the_shared_modules_load_nothing_heavy() -> None:
    code = f"import sys, {', '.join(SHARED_FOUR)}, convsearch.parsing\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(HEAVY) & set(done.stdout.split()) == set()
