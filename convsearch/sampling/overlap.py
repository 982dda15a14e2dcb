"""One step off-policy: while the policy learns from a step's samples, the sampler already draws the next one's.

Step k gets samples of the weights of step k - 1 (k of the first one), which truncated importance sampling corrects for
(``algorithm.rollout_correction``). A run that is resumed draws its first step anew, by the weights of the checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from convsearch.sampling.hf import Finished, Sampler, WeightSource, collect
from convsearch.types import Completion

Request = tuple[tuple[tuple[int, ...], ...], int, int]  # prompts, n, seed


class OneStepAhead:
    """A sampler around another one that runs beside the trainer.

    Args:
        request: what a step will ask for; None past the last one.
        first_step: the step that comes first.
    """

    def __init__(self, sampler: Sampler, request: Callable[[int], Request | None], first_step: int):
        self.sampler, self.request, self.step = sampler, request, first_step
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[list[Finished]] | None = None

    def generate(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> list[Completion]:
        return collect(self.stream(prompts, n, seed), len(prompts), n)

    def stream(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> Iterator[Finished]:
        """A step's own request is answered by what was drawn ahead; anything else (a validation, a second draw) has to wait for that."""
        if (tuple(prompts), n, seed) != self.request(self.step):
            self._wait()
            yield from self.sampler.stream(prompts, n, seed)
            return
        parts = self._ahead.result() if self._ahead is not None else list(self.sampler.stream(prompts, n, seed))
        self.step += 1
        following = self.request(self.step)
        self._ahead = None if following is None else self._thread.submit(self._draw, following)
        yield from parts

    def load_weights(self, source: WeightSource, version: int) -> None:
        """After the samples that are under way: they all come from the weights they began with."""
        self._wait()
        self.sampler.load_weights(source, version)

    def close(self) -> None:
        """Waits for what is under way: its thread must not outlive the workers that it talks to."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _draw(self, request: Request) -> list[Finished]:
        return list(self.sampler.stream(*request))

    def _wait(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()  # which the step that asks for these samples will see
