"""What a report shows, read from a run folder (of scripts/quickstart.sh, or of convsearch.grpo alone)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convsearch.files import read_json, read_jsonl
from convsearch.parquet import open_parquet
from eval.columns import Columns
from eval.measures import Floats, evaluate, parse_measures
from eval.runs import read_qrels, read_run
from eval.systems import REWRITERS, SYSTEMS

Record = dict[str, Any]
MEASURES = "MRR NDCG@3 R@10 R@100"
BUCKETS = ("rank 1", "2 - 10", "11 - 100", "not found", "no rewrite")  # of samples; a run has the first four
_UPPER = (1, 10, 100)


@dataclass(frozen=True, slots=True)
class Results:
    """The runs of a folder, measured; every array is [queries] in the order of ``qids``."""

    qids: tuple[str, ...]
    values: Mapping[str, Mapping[str, Floats]]  # system -> measure -> values
    runs: Mapping[str, Columns]  # system -> its run
    golds: Mapping[str, list[str]]
    retriever: str  # the tag of the runs: bm25, ance, ...
    disagreements: tuple[str, ...]  # figures of results.json that differ from the runs'

    def ranks(self, system: str) -> list[int | None]:
        """The gold passage's rank from 1, None if the run lacks it."""
        return [round(1 / value) if value else None for value in self.values[system]["MRR"].tolist()]


@dataclass(frozen=True, slots=True)
class Case:
    """One question before and after: ``hits`` are the best passages of the rewrite."""

    record: Record
    before: int | None
    after: int | None
    golds: tuple[str, ...]
    hits: tuple[tuple[str, float], ...]

    @property
    def gain(self) -> float:
        return reciprocal(self.after) - reciprocal(self.before)


def reciprocal(rank: int | None) -> float:
    return 1 / rank if rank else 0.0


def bucket(rank: int | None) -> int:
    """The place in BUCKETS of a rank: 0 for rank 1, 1 up to rank 10, 2 for other ranks, 3 for not found."""
    if rank is None:
        return 3
    return next((i for i, upper in enumerate(_UPPER) if rank <= upper), 2)


def read_results(folder: Path) -> Results | None:
    """Measures every ``<system>.trec`` of the folder against its ``test.trec``; None if there is nothing to measure.

    Raises:
        ValueError: a file is wrong; names file and line.
    """
    if not (folder / "test.trec").is_file():
        return None
    paths = {path.stem: path for path in sorted(folder.glob("*.trec")) if path.stem not in ("test", "validation")}
    stems = [*(stem for stem in SYSTEMS if stem in paths), *(stem for stem in paths if stem not in SYSTEMS)]
    if not stems:
        return None
    qrels = read_qrels(folder / "test.trec")
    values: dict[str, Mapping[str, Floats]] = {}
    runs: dict[str, Columns] = {}
    qids: tuple[str, ...] = ()
    for stem in stems:
        name = SYSTEMS.get(stem, stem)
        runs[name] = read_run(paths[stem])
        evaluation = evaluate(runs[name], qrels, parse_measures(MEASURES))
        values[name], qids = evaluation.values, evaluation.qids
    golds: dict[str, list[str]] = {}
    names, docids = qrels.qids.to_pylist(), qrels.docids.to_pylist()
    for query, docid, grade in zip(qrels.query_of_row.tolist(), docids, qrels.values.tolist(), strict=True):
        if grade > 0:
            golds.setdefault(names[query], []).append(docid)
    with paths[stems[-1]].open(encoding="utf-8") as file:
        retriever = (file.readline().split() or ["?"])[-1]
    return Results(qids, values, runs, golds, retriever, tuple(_disagreements(folder / "results.json", values)))


