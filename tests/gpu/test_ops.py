"""Every kernel of the engine gives what its reference gives, on a GPU.

With TRITON_INTERPRET=1 most kernels of triton are tried on the CPU, in float32. Its products in bfloat16 are
wrong; it knows no fp8, no masks that come out of tuples, and nothing of the device's library, for which others
stand in.
"""

import os

import pytest
import torch

from qlora_kit.engine.ops.compiled import run_compiled
from qlora_kit.engine.ops.jit import libdevice, tl
from qlora_kit.engine.ops.registry import OPS
from tests.op_cases import CASES, PART_OF_HEADS, moved, outcome

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1" and tl is not None
NEEDS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytestmark = [] if INTERPRETS else NEEDS

DEVICE = "cpu" if INTERPRETS else "cuda"
DTYPES = [torch.float32] if INTERPRETS else [torch.float32, torch.bfloat16]
NOT_INTERPRETED = ("unpack_transposed", "quantize_rows", "reduce_partials", "split_k_matmul")
# Share of the largest entry: sums in another order in float32, and one rounding to 8 bits more in bfloat16.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
SAME_BITS = ("unpack", "unpack_transposed", "quantize_rows")


def is_interpreted(name):
    op = OPS[name.partition(":")[0]]
    is_compiled_by_torch = getattr(op.kernel, "func", None) is run_compiled
    return not (is_compiled_by_torch or op.name in NOT_INTERPRETED or name == PART_OF_HEADS or name.endswith("to fp8"))


TRIED = [
    (name, dtype)
    for name, case in CASES.items()
    for dtype in case.of_kernel
    if dtype in DTYPES and (not INTERPRETS or is_interpreted(name))
]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def library_for_the_interpreter(monkeypatch):
    if INTERPRETS:
        monkeypatch.setattr(libdevice, "fast_expf", lambda x: tl.exp(x))
        monkeypatch.setattr(libdevice, "fast_dividef", lambda x, y: x / y)


@pytest.mark.parametrize(("name", "dtype"), TRIED)
def test_the_kernel_is_the_reference(name, dtype):
    case, op = CASES[name], OPS[name.partition(":")[0]]
    arguments = moved(case.arguments(dtype), DEVICE)
    assert INTERPRETS or op.supported(*arguments)
    found = outcome(case, op.kernel, arguments)
    expected = outcome(case, op.reference, case.arguments(dtype))
    assert len(found) == len(expected)
    for one, exact in zip(found, expected, strict=True):
        assert one.dtype is exact.dtype and one.shape == exact.shape
        most = 0.0 if op.name in SAME_BITS or not exact.is_floating_point() else ROUNDING[dtype]
        one, exact = one.cpu().double(), exact.double()
        torch.testing.assert_close(one, exact, rtol=0, atol=most * float(exact.abs().max()))
