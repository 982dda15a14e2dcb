"""Where metrics go: ``metrics.jsonl`` in the run folder always; the console, wandb and TensorBoard on demand, with tables of samples in the last two."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convsearch.files import named_errors, read_jsonl, write_jsonl
from convsearch.model import distributed

Metrics = dict[str, float]
Table = Sequence[dict[str, Any]]


class Tracker:
    """Appends one line a step; a run that resumes at step s first forgets the lines of s and later."""

    def __init__(
        self,
        run_dir: Path,
        loggers: tuple[str, ...],
        project: str,
        experiment: str,
        first_step: int,
        config: dict[str, Any],
    ):
        self.active = distributed.rank() == 0
        self.console = "console" in loggers
        self.sinks: list[WandbSink | TensorBoardSink] = []
        if not self.active:
            return
        self.path = run_dir / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _forget(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        if "wandb" in loggers:
            self.sinks.append(WandbSink(run_dir, project, experiment, config))
        if "tensorboard" in loggers:
            self.sinks.append(TensorBoardSink(run_dir, first_step))

    @property
    def shows_tables(self) -> bool:
        """Whether ``samples`` reaches anyone."""
        return bool(self.sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        if not self.active:
            return
        with named_errors(self.path):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.console:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name in _SHOWN)
            tqdm.write(f"step {step}: {shown}")
        for sink in self.sinks:
            sink.log(step, metrics)

    def samples(self, step: int, rows: Table) -> None:
        """A table of samples of the step; every row has the same keys."""
        for sink in self.sinks:
            sink.table(step, rows)

    def close(self) -> None:
        if self.active:
            self.file.close()
            for sink in self.sinks:
                sink.close()


class WandbSink:
    """One wandb run an experiment name; ``WANDB_MODE=offline`` keeps it in the run folder. Steps are those of the run; -1 is told as 0."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "trainer.logger has wandb, which is not installed: pip install -e '.[wandb]', or use trainer.logger=['console']"
            ) from error
        self.wandb: Any = wandb
        self.run = wandb.init(
            project=project, name=experiment, dir=str(run_dir), config=config, resume="allow", id=experiment
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(metrics, step=max(0, step))

    def table(self, step: int, rows: Table) -> None:
        columns = list(rows[0])
        self.run.log(
            {"samples": self.wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])},
            step=step,
        )

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """``<run>/tensorboard``; what a broken run has written of later steps is hidden by the viewer."""

    def __init__(self, run_dir: Path, first_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "trainer.logger has tensorboard, whose writer is not installed: pip install -e '.[tensorboard]', or use trainer.logger=['console']"
            ) from error
        self.writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None, flush_secs=30)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Table) -> None:
        self.writer.add_text("samples", markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


def markdown(rows: Table) -> str:
    """Rows as a table of Markdown; line breaks and bars inside a cell are written so that they stay inside."""
    columns = list(rows[0])

    def line(cells: Sequence[object]) -> str:
        escaped = (
            str(cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>")
            for cell in cells
        )
        return f"| {' | '.join(escaped)} |"

    return "\n".join(
        [line(columns), f"|{'---|' * len(columns)}", *(line([row[name] for name in columns]) for row in rows)]
    )


_SHOWN = {
    "reward",
    "format_rate",
    "rank1_rate",
    "kl",
    "entropy",
    "response_tokens",
    "loss",
    "grad_norm",
    "lr",
    "step_s",
    "tokens_per_s",
    "mfu",
    "val_reward",
    "val_mrr",
    "val_loss",
}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's ``metrics.jsonl``, oldest first; a half-written last line is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _forget(path: Path, first_step: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path.parent) if 0 < first_step > record["step"]]
    write_jsonl(path, kept)
    assert sum(1 for _ in read_jsonl(path)) == len(kept)
