"""What both trainers do around their steps: when to save, and how a run ends before its last step.

A run that the collapse guard stops, or that receives SIGTERM (a Slurm preemption, a time limit), saves at the end of
the current step and exits with its own status, so that a script does not start the next stage with half a model: 3 for
the guard, 143 for SIGTERM. The same command resumes it. A second SIGTERM ends it at once.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

from convsearch.cli import Ended
from convsearch.config.base import TrainerSection
from convsearch.config.guard import GuardConfig
from convsearch.model import distributed
from convsearch.runs import checkpoint
from convsearch.runs.collapse import CollapseGuard
from convsearch.runs.tracking import read_metrics

COLLAPSED, TERMINATED = 3, 128 + signal.SIGTERM


def sweep(run_dir: Path) -> None:
    """Removes the half-written files of a killed process."""
    for path in (*run_dir.glob("*.tmp-[0-9]*"), *(run_dir / "rollouts").glob("*.tmp-[0-9]*")):
        path.unlink(missing_ok=True)
    for folder in run_dir.glob(".tmp-global_step_*"):
        shutil.rmtree(folder, ignore_errors=True)


class Terminated:
    """Records the first SIGTERM; a second one ends the process. A context for the main thread.

    Slurm signals every process of a job step and torchrun forwards the signals that it receives, so that one request
    arrives twice: signals within ``SAME_S`` seconds of the first count as the first.
    """

    SAME_S = 2.0

    def __init__(self) -> None:
        self.received, self.received_at = False, 0.0
        self.before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.received_at > self.SAME_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if self.received:
            return
        self.received, self.received_at = True, time.monotonic()
        if distributed.rank() == 0:
            sys.stderr.write("\nSIGTERM: saving at the end of this step; a second one ends the run at once\n")

    def on_any_rank(self) -> bool:
        """A collective call: the ranks receive a signal at different moments, and must stop at the same step."""
        return distributed.sum_over_ranks({"received": float(self.received)})["received"] > 0


class Stopping:
    """Saves when a checkpoint is due and ends a run early if it must; a context around the steps.

    Args:
        save: ``save(done, score, last)`` writes the checkpoint after ``done`` steps. ``score``: the validation metric
            by which the best one is kept, if any. ``last``: no step follows, so it must be complete on return.
        save_every: steps between checkpoints; 0: only at the end.
    """

    def __init__(
        self,
        run_dir: Path,
        trainer: TrainerSection,
        steps: range,
        save_every: int,
        save: Callable[[int, float | None, bool], None],
        limits: GuardConfig | None = None,
    ):
        self.run_dir, self.trainer, self.total = run_dir, trainer, steps.stop
        self.save_every, self.save = save_every, save
        best = checkpoint.best(run_dir, trainer.best_metric, trainer.best_mode)
        self.best = best[1].value if best else None
        history = [record for record in read_metrics(run_dir) if record["step"] < steps.start]
        self.guard = CollapseGuard(limits, trainer.max_skipped_steps, history)
        self.terminated = Terminated()
        if distributed.rank() == 0:
            sweep(run_dir)

    def __enter__(self) -> Self:
        self.terminated.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.terminated.__exit__(*error)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after the metrics of ``step`` (from 0) are logged.

        Raises:
            Ended: the guard has found a collapse, or SIGTERM was received; a checkpoint of this step is on disk. Or a
                weight is not finite; that is not saved.
        """
        done, last = step + 1, step + 1 == self.total
        if metrics.get("broken"):
            kept = checkpoint.checkpoints(self.run_dir)
            rest = f"{kept[-1][1]} is the newest checkpoint" if kept else "there is no checkpoint yet"
            remedy = "lower the learning rate or the gradient's limit"
            raise Ended(
                f"the weights are not finite after step {step}, which is not saved; {rest}: {remedy}", COLLAPSED
            )
        collapse_reason = self.guard.check(step, metrics, last)
        terminated = self.terminated.on_any_rank()
        ending = last or collapse_reason is not None or terminated
        score = metrics.get(self.trainer.best_metric) if self.trainer.best_metric else None
        sign = 1 if self.trainer.best_mode == "max" else -1
        better = score is not None and (self.best is None or sign * score > sign * self.best)
        if better:
            self.best = score
        if ending or better or (self.save_every > 0 and done % self.save_every == 0):
            self.save(done, score, ending)
        if collapse_reason is not None:
            saved = self.run_dir / f"global_step_{done}"
            here = "to export it all the same" if last else "to go on from here raise the limit, or set it to null, and"
            raise Ended(
                f"{collapse_reason}. Saved as {saved}. To go on from an earlier checkpoint delete the later ones; "
                f"{here} run the same command again",
                COLLAPSED,
            )
        if terminated and not last:
            message = f"SIGTERM after step {done} of {self.total}, which is saved: run the same command again to go on"
            raise Ended(message, TERMINATED)
