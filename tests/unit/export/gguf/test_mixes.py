"""Type tables against what llama.cpp prints and writes for the same shapes."""

from collections import Counter

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.gguf.mixes import MIXES, ModelShape, find_mix, tensor_type


def llama_tensors(
    layers: int, hidden: int, ffn: int, kv_rows: int, vocabulary: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        tensors["output.weight"] = (vocabulary, hidden)
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return tensors


def counts(mix: str, model: ModelShape, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return dict(Counter(tensor_type(name, shape, MIXES[mix], model) for name, shape in tensors.items()))


# counts that llama.cpp's loader prints for published files of the 7B/8B shape (32 layers, 65 vectors)
PUBLISHED_8B = {
    "Q8_0": {"F32": 65, "Q8_0": 226},
    "Q6_K": {"F32": 65, "Q6_K": 226},
    "Q5_K_M": {"F32": 65, "Q5_K": 193, "Q6_K": 33},
    "Q5_K_S": {"F32": 65, "Q5_K": 225, "Q6_K": 1},
    "Q4_K_M": {"F32": 65, "Q4_K": 193, "Q6_K": 33},
    "Q4_K_S": {"F32": 65, "Q4_K": 217, "Q5_K": 8, "Q6_K": 1},
    "Q3_K_M": {"F32": 65, "Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1},
    "Q2_K": {"F32": 65, "Q2_K": 129, "Q3_K": 64, "Q4_K": 32, "Q6_K": 1},
    "F16": {"F32": 65, "F16": 226},
}


@pytest.mark.parametrize("mix", MIXES)
def test_8b_shape_gets_the_types_of_published_files(mix: str) -> None:
    model = ModelShape("llama", layers=32, heads=32, kv_heads=8, tied_embeddings=False)
    assert counts(mix, model, llama_tensors(32, 4096, 14336, 1024, 128256, tied=False)) == PUBLISHED_8B[mix]


# SmolLM2-135M: 576 is no multiple of 256, the embedding is tied
NARROW_135M = {
    "Q4_K_M": {"F32": 61, "Q4_K": 16, "Q6_K": 14, "Q5_0": 166, "Q8_0": 15},
    "Q5_K_M": {"F32": 61, "Q5_K": 16, "Q6_K": 14, "Q5_1": 166, "Q8_0": 15},
    "Q6_K": {"F32": 61, "Q6_K": 30, "Q8_0": 181},
    "Q4_K_S": {"F32": 61, "Q4_K": 27, "Q5_K": 3, "Q5_0": 176, "Q5_1": 4, "Q8_0": 1},
    "Q3_K_M": {"F32": 61, "Q4_K": 29, "Q5_K": 1, "Q4_0": 120, "Q5_0": 58, "Q5_1": 2, "Q8_0": 1},
    "Q2_K": {"F32": 61, "Q3_K": 30, "Q4_0": 180, "Q8_0": 1},
}

# block bytes of the file llama.cpp's own quantizer wrote for it, in MB; the rest is about 1.8 MB of vocabulary
LLAMA_CPP_FILE_MB = {"Q8_0": 144.8, "Q6_K": 138.4, "Q5_K_M": 112.1, "Q4_K_M": 105.5, "Q3_K_M": 93.5, "Q2_K": 88.2}
BITS = {"F32": 32, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_1": 6, "Q5_0": 5.5}
BITS |= {"Q4_K": 4.5, "Q4_0": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}


@pytest.mark.parametrize("mix", NARROW_135M)
def test_narrow_rows_fall_back_as_in_llama_cpp(mix: str) -> None:
    model = ModelShape("llama", layers=30, heads=9, kv_heads=3, tied_embeddings=True)
    assert counts(mix, model, llama_tensors(30, 576, 1536, 192, 49152, tied=True)) == NARROW_135M[mix]


@pytest.mark.parametrize("mix", LLAMA_CPP_FILE_MB)
def test_file_size_is_that_of_llama_cpp(mix: str) -> None:
    model = ModelShape("llama", layers=30, heads=9, kv_heads=3, tied_embeddings=True)
    bits = 0.0
    for name, shape in llama_tensors(30, 576, 1536, 192, 49152, tied=True).items():
        values = shape[0] * (shape[1] if len(shape) > 1 else 1)
        bits += values * BITS[tensor_type(name, shape, MIXES[mix], model)]
    assert bits / 8e6 + 1.8 == pytest.approx(LLAMA_CPP_FILE_MB[mix], abs=0.15)


def test_seventy_b_gives_values_more_bits() -> None:
    model = ModelShape("llama", layers=80, heads=64, kv_heads=8, tied_embeddings=False)
    found = counts("Q4_K_M", model, llama_tensors(80, 8192, 28672, 1024, 128256, tied=False))
    assert found == {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}


def test_q2_k_values_depend_on_heads_per_kv_head() -> None:
    few = ModelShape("qwen2", layers=24, heads=14, kv_heads=7, tied_embeddings=True)
    many = ModelShape("qwen2", layers=24, heads=28, kv_heads=7, tied_embeddings=True)
    assert tensor_type("blk.5.attn_v.weight", (512, 1024), MIXES["Q2_K"], few) == "Q3_K"
    assert tensor_type("blk.5.attn_v.weight", (512, 1024), MIXES["Q2_K"], many) == "Q4_K"


def test_untied_embedding_takes_the_usual_type_and_the_output_more() -> None:
    untied = ModelShape("llama", layers=32, heads=32, kv_heads=8, tied_embeddings=False)
    assert tensor_type("token_embd.weight", (32000, 4096), MIXES["Q4_K_M"], untied) == "Q4_K"
    assert tensor_type("output.weight", (32000, 4096), MIXES["Q4_K_M"], untied) == "Q6_K"


def test_rows_that_fit_no_block_stay_16_bit() -> None:
    model = ModelShape("llama", layers=2, heads=2, kv_heads=2, tied_embeddings=False)
    assert tensor_type("blk.0.attn_q.weight", (40, 40), MIXES["Q4_K_M"], model) == "F16"
    assert tensor_type("blk.0.attn_q.weight", (40, 40), MIXES["Q8_0"], model) == "F16"


def test_vectors_and_norms_stay_32_bit() -> None:
    model = ModelShape("qwen3", layers=2, heads=2, kv_heads=2, tied_embeddings=False)
    for name in ("blk.0.attn_q_norm.weight", "output_norm.weight", "blk.0.attn_q.bias"):
        assert tensor_type(name, (256,), MIXES["Q4_K_M"], model) == "F32"


def test_unknown_mix_names_the_known_ones() -> None:
    assert find_mix("q4_k_m") is MIXES["Q4_K_M"]
    with pytest.raises(RecipeError, match="Q4_K_XL") as raised:
        find_mix("Q4_K_XL")
    assert "Q4_K_M" in raised.value.problems[0].fix
