"""Every sink gives back the metrics that were written; a resumed run has no step twice."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convsearch.rewards.scoring import Group, Rollout, Score
from convsearch.rewards.shapes import Feedback
from convsearch.runs import rollouts
from convsearch.runs.tracking import Tracker, markdown, read_metrics
from convsearch.types import Completion, Example, Rewrite

ROWS = [{"query": "q1", "rewrite": "a | b\nc <b>", "reward": 1.5}, {"query": "q2", "rewrite": "d", "reward": -0.1}]


def tracker(run_dir: Path, *loggers: str, first_step: int = 0) -> Tracker:
    return Tracker(run_dir, loggers, "project", "run", first_step, {"trainer": {"seed": 1}})


def test_a_resumed_run_deletes_the_lines_of_repeated_steps(tmp_path: Path) -> None:
    for first_step, values in ((0, [1.0, 2.0, 3.0]), (2, [30.0, 40.0])):
        log = tracker(tmp_path, "jsonl", first_step=first_step)
        for step, value in enumerate(values, start=first_step):
            log.log(step, {"loss": value})
        assert not log.shows_tables
        log.close()
    assert read_metrics(tmp_path) == [{"step": step, "loss": loss} for step, loss in enumerate([1.0, 2.0, 30.0, 40.0])]


def test_cells_are_escaped() -> None:
    assert markdown(ROWS).splitlines() == [
        "| query | rewrite | reward |",
        "|---|---|---|",
        "| q1 | a &#124; b<br>c &lt;b> | 1.5 |",
        "| q2 | d | -0.1 |",
    ]


@pytest.mark.parametrize(("logger", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_logger_is_one_sentence(
    logger: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"trainer.logger has {logger}.*pip install -e '.\[{logger}\]'"):
        tracker(tmp_path, logger)


def sample(qid: str, reward: float, rank: int | None, text: str) -> Rollout:
    rewrite = Rewrite(text, None) if rank else Rewrite(None, "no_tag")
    completion = Completion((4,) * len(text), (-0.5,) * len(text), text, "stop")
    return Rollout(Example(qid, (), "", ()), completion, Score(rewrite, Feedback(rank), reward))


def test_the_table_has_the_best_and_the_worst_of_the_first_groups() -> None:
    first = [sample("q1", 0.5, 20, "middle"), sample("q1", 2.0, 1, "best"), sample("q1", -0.1, None, "worst")]
    others = [[sample("q2", 1.0, 10, "same")] * 3, [sample("q3", 1.0, 10, "more")] * 3]
    rows = rollouts.table([Group(tuple(group)) for group in (first, *others)], most=2)
    assert [(row["query"], row["sample"], row["reward"], row["rank"], row["rewrite"]) for row in rows] == [
        ("q1", "best", 2.0, "1", "best"),
        ("q1", "worst", -0.1, "-", "(no_tag)"),
        ("q2", "best", 1.0, "10", "same"),
        ("q2", "worst", 1.0, "10", "same"),
    ]


def events(folder: Path) -> list[Any]:
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  # the writer's package is there
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its check sum (4), the event, its check sum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


@pytest.mark.slow
def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard: pip install -e '.[tensorboard]'")
    log = tracker(tmp_path, "tensorboard")
    assert log.shows_tables
    log.log(3, {"loss": 0.25, "kl": 1.0})
    log.samples(3, ROWS)
    log.close()
    written = [(event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    assert [(step, value.tag, value.simple_value) for step, value in written[:2]] == [(3, "loss", 0.25), (3, "kl", 1.0)]
    step, text = written[2]
    assert (step, text.tag) == (3, "samples/text_summary")
    assert text.tensor.string_val[0].decode() == markdown(ROWS)
    again = tracker(tmp_path, "tensorboard", first_step=2)
    again.close()
    assert any(
        event.session_log.status == 1 and event.step == 2 for event in events(tmp_path / "tensorboard")
    )  # START: later steps are void


@pytest.mark.slow
def test_wandb_offline_keeps_scalars_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb: pip install -e '.[wandb]'")
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    log = tracker(tmp_path, "wandb")
    log.log(-1, {"val_reward": 0.5})
    log.log(0, {"loss": 0.25})
    log.samples(0, ROWS)
    log.log(1, {"loss": 0.125})
    log.close()
    (offline,) = (tmp_path / "wandb").glob("offline-run-*-run/run-run.wandb")
    deadline, needles = time.monotonic() + 60, (b"val_reward", b"0.125", b"samples")
    while not all(
        needle in offline.read_bytes() for needle in needles
    ):  # wandb's own process writes it, later on a busy machine
        assert time.monotonic() < deadline, offline.read_bytes()
        time.sleep(0.05)
    (kept,) = offline.parent.glob("files/media/table/samples_*.table.json")
    assert json.loads(kept.read_text())["data"] == [[row[name] for name in ROWS[0]] for row in ROWS]
