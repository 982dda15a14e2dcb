"""Flips single bits in every file that a small run leaves, and reads them again as the next command would.

    .venv/bin/python tests/faults/flips.py [--flips 200] [--seed 1]        about ten minutes on two cores

Of each file 200 bits are flipped, one at a time. A flip is *found* if reading ends in a ValueError (the command's one
sentence), *harmless* if what is read is the same, and *unnoticed* otherwise. The run is that of kills.py. Ends with
status 1 if a flip was unnoticed in a file that is not listed in docs/reliability.md, or if reading crashed.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from kills import helpers, make_inputs, stages, undisturbed
from tqdm import tqdm

from convsearch import checksums
from convsearch.files import read_json, read_jsonl
from convsearch.model.loading import load_model, load_tokenizer
from convsearch.parquet import read_rows
from convsearch.runs import checkpoint, rollouts
from convsearch.runs.tracking import read_metrics
from eval.columns import Columns
from eval.queries import read_queries
from eval.runs import read_run
from retriever_server.bm25.index import Bm25Index

EDITABLE = (".trec", "metrics.jsonl", "metrics.json", "yield.json", "config.json", "made_of.json", ".settings.json")
Read = Callable[[], Any]


def reader(path: Path, out: Path) -> Read | None:
    """How the next command reads a file; None for a file that no command reads."""
    folder, name = path.parent, path.name
    if folder.name == "index":
        questions, golds = ["food of rome", "word17 word300", "oslo"], [["rome-food"], ["lima-rivers"], ["oslo-food"]]
        return lambda: Bm25Index.load(folder).gold_ranks(questions, golds, 100)
    if folder.name.startswith("global_step_"):
        return lambda: checkpoint.check(folder)
    if folder.name == "model":
        return lambda: (load_tokenizer(str(folder)).get_vocab(), float(sum(p.sum() for p in parameters(folder))))
    if folder.name == "rollouts":
        return lambda: rollouts.load(folder.parent, int(path.stem))
    if path.suffix == ".parquet":
        return lambda: list(read_rows(path, remedy="make it again"))
    if name == "metrics.jsonl":
        return lambda: read_metrics(folder)
    if name == "rewrites.jsonl":
        return lambda: read_queries(path, "rewrite", fused=True)
    if name == "samples.jsonl":
        return lambda: (checksums.check_lines(path), list(read_jsonl(path)))
    if path.suffix == ".trec":
        return lambda: [[*map(str, getattr(read_run(path), column.name))] for column in fields(Columns)]
    if path.suffix == ".json":
        return lambda: read_json(path, "make it again")
    return None


def parameters(folder: Path) -> Any:
    return load_model(str(folder)).parameters()


def flip(path: Path, read: Read, flips: int, draw: random.Random) -> Counter[str]:
    whole, expected, outcomes = path.read_bytes(), read(), Counter[str]()
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            outcomes["harmless" if read() == expected else "unnoticed"] += 1
        except ValueError:
            outcomes["found"] += 1
        except Exception as error:
            outcomes[f"crashed: {type(error).__name__}"] += 1
    path.write_bytes(whole)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="per file")
    parser.add_argument("--seed", type=int, default=1, help="of the bits")
    args: Namespace = parser.parse_args()
    faults = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        out = folder / "run"
        undisturbed(stages(folder, out), folder / "log")
        shutil.rmtree(out / "grpo" / "global_step_25", ignore_errors=True)  # one checkpoint of each trainer is enough
        paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("latest", "best")]
        kinds: dict[str, Counter[str]] = {}
        for path in tqdm(paths, desc="files", unit="file"):
            if (read := reader(path, out)) is None:
                continue
            outcomes = flip(path, read, args.flips, random.Random(f"{args.seed} {path.name}"))
            kinds.setdefault(path.relative_to(out).as_posix(), Counter()).update(outcomes)
            bad = [kind for kind in outcomes if kind not in ("found", "harmless")]
            faults |= bool(bad) and not path.name.endswith(EDITABLE)
        for kind, outcomes in kinds.items():
            print(f"{kind:<60} {', '.join(f'{what} {count}' for what, count in outcomes.most_common())}")
        total = sum(kinds.values(), Counter())
        print(f"{len(kinds)} files, {total.total()} flips: {dict(total)}")
    sys.exit(faults)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    assert helpers
    main()
