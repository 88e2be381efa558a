"""Layers of bitsandbytes in 4 bit, quantized on the CPU, and what bitsandbytes itself makes of them."""

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_kit.model.load import disable_cpu_inference_packing

OUT, IN, TOKENS = 96, 320, 40  # 480 blocks of 64: the second nested block of 256 is not full
STEP = 2**-4  # largest relative error of rounding to four significant bits
SMALLEST = 2**-10  # half a step of the subnormal numbers of e4m3
STORAGES = [(kind, double) for kind in ("nf4", "fp4") for double in (False, True)]


def quantized(kind="nf4", double=True, rows=OUT, columns=IN, **settings):
    """A layer with outlier columns and rows, rows of zeros and one block of zeros."""
    torch.manual_seed(5)
    weight = torch.randn(rows, columns) * 0.02
    weight[:, 7] *= 30
    weight[3] *= 20
    weight[9] = 0
    weight[11, 64:128] = 0
    linear = bitsandbytes.nn.Linear4bit(
        columns, rows, False, torch.bfloat16, compress_statistics=double, quant_type=kind, **settings
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=linear, **settings
    )
    linear = linear.to("cpu")
    disable_cpu_inference_packing(linear)
    return linear


def reference(linear, dtype=torch.float32):
    """The weight by bitsandbytes, which rounds to the dtype in which the layer came."""
    state = linear.weight.quant_state
    assert state.dtype is torch.float32
    return dequantize_4bit(linear.weight.data, state).to(dtype)


def inputs(width, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, width)
    x[:, 5] *= 50  # a channel of outliers, as in the inputs of down_proj
    x[3] = 0
    return x.bfloat16()


def error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()
