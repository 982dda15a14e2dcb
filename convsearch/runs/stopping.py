"""Around the steps of either trainer: when to save, and how a run ends before its last step.

A run that the guard stops, or that SIGTERM reaches (a Slurm preemption, a time limit), saves at the end of the running step and ends with a status of
its own, so that a script does not go on to the next stage with half a model: 3 for the guard, 143 for SIGTERM. Run again, it goes on where it
stopped. A second SIGTERM ends it at once.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from convsearch.cli import Ended
from convsearch.config.base import TrainerSection
from convsearch.config.guard import GuardConfig
from convsearch.model import distributed
from convsearch.runs import checkpoint
from convsearch.runs.collapse import Guard
from convsearch.runs.tracking import read_metrics

COLLAPSED, TERMINATED = 3, 128 + signal.SIGTERM


def sweep(run_dir: Path) -> None:
    """Removes what a killed process has left half-written."""
    for path in (*run_dir.glob("*.tmp-[0-9]*"), *(run_dir / "rollouts").glob("*.tmp-[0-9]*")):
        path.unlink(missing_ok=True)
    for folder in run_dir.glob(".tmp-global_step_*"):
        shutil.rmtree(folder, ignore_errors=True)


class Terminated:
    """Notes the first SIGTERM; a second one ends the process. Entered in the main thread.

    Slurm signals every process of a job step and torchrun passes on what it gets, so that one wish arrives twice: signals within ``SAME_S``
    of the first are the first.
    """

    SAME_S = 2.0

    def __init__(self) -> None:
        self.heard, self.heard_at = False, 0.0
        self.before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.heard and time.monotonic() - self.heard_at > self.SAME_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if self.heard:
            return
        self.heard, self.heard_at = True, time.monotonic()
        if distributed.rank() == 0:
            sys.stderr.write("\nSIGTERM: saving at the end of this step; a second one ends the run at once\n")

    def on_any_rank(self) -> bool:
        """A collective call: the ranks hear a signal at different moments, and must stop at one step."""
        return distributed.sum_over_ranks({"heard": float(self.heard)})["heard"] > 0


class Lifeline:
    """Saves where it is due and ends the run where it has to; used as a context around the steps.

    Args:
        save: ``save(done, score, last)`` writes the checkpoint after ``done`` steps; ``score`` is the validation's figure by which the best one is
            kept, where there is one; ``last`` says that nothing follows, so that it has to be whole when the call returns.
        save_every: steps between checkpoints; 0: at the end alone.
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
        self.run_dir, self.trainer, self.total, self.save_every, self.save = (
            run_dir,
            trainer,
            steps.stop,
            save_every,
            save,
        )
        self.best = checkpoint.best_score(run_dir, trainer.best_metric, trainer.best_mode)
        history = [record for record in read_metrics(run_dir) if record["step"] < steps.start]
        self.guard = Guard(limits, trainer.max_skipped_steps, history)
        self.terminated = Terminated()
        if distributed.rank() == 0:
            sweep(run_dir)

    def __enter__(self) -> Self:
        self.terminated.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminated.__exit__(kind, error, trace)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """To be called once the metrics of ``step`` (from 0) are logged.

        Raises:
            Ended: the guard has seen a collapse, or SIGTERM has come; a checkpoint of this step is on disk.
        """
        done, last = step + 1, step + 1 == self.total
        trouble = self.guard.check(step, metrics)
        told = self.terminated.on_any_rank()
        ending = last or trouble is not None or told
        score = metrics.get(self.trainer.best_metric) if self.trainer.best_metric else None
        better = score is not None and (
            self.best is None or (score > self.best if self.trainer.best_mode == "max" else score < self.best)
        )
        if better:
            self.best = score
        if ending or better or (self.save_every > 0 and done % self.save_every == 0):
            self.save(done, score, ending)
        if last:
            return
        if trouble is not None:
            raise Ended(
                f"{trouble}. Saved as {self.run_dir / f'global_step_{done}'}. To go on from an earlier checkpoint delete the later ones; "
                "to go on from here raise the limit, or set it to null, and run the same command again",
                COLLAPSED,
            )
        if told:
            raise Ended(
                f"SIGTERM after step {done} of {self.total}, which is saved: run the same command again to go on",
                TERMINATED,
            )
