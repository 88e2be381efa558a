"""What is kept in the host's memory comes back as it was, in pieces of a power of two."""

import pytest
import torch

from qlora_kit.engine.graphs import host_memory
from qlora_kit.engine.graphs.host_memory import SavedOnHost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 7, 5), (64,), (), (0, 4)])
def test_a_tensor_comes_back_from_its_pieces(monkeypatch, dtype, shape):
    monkeypatch.setattr(host_memory, "PIECE_BYTES", 64)
    tensor = (100 * torch.randn(shape)).to(dtype)
    saved = SavedOnHost()
    stored = saved.pack_hook(tensor)
    assert all(piece.nbytes == 64 for piece in stored.pieces[:-1])
    found = saved.unpack_hook(stored)
    assert torch.equal(found, tensor) and found.dtype is dtype and found.shape == tensor.shape


def test_columns_apart_are_stored_densely(monkeypatch):
    monkeypatch.setattr(host_memory, "PIECE_BYTES", 64)
    tensor = torch.randn(6, 20)[:, 3:11]
    saved = SavedOnHost()
    stored = saved.pack_hook(tensor)
    assert sum(piece.nbytes for piece in stored.pieces) == tensor.nbytes
    assert torch.equal(saved.unpack_hook(stored), tensor)


def test_gradients_are_those_of_tensors_that_stayed(monkeypatch):
    monkeypatch.setattr(host_memory, "PIECE_BYTES", 64)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    expected = torch.autograd.grad((x @ weight).tanh().sum(), [x, weight])
    with SavedOnHost():
        loss = (x @ weight).tanh().sum()
    for found, wanted in zip(torch.autograd.grad(loss, [x, weight]), expected, strict=True):
        assert torch.equal(found, wanted)
