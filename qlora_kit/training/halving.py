"""Goes on where a micro-batch does not fit into memory: its step is computed again in halves, with the same loss.

The loss of a micro-batch is a sum over its tokens by the number of all that the step trains, so that halves add up to
it. The rows of a step, their order and what the optimizer sees stay as they were.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qlora_kit.core.console.lines import log
from qlora_kit.objectives.sft.collate import in_halves

NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN's, whose other shortages are not told from it
)

Batch = Mapping[str, Any]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


class Halving:
    """The micro-batches of a step, in as many parts each as memory asks for.

    Attributes:
        times: how often a micro-batch is halved, from the first step on that ran out of memory.
    """

    def __init__(self) -> None:
        self.times = self._times_held_out = 0
        self._of_step: list[Batch] = []

    def run(
        self, batch: Batch, compute: Callable[[dict[str, Any]], torch.Tensor], begin_anew: Callable[[], None], step: int
    ) -> torch.Tensor:
        """The loss of a micro-batch, with its gradients added to those of the step.

        Args:
            compute: the loss of a batch, after it went backward.
            begin_anew: lets go of the step's gradients.
            step: that is computed, for the line that tells it.
        Raises:
            RuntimeError: memory runs out for a single row.
        """
        self._of_step.append(batch)
        try:
            return self._in_parts(batch, compute)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = error.with_traceback(None)
        said = str(failed).partition("\n")[0]
        while True:  # outside of the handler, which holds what the failed pass had made
            begin_anew()
            _let_go()
            if self._is_finest():
                raise failed
            self.times += 1
            try:
                losses = [self._in_parts(one, compute) for one in self._of_step]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)
                continue
            log.warning(
                f"step {step} ran out of memory ({said}): each batch is computed in {1 << self.times} parts from here "
                "on, with the same rows in a step and, where nothing is dropped out, the same loss"
            )
            return losses[-1]

    def summed(self, batch: Batch, compute: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
        """The sum over the parts of a held-out batch, from which nothing goes backward.

        Args:
            compute: of a batch, what adds up to that of a larger one.
        Raises:
            RuntimeError: memory runs out for a single row.
        """
        while True:
            parts = list(_parts(batch, max(self.times, self._times_held_out)))
            try:
                return torch.stack([compute(dict(part)) for part in parts]).sum(dim=0)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)
            _let_go()
            if all(in_halves(part) is None for part in parts):
                raise failed
            self._times_held_out = max(self.times, self._times_held_out) + 1
            said = str(failed).partition("\n")[0]
            log.warning(
                f"a held-out batch ran out of memory ({said}): each is scored in {1 << self._times_held_out} parts "
                "from here on"
            )

    @property
    def is_between_steps(self) -> bool:
        """Whether the next micro-batch is the first of its step."""
        return not self._of_step

    def end_step(self) -> None:
        """The step's gradients are whole."""
        self._of_step.clear()

    def _in_parts(self, batch: Batch, compute: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
        losses = [compute(dict(part)) for part in _parts(batch, self.times)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _is_finest(self) -> bool:
        """Whether halving once more would change nothing."""
        return all(in_halves(part) is None for one in self._of_step for part in _parts(one, self.times))


def _parts(batch: Batch, times: int) -> Iterator[Batch]:
    halves = in_halves(batch) if times else None
    if halves is None:
        yield batch
        return
    for half in halves:
        yield from _parts(half, times - 1)


def _let_go() -> None:
    """Of what the failed pass held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
