"""Where recorded layers read and write hidden states: one memory for recordings of any number of tokens."""

from collections.abc import Hashable

import torch
from torch import Tensor

from qlora_kit.engine.graphs.host_memory import HostCopy


class HiddenPlaces:
    """Memory by name, as large as the largest batch needs; a recording of fewer tokens uses the begin of it.

    Recordings hold addresses. Those of a place that was outgrown hold on to it.

    Attributes:
        copies: the stream of copies to the host and back, one for all recordings, since they share that memory too.
    """

    def __init__(self, values: int = 0) -> None:
        """values: of the largest batch's hidden states, where that is known."""
        self._values = values
        self.copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._on_device: dict[Hashable, Tensor] = {}
        self._on_host: dict[Hashable, HostCopy] = {}

    def at(self, name: Hashable, like: Tensor) -> Tensor:
        """A place in the shape of hidden states, dense."""
        return self._at(name, like, max(self._values, like.numel()))

    def of_setting(self, number: int, like: Tensor) -> Tensor:
        """A place in the shape of what the model hands to layers, which may be large as well: masks are."""
        return self._at(("setting", number), like, like.numel())

    def _at(self, name: Hashable, like: Tensor, values: int) -> Tensor:
        flat = self._on_device.get(name)
        if flat is None or flat.numel() < like.numel() or flat.dtype != like.dtype:
            flat = self._on_device[name] = torch.empty(values, dtype=like.dtype, device=like.device)
        return flat[: like.numel()].view(like.shape)

    def on_host(self, name: Hashable, like: Tensor) -> HostCopy:
        """Room for hidden states on the host."""
        known = self._on_host.get(name)
        if known is None or not known.fits(like):
            known = HostCopy([max(self._values, like.numel())], like.dtype, like.device)
            self._on_host[name] = known
        return known
