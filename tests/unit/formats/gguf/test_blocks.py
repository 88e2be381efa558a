"""Block bytes against llama.cpp's own kernels."""

import ctypes
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.core.errors import RunError
from qlora_kit.formats.gguf.blocks import converted
from qlora_kit.formats.gguf.tensors import PlannedTensor
from qlora_kit.weights.float_rows import find_tensors

PLAIN = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "IQ3_S"]
FITTED = [*PLAIN[1:], "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]


def llama_cpp_kernel() -> Any:
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library.ggml_quantize_chunk


def assert_same_blocks(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> None:
    number = int(gguf.GGMLQuantizationType[kind])
    found = libgguf.quantize_rows(rows, number, imatrix=importance)
    expected = np.empty_like(found)
    weights = None if importance is None else importance.ctypes.data
    llama_cpp_kernel()(number, rows.ctypes.data, expected.ctypes.data, 0, *rows.shape, weights)
    assert np.array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_blocks_are_those_of_llama_cpp(kind: str) -> None:
    assert_same_blocks(kind, np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32), None)


@pytest.mark.slow  # the tables of the codebook types take seconds to build
@pytest.mark.parametrize("kind", FITTED)
def test_fitted_blocks_are_those_of_llama_cpp(kind: str) -> None:
    draws = np.random.default_rng(0)
    rows = draws.standard_normal((8, 512)).astype(np.float32)
    assert_same_blocks(kind, rows, draws.gamma(0.5, size=512).astype(np.float32) + np.float32(1e-3))


def planned(values: torch.Tensor, folder: Path, kind: str) -> PlannedTensor:
    save_file({"w": values}, folder / "model.safetensors")
    return PlannedTensor("w", kind, find_tensors(folder)["w"])


def test_every_bfloat16_becomes_the_half_that_torch_makes_of_it(tmp_path: Path) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    fitting = every[every.isfinite() & (every.abs() < 65520)].reshape(1, -1)
    found = converted(planned(fitting, tmp_path, "F16"), 0, 1)
    assert found.tobytes() == fitting.to(torch.float16).numpy().tobytes()


@pytest.mark.parametrize(
    ("stored", "kind"), [(torch.float32, "BF16"), (torch.bfloat16, "BF16"), (torch.float16, "F16")]
)
def test_16_bit_rows_are_kept_or_rounded_to_nearest(tmp_path: Path, stored: torch.dtype, kind: str) -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(stored)
    wanted = torch.bfloat16 if kind == "BF16" else torch.float16
    found = converted(planned(values, tmp_path, kind), 1, 4)
    assert found.tobytes() == values[1:4].to(wanted).view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    ("stored", "kind"), [(torch.bfloat16, "BF16"), (torch.bfloat16, "F16"), (torch.float16, "F16")]
)
@pytest.mark.parametrize("heads", [0, 4])
def test_memory_that_is_used_again_changes_nothing(tmp_path: Path, stored: torch.dtype, kind: str, heads: int) -> None:
    draws = torch.Generator().manual_seed(0)
    tensor = planned((torch.randn(16, 64, generator=draws) * 1e-4).to(stored), tmp_path, kind)
    tensor = replace(tensor, rotated_heads=heads)
    whole, room = converted(tensor, 0, 16).tobytes(), np.empty((2, 5 * 64), np.uint16)
    parts = [converted(tensor, start, min(start + 5, 16), room).tobytes() for start in range(0, 16, 5)]
    assert b"".join(parts) == whole


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (-1e5, "F16", "too large for 16-bit"),
        (float("-inf"), "BF16", "not finite"),
        (1e5, "F16", "too large for 16-bit"),
        (float("inf"), "F16", "not finite"),
        (float("nan"), "BF16", "not finite"),
        (float("nan"), "Q4_0", "not finite"),
    ],
)
def test_bad_bfloat16_weights_are_named(tmp_path: Path, value: float, kind: str, message: str) -> None:
    values = torch.zeros(2, 64, dtype=torch.bfloat16)
    values[1, 3] = value
    with pytest.raises(RunError, match=message):
        converted(planned(values, tmp_path, kind), 0, 2)
