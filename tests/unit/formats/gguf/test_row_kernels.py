"""The row kernels: the same bytes from both wheels, and an error where llama.cpp would end the process."""

import ctypes
import importlib.util
from types import SimpleNamespace

import libgguf
import numpy as np
import pytest

from qlora_kit.formats.gguf import row_kernels
from qlora_kit.formats.gguf.row_kernels import quantized

ROWS = np.random.default_rng(0).standard_normal((12, 512)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).gamma(0.5, size=512).astype(np.float32) + np.float32(1e-3)


libgguf_quantize_rows = libgguf.quantize_rows


def libgguf_blocks(rows, kind, weights=None):
    return libgguf_quantize_rows(rows, int(libgguf.GGMLQuantizationType[kind]), imatrix=weights)


@pytest.fixture
def asked(monkeypatch):
    """Types that libgguf was asked for."""
    kinds = []
    monkeypatch.setattr(libgguf, "quantize_rows", spied(kinds, libgguf.quantize_rows))
    return kinds


def spied(kinds, quantize_rows):
    def call(rows, kind, imatrix=None):
        kinds.append(libgguf.GGMLQuantizationType(kind).name)
        return quantize_rows(rows, kind, imatrix=imatrix)

    return call


@pytest.fixture(autouse=True)
def fresh():
    """No kernel is remembered from one test to the next."""
    row_kernels._chunk_kernel.cache_clear()
    yield
    row_kernels._chunk_kernel.cache_clear()


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q4_1", "IQ4_XS"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_blocks_are_those_of_libgguf(kind, weights):
    assert np.array_equal(quantized(ROWS, kind, weights), libgguf_blocks(ROWS, kind, weights))


def test_the_faster_kernel_is_taken(asked):
    for kind in ("Q6_K", "Q5_K", "IQ4_NL", "IQ4_XS"):
        quantized(ROWS, kind)
    assert asked == ["Q4_K", "IQ4_NL", "IQ4_XS"]  # the first is the trial


def test_rows_that_do_not_lie_together(asked):
    every_other = ROWS[::2]
    assert np.array_equal(quantized(every_other, "Q4_K"), quantized(every_other.copy(), "Q4_K"))


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None), SimpleNamespace(origin="/no/such/library.so")])
def test_without_the_wheel_libgguf_serves(monkeypatch, asked, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert np.array_equal(quantized(ROWS, "Q6_K"), libgguf_blocks(ROWS, "Q6_K"))
    assert asked == ["Q6_K"]


def of_another_size(number, rows, blocks, first, count, width, weights):
    return 1


def of_other_blocks(number, rows, blocks, first, count, width, weights):
    size = count * libgguf.row_size(number, width)
    ctypes.memset(blocks, 0, size)
    return size


@pytest.mark.parametrize(
    "exports", [{}, {"ggml_quantize_chunk": of_another_size}, {"ggml_quantize_chunk": of_other_blocks}]
)
def test_a_library_that_does_other_than_it_should_is_not_taken(monkeypatch, asked, exports):
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(**exports))
    assert np.array_equal(quantized(ROWS, "Q6_K"), libgguf_blocks(ROWS, "Q6_K"))
    assert asked[-1] == "Q6_K"


@pytest.mark.slow
def test_what_would_end_the_process_goes_to_libgguf(asked):
    quantized(ROWS[:1], "IQ2_XS")  # needs weights
    assert asked[-1] == "IQ2_XS"
    with pytest.raises(ValueError, match="imatrix length"):
        quantized(ROWS, "Q4_K", WEIGHTS[:256])
