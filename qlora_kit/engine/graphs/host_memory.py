"""Keeps what a backward pass needs in the host's memory, in pieces that waste none of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE_BYTES = 1 << 26


class HostCopy:
    """Room in the host's memory for a tensor on a device; see `SavedOnHost`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = torch.Size(shape), dtype, device
        values, most = self._shape.numel(), PIECE_BYTES // dtype.itemsize
        lengths = [min(most, values - start) for start in range(0, values, most)]
        self.pieces = [torch.empty(length, dtype=dtype, pin_memory=device.type == "cuda") for length in lengths]

    def fits(self, tensor: Tensor) -> bool:
        """Whether there is room for a tensor."""
        return tensor.dtype == self._dtype and tensor.numel() <= self._shape.numel()

    def store(self, tensor: Tensor) -> None:
        """Copy the tensor, or a smaller one, to the host."""
        for piece, part in zip(self.pieces, self._split(tensor.detach().reshape(-1)), strict=False):
            piece[: len(part)].copy_(part, non_blocking=True)

    def fetch(self, place: Tensor | None = None) -> Tensor:
        """The tensor on its device again: in this place, which is contiguous, or in new memory, in full."""
        found = torch.empty(self._shape, dtype=self._dtype, device=self._device) if place is None else place
        for part, piece in zip(self._split(found.detach().view(-1)), self.pieces, strict=False):
            part.copy_(piece[: len(part)], non_blocking=True)
        return found

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, PIECE_BYTES // self._dtype.itemsize)


class SavedOnHost(saved_tensors_hooks):
    """As torch's `save_on_cpu` with pinned memory, for tensors of any size.

    torch 2.11 takes pinned memory in powers of two, so that a tensor of 5 GB would take 8 (c10's
    `HostAllocator`). Nothing waits: the copies are queued among the kernels of the stream that runs.
    """

    def __init__(self) -> None:
        super().__init__(_store, HostCopy.fetch)


def _store(tensor: Tensor) -> HostCopy:
    stored = HostCopy(tensor.shape, tensor.dtype, tensor.device)
    stored.store(tensor)
    return stored
