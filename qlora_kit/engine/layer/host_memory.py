"""Keeps what a backward pass needs in the host's memory, in pieces that waste none of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE_BYTES = 1 << 26


class Stored(NamedTuple):
    """A tensor in the host's memory; see `SavedOnHost`."""

    pieces: list[Tensor]
    shape: torch.Size
    device: torch.device


class SavedOnHost(saved_tensors_hooks):
    """As torch's `save_on_cpu` with pinned memory, for tensors of any size.

    torch 2.11 takes pinned memory in powers of two, so that a tensor of 5 GB would take 8 (c10's
    `HostAllocator`). Nothing waits: the copies are queued among the kernels of the stream that runs.
    """

    def __init__(self) -> None:
        super().__init__(_store, _fetch)


def _store(tensor: Tensor) -> Stored:
    flat = tensor.detach().reshape(-1)
    pieces = []
    for part in torch.split(flat, PIECE_BYTES // tensor.element_size()):
        piece = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        pieces.append(piece.copy_(part, non_blocking=True))
    return Stored(pieces, tensor.shape, tensor.device)


def _fetch(stored: Stored) -> Tensor:
    dtype = stored.pieces[0].dtype
    found = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    for place, piece in zip(torch.split(found.view(-1), PIECE_BYTES // dtype.itemsize), stored.pieces, strict=True):
        place.copy_(piece, non_blocking=True)
    return found
