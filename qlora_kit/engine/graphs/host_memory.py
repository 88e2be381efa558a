"""Keeps what a backward pass needs in the host's memory, in pieces that waste none of it."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE_BYTES = 1 << 26


class HostCopy:
    """Room in the host's memory for a tensor on a device; see `SavedOnHost`."""

    def __init__(self, like: Tensor) -> None:
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device
        lengths = [len(piece) for piece in self._split(like.detach().reshape(-1))]
        self.pieces = [torch.empty(length, dtype=self._dtype, pin_memory=like.is_cuda) for length in lengths]

    def store(self, tensor: Tensor) -> None:
        """Copy the tensor to the host."""
        for piece, part in zip(self.pieces, self._split(tensor.detach().reshape(-1)), strict=True):
            piece.copy_(part, non_blocking=True)

    def fetch(self, place: Tensor | None = None) -> Tensor:
        """The tensor on its device again: in this place, which is contiguous, or in new memory."""
        found = torch.empty(self._shape, dtype=self._dtype, device=self._device) if place is None else place
        for part, piece in zip(self._split(found.detach().view(-1)), self.pieces, strict=True):
            part.copy_(piece, non_blocking=True)
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
    stored = HostCopy(tensor)
    stored.store(tensor)
    return stored