def _disagreements(path: Path, values: Mapping[str, Mapping[str, Floats]]) -> list[str]:
    if not path.is_file():
        return []
    written = read_json(path, "make it again with `python -m eval.summary`")
    found = []
    for name, measured in values.items():
        for measure, scores in measured.items():
            says, mean = written.get(name, {}).get(measure), scores.mean()
            if says is not None and abs(says - mean) > 1e-9:
                found.append(f"{name}, {measure}: results.json has {100 * says:.2f}, the run gives {100 * mean:.2f}")
    return found


def read_metrics(folder: Path) -> list[Record]:
    """The lines of ``grpo/metrics.jsonl`` (or ``metrics.jsonl``), without a half-written last one."""
    path = next((p for p in (folder / "grpo" / "metrics.jsonl", folder / "metrics.jsonl") if p.is_file()), None)
    if path is None:
        return []
    return [record for _, record in read_jsonl(path, growing=True)]


def rank_shares(folder: Path, most: int = 60) -> list[tuple[str, list[float]]]:
    """Shares of BUCKETS among the samples: ("step 12", shares); ("steps 1 - 10", shares) beyond ``most`` dumps."""
    files = sorted((folder / "grpo" / "rollouts").glob("*.parquet")) or sorted((folder / "rollouts").glob("*.parquet"))
    per = -(-len(files) // most) if files else 1
    columns = []
    for start in range(0, len(files), per):
        group = files[start : start + per]
        counts = np.zeros(len(BUCKETS))
        for path in group:
            with open_parquet(path, "leave it out") as file:
                table = file.read(columns=["rank", "error"])
            ranks = table["rank"].fill_null(0).to_numpy()
            place = np.where(ranks == 0, 3, np.searchsorted(_UPPER, ranks).clip(max=2))
            place = np.where(table["error"].is_valid().to_numpy(), 4, place)
            counts += np.bincount(place, minlength=len(BUCKETS))
        first, last = int(group[0].stem) + 1, int(group[-1].stem) + 1
        label = f"step {first}" if first == last else f"steps {first} - {last}"
        columns.append((label, (counts / max(counts.sum(), 1)).tolist()))
    return columns


def rewriter_of(folder: Path, results: Results) -> tuple[str, Path] | None:
    """(system, its rewrites) of the newest stage that has both."""
    for stem in REWRITERS:
        if SYSTEMS[stem] in results.values and (folder / f"{stem}.jsonl").is_file():
            return SYSTEMS[stem], folder / f"{stem}.jsonl"
    return None


def cases(results: Results, baseline: str, system: str, rewrites: Path, most: int) -> tuple[list[Case], list[Case]]:
    """The ``most`` biggest wins and losses in reciprocal rank against the baseline, biggest first, ties by query id."""
    before, after = results.ranks(baseline), results.ranks(system)
    gains = {qid: reciprocal(a) - reciprocal(b) for qid, b, a in zip(results.qids, before, after, strict=True)}
    order = sorted(gains, key=lambda qid: (-abs(gains[qid]), qid))
    wins = [qid for qid in order if gains[qid] > 0][:most]
    losses = [qid for qid in order if gains[qid] < 0][:most]
    chosen = set(wins) | set(losses)
    records = {record["qid"]: record for _, record in read_jsonl(rewrites) if record.get("qid") in chosen}
    place = {qid: i for i, qid in enumerate(results.qids)}

    def case(qid: str) -> Case:
        record = records.get(qid, {"qid": qid, "question": "(the rewrites lack this query)"})
        golds = tuple(results.golds.get(qid, ()))
        return Case(record, before[place[qid]], after[place[qid]], golds, tuple(_hits(results.runs[system], qid, 3)))

    return [case(qid) for qid in wins], [case(qid) for qid in losses]


def _hits(run: Columns, qid: str, count: int) -> Sequence[tuple[str, float]]:
    index = run.qids.index(qid).as_py()
    if index < 0:
        return []
    rows = np.flatnonzero(run.query_of_row == index)
    best = rows[np.argsort(-run.values[rows], kind="stable")][:count]
    return list(zip(run.docids.take(best).to_pylist(), run.values[best].tolist(), strict=True))
