"""Families that the kit and llama.cpp's own converter both write: the same tensors, bit by bit, and the same keys."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qlora_kit.formats.gguf.converter.convert import Conversion
from qlora_kit.formats.gguf.writer import write_gguf
from tests.tiny_models import FAMILIES, build_tiny_model

# Keys that the kit states and the converter leaves to llama.cpp, which computes the same from others
# (`llama-model.cpp`): the width of a head is the embedding's divided by the heads, and all of it is rotated.
LEFT_TO_LLAMA_CPP = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# What is no part of the model: the file's own head, and the vocabulary, which the kit writes for both.
ASIDE = ("GGUF.", "general.", "tokenizer.")


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(ASIDE)}
    return {tensor.name: tensor for tensor in reader.tensors}, keys


def assert_same(name: str, theirs: Any, ours: Any) -> None:
    values = gguf.dequantize(theirs.data, theirs.tensor_type)
    found = gguf.dequantize(ours.data, ours.tensor_type)
    if theirs.tensor_type != ours.tensor_type:  # float32 weights, which the kit writes in 16 bits
        assert (theirs.tensor_type.name, ours.tensor_type.name) == ("F32", "F16"), name
        values = values.astype(np.float16).astype(np.float32)
    if name == "rope_freqs.weight":  # computed in float64 by one and in float32 by the other
        np.testing.assert_allclose(found, values, rtol=1e-6, err_msg=name)
        return
    np.testing.assert_array_equal(found, values, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_converter_and_the_kit_write_the_same_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_tiny_model(family, tmp_path / family, dtype=dtype)
    conversion = Conversion(folder, tmp_path)
    write_gguf(folder, tmp_path / "ours.gguf", "BF16" if dtype == torch.bfloat16 else "F16")
    theirs, their_keys = contents(conversion.file)
    ours, our_keys = contents(tmp_path / "ours.gguf")
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert_same(name, tensor, ours[name])
    kind = next(name.partition(".")[0] for name in our_keys if name.endswith(".block_count"))
    width = our_keys[f"{kind}.embedding_length"] // our_keys[f"{kind}.attention.head_count"]
    head = their_keys.get(f"{kind}.attention.key_length", width)
    for key in LEFT_TO_LLAMA_CPP:
        assert our_keys.pop(f"{kind}.{key}", head) == their_keys.pop(f"{kind}.{key}", head), key
    if family == "gemma3":
        # without a cap of the logits, which llama.cpp takes for granted in later families alone
        assert their_keys.pop("gemma3.final_logit_softcapping") == 0.0
    assert our_keys == their_keys
