"""What Ollama requires of a GGUF file and the Modelfile beside it, for machines where it is not there."""

from collections.abc import Iterator
from pathlib import Path

from qlora_kit.data.template.ollama import MODELFILE, Modelfile

GGUF_MAGIC = b"GGUF"


def server_file_problems(folder: Path, file: Path) -> Iterator[str]:
    """What is wrong with them."""
    if not file.is_file():
        yield f"there is no {file.name}"
        return
    with file.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            yield f"{file.name} is not a GGUF file"
    modelfile = folder / MODELFILE
    if not modelfile.is_file():
        yield "there is no Modelfile for ollama create"
        return
    try:
        source = Modelfile.read(modelfile.read_text(encoding="utf-8")).source
    except ValueError as error:
        yield str(error)
        return
    if (folder / source).resolve() != file.resolve():
        yield f"the Modelfile's FROM names {source}, not ./{file.name}"
