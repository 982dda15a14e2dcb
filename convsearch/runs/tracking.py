"""Where metrics go: always ``metrics.jsonl`` in the run folder; optionally the console, wandb and TensorBoard.

wandb and TensorBoard also get tables of samples.
"""

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


CONSOLE = (  # metrics that the console shows
    "reward format_rate rank1_rate kl entropy response_tokens loss grad_norm lr step_s tokens_per_s mfu "
    "val_reward val_mrr val_loss skipped"
)
NOT_INSTALLED = "trainer.logger has {0}, which is missing: pip install -e '.[{0}]', or use trainer.logger=['console']"


class Tracker:
    """Appends one line per step; a run that resumes at step s first deletes the lines of s and later."""

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
        """Whether ``samples`` writes anywhere."""
        return bool(self.sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        if not self.active:
            return
        with named_errors(self.path):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.console:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name in CONSOLE.split())
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
    """One wandb run per experiment name; ``WANDB_MODE=offline`` keeps it in the run folder. Step -1 is logged as 0."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(NOT_INSTALLED.format("wandb")) from error
        self.wandb: Any = wandb
        folder = str(run_dir)
        self.run = wandb.init(
            project=project, name=experiment, id=experiment, dir=folder, config=config, resume="allow"
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(metrics, step=max(0, step))

    def table(self, step: int, rows: Table) -> None:
        table = self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """``<run>/tensorboard``; after a resume, the viewer hides later steps of the interrupted run."""

    def __init__(self, run_dir: Path, first_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(NOT_INSTALLED.format("tensorboard")) from error
        self.writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None, flush_secs=30)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Table) -> None:
        self.writer.add_text("samples", markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


def markdown(rows: Table) -> str:
    """Rows as a Markdown table; line breaks and bars inside a cell are escaped."""
    columns = list(rows[0])

    def line(cells: Sequence[object]) -> str:
        texts = (str(cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;") for cell in cells)
        return f"| {' | '.join(text.replace(chr(10), '<br>') for text in texts)} |"

    return "\n".join([line(columns), f"|{'---|' * len(columns)}", *(line(list(row.values())) for row in rows)])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first, without a half-written last line.

    Raises:
        ValueError: another line is damaged; names file and line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = list(read_jsonl(path, growing=True))
    for number, metrics in lines:
        if not isinstance(metrics.get("step"), int):
            raise ValueError(f"{path}:{number}: not a line of metrics, because it has no step; delete the line")
    return [metrics for _, metrics in lines]


def _forget(path: Path, first_step: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path.parent) if 0 < first_step > record["step"]]
    write_jsonl(path, kept)
    assert sum(1 for _ in read_jsonl(path)) == len(kept)
