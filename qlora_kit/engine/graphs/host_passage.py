"""Brings the inputs of recorded layers to the host and back, beside other layers that run."""

from typing import Optional

import torch
from torch import Tensor

from qlora_kit.engine.graphs.hidden_places import HiddenPlaces
from qlora_kit.engine.graphs.host_memory import HostCopy


class HostPassage:
    """Where layers read and write whose inputs lie on the host between their passes.

    They read in two places in turn: while one layer reads in the one, the next one's input comes to the other.

    Attributes:
        output: hidden states after a layer, until they are copied for the next one.
    """

    def __init__(self, like: Tensor, places: HiddenPlaces) -> None:
        self.output, *self._starts = (places.at(("passage", number), like) for number in range(3))
        self._places = places
        self._stream = places.copies
        self._lies: list[HostInput | None] = [None, None]
        self._last: HostInput | None = None
        self._count = 0

    def fits(self, h: Tensor) -> bool:
        """Whether hidden states have the shape of its places."""
        return self.output.shape == h.shape and self.output.dtype == h.dtype

    def add(self) -> "HostInput":
        """The next layer's input; layers are added in their order."""
        place = self._count % len(self._starts)
        on_host = self._places.on_host(self._count, self._starts[place])
        self._last = HostInput(self, place, self._starts[place], on_host, self._last)
        self._count += 1
        return self._last

    def lies_at(self, place: int) -> Optional["HostInput"]:
        """Whose input is there, or is on its way."""
        return self._lies[place]

    def copy(self, which: "HostInput", *, to_host: bool) -> None:
        """Copy an input, once all that was started until now is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            which.on_host.store(which.start) if to_host else which.on_host.fetch(which.start)
        self._lies[which.place] = which

    def finish_copies(self) -> None:
        """What is started from now on waits for them."""
        torch.cuda.current_stream().wait_stream(self._stream)


class HostInput:
    """The input of one layer.

    Attributes:
        start: where the layer reads it.
        place: which of the two places that is.
        on_host: where it is kept.
    """

    def __init__(
        self, passage: HostPassage, place: int, start: Tensor, on_host: HostCopy, before: Optional["HostInput"]
    ) -> None:
        self._passage, self._before = passage, before
        self.place, self.start, self.on_host = place, start, on_host

    @property
    def output(self) -> Tensor:
        """Where the layer writes."""
        return self._passage.output

    def take(self, h: Tensor) -> None:
        """Have it in its place, and bring it to the host."""
        self._passage.finish_copies()  # of what lay there
        self.start.copy_(h)
        self._passage.copy(self, to_host=True)

    def bring_back(self) -> None:
        """Have it in its place again, and that of the layer before on its way to the other place."""
        if self._passage.lies_at(self.place) is not self:
            self._passage.copy(self, to_host=False)
        self._passage.finish_copies()
        if self._before is not None and self._passage.lies_at(self._before.place) is not self._before:
            self._passage.copy(self._before, to_host=False)
