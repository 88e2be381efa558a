"""Random tensors of a seed, and comparison within the rounding of their dtype."""

import torch

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest entry; measured: 5e-7 and 8e-3


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected):
    assert found.dtype is expected.dtype
    atol = CLOSE[found.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
