"""Experts that a checkpoint holds in MXFP4, read as the 16-bit weights that they stand for.

Format (OCP Microscaling Formats 1.0, as published checkpoints of gpt-oss have it): 32 values share an exponent, an
unsigned byte less 127; a value is 4 bits, sign, two bits of exponent and one of fraction; the first of two lies in the
low half of a byte. `<name>_blocks` is uint8 [experts, outputs, groups, 16], `<name>_scales` uint8 [experts, outputs,
groups]; the model holds [experts, inputs, outputs].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.weights.headers import StoredTensor, read_headers

if TYPE_CHECKING:
    from torch import Tensor

STORED_AS = "mxfp4"  # by config.json
BLOCKS, SCALES = "_blocks", "_scales"
BIAS = 127  # of an exponent
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # values that share an exponent
_AXES = 4  # of the packed values


@dataclass(frozen=True)
class MicroscaledTensor(StoredTensor):
    """A weight [experts, inputs, outputs] that is stored in two tensors; its place and name are those of the values."""

    blocks: StoredTensor
    scales: StoredTensor

    def read(self, start: int, stop: int) -> "Tensor":
        """Experts start..stop in bfloat16, [stop - start, inputs * outputs]."""
        import torch

        from qlora_kit.weights.torch_rows import read_rows

        experts, inputs, outputs = stop - start, self.shape[1], self.shape[2]
        codes = read_rows(self.blocks, start, stop).view(experts, outputs, inputs // 2)
        exponents = read_rows(self.scales, start, stop).view(experts, outputs, inputs // _GROUP, 1).int() - BIAS
        table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16)
        pairs = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), dim=-1)
        values = torch.ldexp(pairs.view(experts, outputs, -1, _GROUP), exponents).view(experts, outputs, inputs)
        return values.transpose(1, 2).reshape(experts, -1)


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every weight of a model folder by name, those in MXFP4 as the ones that they stand for.

    Raises:
        DamagedFileError: as `read_headers`.
    """
    return joined(read_headers(folder))


def joined(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder with each pair of values and exponents as the one weight that it stands for."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        whole = name.removesuffix(BLOCKS)
        scales = tensors.get(f"{whole}{SCALES}")
        if whole != name and scales is not None and _is_pair(tensor, scales):
            experts, outputs, groups, _ = tensor.shape
            shape = experts, groups * _GROUP, outputs
            found[whole] = MicroscaledTensor(whole, tensor.file, tensor.offset, "BF16", shape, tensor, scales)
        elif not _belongs(name, tensor, tensors):
            found[name] = tensor
    return found


def _belongs(name: str, scales: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    blocks = tensors.get(f"{name.removesuffix(SCALES)}{BLOCKS}")
    return name.endswith(SCALES) and blocks is not None and _is_pair(blocks, scales)


def _is_pair(blocks: StoredTensor, scales: StoredTensor) -> bool:
    in_bytes = blocks.dtype == scales.dtype == "U8"
    return in_bytes and len(blocks.shape) == _AXES and blocks.shape == (*scales.shape, _GROUP // 2)
