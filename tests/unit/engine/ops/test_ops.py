"""Every operation of the engine gives what autograd or another library gives; kernels: `tests/gpu/test_ops.py`."""

import pytest
import torch

from qlora_kit.engine.ops.registry import OPS
from tests.op_cases import CASES, outcome

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest entry


def test_every_operation_has_a_case():
    assert {name.partition(":")[0] for name in CASES} == set(OPS)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_autograds(name, dtype):
    case, op = CASES[name], OPS[name.partition(":")[0]]
    expected = outcome(case._replace(written=()), case.expected, case.arguments(dtype))
    found = outcome(case, op.reference, case.arguments(dtype))
    assert len(found) == len(expected)
    for one, exact in zip(found, expected, strict=True):
        assert one.shape == exact.shape
        most = max(ROUNDING[dtype], case.rounding) * float(exact.abs().max()) if exact.is_floating_point() else 0
        torch.testing.assert_close(one.double(), exact.double(), rtol=0, atol=most)
