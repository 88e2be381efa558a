"""One model in several files: which tensors go where, and llama.cpp's names for the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

_ALIGNMENT = 32  # every tensor starts at a multiple of it; llama.cpp's default


def padded(size: int) -> int:
    """Bytes of a tensor with the gap before the next one."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def split_tensors(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Tensor names in their order, parted so that no part exceeds the limit unless it is a single tensor.

    Args:
        sizes: bytes by tensor name.
        limit: bytes a part; None keeps all together.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and parts[-1] and filled + padded(size) > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += padded(size)
    return parts


def shard_paths(out_file: Path, count: int) -> list[Path]:
    """The file itself, or `<stem>-00001-of-0000N.gguf` and so on, the names that llama.cpp looks for."""
    if count == 1:
        return [out_file]
    return [out_file.with_name(f"{out_file.stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def tensor_offsets(sizes: Sequence[int], start: int) -> list[int]:
    """Where each tensor of a file begins, in bytes, when the first one may begin at `start`."""
    offsets = []
    position = padded(start)
    for size in sizes:
        offsets.append(position)
        position += padded(size)
    return offsets
