"""Whether there is memory for recordings, and beside them."""

from typing import NamedTuple

import torch

from qlora_kit.core.units import human_bytes
from qlora_kit.engine.ops.limits import RECORDED_SPARE

LEFT_FREE = 250_000_000  # bytes, whatever is recorded: for what comes between steps, such as checkpoints


class Beside(NamedTuple):
    """Bytes that a step takes beside recordings, which share their memory with nothing else.

    Attributes:
        head: of the output head.
        layer: of a layer that is started kernel by kernel, in full or in part.
    """

    head: float = 0.0
    layer: float = 0.0


class RecordingRoom:
    """The device's memory, as the recordings of a model need it.

    Batches are measured in values of their hidden states.

    Attributes:
        own: bytes that a recording was seen to take at the most beside torch's memory: its list of kernels.
    """

    def __init__(self) -> None:
        self.own = 0
        self._taken = 0  # beside torch's memory, before the last recording
        self._needed, self._most = 0, 1  # bytes of the largest step before the first recording, and its batch

    def note_unrecorded(self, values: int) -> None:
        """A batch runs while there is no recording."""
        self._most = max(self._most, values)

    def lacks(self, beside: float) -> str:
        """Why the first recording of all has no room; "" where it has.

        Args:
            beside: bytes of what is not recorded.
        """
        torch.cuda.empty_cache()
        needed = self._needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0]
        if free >= RECORDED_SPARE * needed + beside:
            return ""
        taken = f"a step takes {human_bytes(needed)}, what is not recorded {human_bytes(beside)}"
        return f"{taken}, and {human_bytes(free)} are free"

    def holds(self, values: int, head: float) -> bool:
        """Whether a batch has memory of its own beside recordings, its output head included."""
        return _has_free(RECORDED_SPARE * self._needed * values / self._most + head)

    def holds_one_more(self) -> bool:
        """Whether one more recording of a known size, beside torch's memory, leaves some free."""
        return _has_free(2 * self.own + LEFT_FREE)

    def begin_recording(self) -> None:
        """A recording is about to be made."""
        self._taken = _beside_torch()

    def end_recording(self) -> None:
        """It is made."""
        self.own = max(self.own, _beside_torch() - self._taken)


def _has_free(needed: float) -> bool:
    """Whether so many bytes are free, once torch gives back what it does not use."""
    if torch.cuda.mem_get_info()[0] < needed:
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] >= needed


def _beside_torch() -> int:
    """Bytes of the device that are in use and not torch's: by CUDA, kernels and recordings, and by other processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
