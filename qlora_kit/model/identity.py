"""What tells one base from another at once: its settings, and a sample of every tensor's numbers."""

from pathlib import Path

from qlora_kit.core.files import quick_hash
from qlora_kit.weights.headers import StoredTensor, read_headers

SETTINGS = ("config.json",)
TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what rows are made into tokens with
_SAMPLE = 4096  # bytes at the beginning, in the middle and at the end of a tensor


def identity(folder: Path) -> dict[str, str]:
    """A hash of each file that training depends on; of weights it is one over headers and samples.

    Reading 16 GB again takes longer than loading them. Another revision, a further training or a conversion changes
    every tensor that it touches, mostly all of its numbers, so 12 kB of each tell it; a single number changed by hand
    they do not.

    Args:
        folder: of a model in Hugging Face format.

    Raises:
        DamagedFileError: a file of weights is truncated or not safetensors.
    """
    from xxhash import xxh3_128

    found = {name: quick_hash(folder / name) for name in (*SETTINGS, *TEXTS) if (folder / name).is_file()}
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in read_headers(folder).values() if any(folder.glob("*.safetensors")) else ():
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, tensors in sorted(by_file.items()):
        digest = xxh3_128()
        with file.open("rb") as stream:
            for tensor in sorted(tensors, key=lambda one: one.offset):
                digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
                for at in sorted({0, max(0, tensor.size // 2 - _SAMPLE // 2), max(0, tensor.size - _SAMPLE)}):
                    stream.seek(tensor.offset + at)
                    digest.update(stream.read(min(_SAMPLE, tensor.size - at)))
        found[file.name] = digest.hexdigest()
    return found
