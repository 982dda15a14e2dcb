"""Where metrics go: ``metrics.jsonl`` in the run folder always, the console and wandb on demand."""

import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convsearch import distributed
from convsearch.files import named_errors, read_jsonl, write_jsonl

Metrics = dict[str, float]


class Tracker:
    """Appends one line a step; a run that resumes at step s first forgets the lines of s and later."""

    def __init__(self, run_dir: Path, loggers: tuple[str, ...], project: str, experiment: str, first_step: int, config: dict[str, Any]):
        self.active = distributed.rank() == 0
        self.console = "console" in loggers
        self.wandb: Any = None
        if not self.active:
            return
        self.path = run_dir / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _forget(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        if "wandb" in loggers:
            self.wandb = _start_wandb(run_dir, project, experiment, config)

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
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


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


def _start_wandb(run_dir: Path, project: str, experiment: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "trainer.logger has wandb, which is not installed: pip install -e '.[wandb]', or use trainer.logger=['console']"
        ) from error
    return wandb.init(project=project, name=experiment, dir=str(run_dir), config=config, resume="allow", id=experiment)
