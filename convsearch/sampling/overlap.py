"""One step off-policy: while the policy learns from a step's samples, the sampler draws the next step's.

Step k gets samples of the weights of step k - 1 (the first step: of its own), which truncated importance sampling
corrects for (``algorithm.rollout_correction``). A resumed run draws its first step again, with the weights of the
checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from convsearch.sampling.base import Finished, Prompt, Sampler, WeightSource, collect
from convsearch.types import Completion

Request = tuple[tuple[Prompt, ...], int, int]  # prompts, n, seed


class OneStepAhead:
    """A sampler that runs another sampler beside the trainer.

    Args:
        request: what a step will ask for; None after the last step.
        first_step: number of the first step.
    """

    def __init__(self, sampler: Sampler, request: Callable[[int], Request | None], first_step: int):
        self.sampler, self.request, self.step = sampler, request, first_step
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[list[Finished]] | None = None

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[Completion]]:
        return collect(self.stream(prompts, n, seed), len(prompts))

    def stream(self, prompts: Sequence[Prompt], n: int, seed: int) -> Iterator[Finished]:
        """A step's own request gets the samples drawn ahead. Any other request waits until those are drawn."""
        if (tuple(prompts), n, seed) != self.request(self.step):
            self._wait()
            yield from self.sampler.stream(prompts, n, seed)
            return
        drawn = self._ahead.result() if self._ahead is not None else list(self.sampler.stream(prompts, n, seed))
        self.step += 1
        following = self.request(self.step)
        self._ahead = None if following is None else self._thread.submit(self._draw, following)
        yield from drawn

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Waits for the samples that are being drawn: all of them must come from the same weights."""
        self._wait()
        self.sampler.load_weights(source, version)

    def close(self) -> None:
        """Waits for the running draw: its thread must end before the workers do."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _draw(self, request: Request) -> list[Finished]:
        return list(self.sampler.stream(*request))

    def _wait(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()  # the step that asks for these samples raises it
