"""GGUF files that fit into memory, written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_kit.core.extras import require
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.container import open_container


@contextmanager
def whole_gguf(out_file: Path, architecture: str, needed_for: str) -> Iterator[Any]:
    """Give a writer of the package gguf; what was added to it takes its place when the block ends well.

    Args:
        architecture: of the model; empty for a file of none.
        needed_for: what is being done, for the message where the package is missing.
    """
    require("gguf", needed_for, EXTRA)
    partial = out_file.with_name(f".{out_file.name}.partial")
    writer = open_container(partial, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out_file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
