"""Rows read from a file are those of torch, in any order, into memory that is used again; a short file is named."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.weights.float_rows import find_tensors, read_float_rows, read_picked_rows, read_stored_rows

VALUES = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored(tmp_path):
    def make(dtype):
        save_file({"a": torch.ones(3), "w": VALUES.to(dtype)}, tmp_path / "model.safetensors")
        return find_tensors(tmp_path)["w"]

    return make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_widened_or_narrowed_to_float32(stored, dtype):
    found = read_float_rows(stored(dtype), 2, 7)
    assert found.dtype == np.float32
    assert np.array_equal(found, VALUES.to(dtype)[2:7].float().numpy())
    picked = np.array([5, 3, 8, 3])
    assert np.array_equal(read_picked_rows(stored(dtype), picked), VALUES.to(dtype)[picked].float().numpy())


def test_stored_bits_in_memory_that_is_used_again(stored):
    tensor, bits = stored(torch.bfloat16), VALUES.bfloat16().view(torch.uint16).numpy()
    room = np.empty(100, np.uint16)
    first = read_stored_rows(tensor, slice(0, 4), room)
    assert np.shares_memory(first, room) and np.array_equal(first, bits[:4])
    assert np.array_equal(read_stored_rows(tensor, slice(6, 9), room), bits[6:9])
    assert np.array_equal(read_stored_rows(tensor, np.array([7, 2, 4])), bits[[7, 2, 4]])


def test_a_file_that_became_shorter_is_named(stored):
    tensor = stored(torch.float32)
    tensor.file.write_bytes(tensor.file.read_bytes()[:-40])
    with pytest.raises(RunError, match=r"model\.safetensors ends before its last tensor") as caught:
        read_float_rows(tensor, 0, 9)
    assert caught.value.problems[0].fix == "fetch or copy this file again"


def test_weights_in_other_formats_are_named(tmp_path):
    save_file({"w": VALUES.to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match="'w' as I8") as caught:
        find_tensors(tmp_path)
    assert "convert that folder" in caught.value.problems[0].fix
