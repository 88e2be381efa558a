"""Weights of an artifact of any format that is read back one by one."""

import json
from pathlib import Path

from qlora_kit.formats.registry import find_format
from qlora_kit.weights.reader import WeightReader, stored_tensors

FORMAT_OF_METHOD = {"gptq": "gptq", "awq": "awq", "bitsandbytes": "bnb"}


def dequantized_weights(artifact: Path, merged: Path) -> WeightReader:
    """By its format's own reader; a folder in 16 bit as it is stored."""
    if artifact.is_file():
        read = find_format("gguf").dequantized_weights(artifact, merged)
    else:
        settings = json.loads((artifact / "config.json").read_text()).get("quantization_config")
        if settings is None:
            return stored_tensors(artifact)
        read = find_format(FORMAT_OF_METHOD[settings["quant_method"]]).dequantized_weights(artifact, merged)
    assert read is not None
    return read
