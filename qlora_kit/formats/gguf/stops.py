"""The tokens at which llama.cpp and Ollama end an answer."""

from pathlib import Path

from qlora_kit.data.template.closing import LLAMA_CPP_STOPS
from qlora_kit.evaluation.token_parity.stops import Stops
from qlora_kit.formats.gguf.keys import whole_numbers

_KEYS = {
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.eot_token_id": "eot_token_id",
    "tokenizer.ggml.eom_token_id": "eom_token_id",
}


def gguf_stops(file: Path) -> Stops:
    """What ends an answer in llama.cpp and Ollama.

    Raises:
        RunError: the file cannot be read.
    """
    found = whole_numbers(file, _KEYS)
    return Stops(tuple((_KEYS[key], token) for key, token in found.items()), LLAMA_CPP_STOPS)
