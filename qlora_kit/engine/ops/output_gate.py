"""What attention gives, multiplied by the sigmoid of a gate; torch compiles the kernels."""

import torch
from torch import Tensor

from qlora_kit.engine.ops.op import compiled


def _output_gate(x: Tensor, gate: Tensor) -> Tensor:
    """`x * sigmoid(gate)`, each `[T, width]`."""
    return x * torch.sigmoid(gate)


def _output_gate_backward(x: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gate from that of the product, each `[T, width]`."""
    opened = torch.sigmoid(gate.float())
    wide = grad.float()
    of_gate = wide * x.float() * opened * (1.0 - opened)
    return (wide * opened).to(x.dtype), of_gate.to(gate.dtype)


output_gate = compiled(_output_gate)
output_gate_backward = compiled(_output_gate_backward)
