"""Block bytes against llama.cpp's own kernels."""

import ctypes
import importlib.util
from typing import Any

import gguf
import libgguf
import numpy as np
import pytest

KINDS = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0"]


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


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_llama_cpp(kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    found = libgguf.quantize_rows(rows, int(number))
    expected = np.empty_like(found)
    llama_cpp_kernel()(int(number), rows.ctypes.data, expected.ctypes.data, 0, 64, 512, None)
    assert np.array_equal(found, expected)
