"""Tensors of a safetensors folder, read a few rows at a time.

Read with plain reads rather than a mapping, so that a file's pages never count as memory of this process.
"""

from typing import TYPE_CHECKING

from qlora_kit.weights.headers import StoredTensor, broken
from qlora_kit.weights.microscaled import MicroscaledTensor

if TYPE_CHECKING:
    from torch import Tensor, dtype


def read_rows(tensor: StoredTensor, start: int, stop: int, room: "Tensor | None" = None) -> "Tensor":
    """Rows start..stop in the stored dtype, shape [stop - start, width].

    Args:
        room: bytes to read them into; theirs is the memory then.
    """
    import torch

    if isinstance(tensor, MicroscaledTensor):
        return tensor.read(start, stop)
    size = (stop - start) * tensor.row_bytes
    buffer = torch.empty(size, dtype=torch.uint8) if room is None else room[:size]
    view = buffer.numpy().data
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset + start * tensor.row_bytes)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise broken(tensor.file, f"it ends within {tensor.name}")
            done += count
    return buffer.view(dtype_of_stored(tensor.dtype)).view(stop - start, tensor.width)


def read_whole(tensor: StoredTensor) -> "Tensor":
    """The tensor in its stored dtype and shape."""
    return read_rows(tensor, 0, tensor.rows).view(tensor.shape)


def dtype_of_stored(name: str) -> "dtype":
    """The torch dtype of a safetensors type name."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]
