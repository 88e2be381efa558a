"""An adapter opened on its base."""

import tempfile
from pathlib import Path

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.formats.adapter.llama_lora import LlamaCppLora
from qlora_kit.formats.bnb.load import load_stored
from qlora_kit.formats.gguf.scorer import LlamaCppScorer
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.schema.export import GgufMix


def open_peft(folder: Path, base: Path, pad_token_id: int) -> TorchScorer:
    """The adapter of a folder by peft, on a base in 16 bit or as bitsandbytes stores it."""
    return TorchScorer(load_adapter(load_stored(base), folder), pad_token_id)


def open_gguf_adapter(path: Path, base: Path) -> LlamaCppScorer:
    """The adapter by llama.cpp, on a 16-bit GGUF file of the base that lasts as long as the model is open."""
    # Beside the exports, where there is room for a model; a temporary folder may lie in memory.
    with tempfile.TemporaryDirectory(prefix=".base.", suffix=".partial", dir=path.resolve().parent.parent) as folder:
        file = Path(folder) / "base.gguf"
        write_gguf(base, file, GgufMix.F16.value)
        # llama.cpp maps the file into memory, and what is mapped outlives its name.
        return LlamaCppScorer(LlamaCppLora(file, path))
