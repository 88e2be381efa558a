"""Type tables against what llama.cpp prints and writes for the same shapes."""

from collections import Counter

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gguf.mixes import MIXES, MixContext, find_mix, is_weighted, requires_imatrix, tensor_type
from qlora_kit.formats.gguf.roles import Place, kept_type, places_of
from qlora_kit.schema.export import GgufMix


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


def counts(mix: str, model: MixContext, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
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


@pytest.mark.parametrize("mix", PUBLISHED_8B)
def test_8b_shape_gets_the_types_of_published_files(mix: str) -> None:
    model = MixContext(layers=32, heads=32, kv_heads=8, tied_embeddings=False)
    assert counts(mix, model, llama_tensors(32, 4096, 14336, 1024, 128256, tied=False)) == PUBLISHED_8B[mix]


# types that differ from the usual one in the snapshots of llama.cpp's own test of its rules (tests/snapshots/
# qwen3-0.6b.schema): 28 layers, 16 heads, 8 of keys and values, an output matrix of its own, no importance matrix
SNAPSHOT_06B: dict[str, dict[str, int]] = {
    "BF16": {"BF16": 198},
    "Q4_0": {"Q4_0": 197, "Q6_K": 1},
    "Q4_1": {"Q4_1": 197, "Q6_K": 1},
    "Q5_0": {"Q5_0": 197, "Q6_K": 1},
    "Q5_1": {"Q5_1": 197, "Q6_K": 1},
    "Q3_K_S": {"Q3_K": 197, "Q6_K": 1},
    "Q3_K_L": {"Q3_K": 113, "Q5_K": 84, "Q6_K": 1},
    "Q2_K_S": {"Q2_K": 194, "Q4_K": 3, "Q6_K": 1},
    "IQ4_NL": {"IQ4_NL": 194, "Q5_K": 3, "Q6_K": 1},
    "IQ4_XS": {"IQ4_XS": 194, "Q5_K": 3, "Q6_K": 1},
    "IQ3_M": {"IQ3_S": 138, "Q4_K": 59, "Q6_K": 1},
    "IQ3_S": {"IQ3_S": 197, "Q6_K": 1},
    "IQ3_XS": {"IQ3_S": 99, "IQ3_XXS": 98, "Q6_K": 1},
    "IQ3_XXS": {"IQ3_XXS": 56, "IQ3_S": 57, "IQ2_S": 56, "Q4_K": 3, "Q3_K": 25, "Q5_K": 1},
    "IQ2_M": {"IQ2_S": 137, "IQ3_S": 60, "Q5_K": 1},
    "IQ2_S": {"IQ2_XS": 137, "IQ3_S": 60, "Q5_K": 1},
    "IQ2_XS": {"IQ2_XS": 165, "Q2_K": 32, "Q5_K": 1},
    "IQ2_XXS": {"IQ2_XXS": 165, "Q2_K": 32, "Q5_K": 1},
    "IQ1_M": {"IQ1_M": 137, "IQ2_XXS": 28, "Q2_K": 32, "Q5_K": 1},
    "IQ1_S": {"IQ1_S": 137, "IQ2_XXS": 28, "Q2_K": 32, "Q5_K": 1},
}


def test_every_mix_is_compared_with_llama_cpp() -> None:
    assert set(SNAPSHOT_06B) | set(PUBLISHED_8B) == set(MIXES) == {mix.value for mix in GgufMix}


@pytest.mark.parametrize("mix", SNAPSHOT_06B)
def test_types_are_those_of_llama_cpps_snapshot(mix: str) -> None:
    model = MixContext(layers=28, heads=16, kv_heads=8, tied_embeddings=False)
    found = counts(mix, model, llama_tensors(28, 1024, 3072, 1024, 151936, tied=False))
    assert {kind: number for kind, number in found.items() if kind != "F32"} == SNAPSHOT_06B[mix]


# by hand from llama.cpp's rules: what an importance matrix, shared values and 80 layers change
WITH_IMATRIX = MixContext(layers=32, heads=32, kv_heads=8, tied_embeddings=False, has_imatrix=True)
WITHOUT = MixContext(layers=32, heads=32, kv_heads=8, tied_embeddings=False)
LLAMA_70B = MixContext(layers=80, heads=64, kv_heads=8, tied_embeddings=False, seventy_b="grouped")


@pytest.mark.parametrize(
    ("mix", "name", "model", "expected"),
    [
        ("Q4_0", "blk.3.ffn_down", WITH_IMATRIX, "Q4_1"),
        ("Q4_0", "blk.4.ffn_down", WITH_IMATRIX, "Q4_0"),
        ("Q4_0", "blk.3.ffn_down", WITHOUT, "Q4_0"),
        ("Q5_0", "blk.3.ffn_down", WITH_IMATRIX, "Q5_1"),
        ("IQ4_XS", "blk.0.ffn_down", WITH_IMATRIX, "IQ4_XS"),
        ("IQ4_XS", "blk.0.ffn_down", WITHOUT, "Q5_K"),
        ("IQ4_NL", "blk.9.attn_v", WITH_IMATRIX, "Q5_K"),
        ("IQ3_XXS", "blk.0.ffn_down", WITH_IMATRIX, "IQ3_XXS"),
        ("IQ3_XXS", "blk.0.attn_v", WITH_IMATRIX, "Q4_K"),
        ("IQ3_S", "blk.0.attn_v", WITHOUT, "Q4_K"),
        ("IQ3_XS", "blk.4.ffn_up", WITHOUT, "IQ3_XXS"),
        ("IQ3_XS", "blk.28.ffn_gate", WITHOUT, "IQ3_S"),
        ("Q2_K_S", "blk.9.attn_v", WITHOUT, "Q4_K"),
        ("IQ2_XS", "blk.9.attn_v", LLAMA_70B, "Q4_K"),
        ("Q3_K_S", "blk.9.attn_v", LLAMA_70B, "Q5_K"),
        ("IQ3_S", "blk.9.attn_v", LLAMA_70B, "Q5_K"),
    ],
)
def test_rules_that_depend_on_the_model(mix: str, name: str, model: MixContext, expected: str) -> None:
    assert tensor_type(f"{name}.weight", (4096, 4096), MIXES[mix], model) == expected


def test_codebook_types_fall_back_to_blocks_of_32() -> None:
    model = MixContext(layers=30, heads=9, kv_heads=3, tied_embeddings=True, has_imatrix=True)
    for mix in ("IQ4_XS", "IQ3_S", "IQ2_XS", "IQ1_S"):
        assert tensor_type("blk.5.attn_q.weight", (576, 576), MIXES[mix], model) == "IQ4_NL"
        assert tensor_type("token_embd.weight", (49152, 576), MIXES[mix], model) == "Q8_0"


def test_which_types_are_garbage_without_an_importance_matrix() -> None:
    assert requires_imatrix("blk.0.ffn_up.weight", "IQ3_XXS", MIXES["Q4_K_M"])
    assert requires_imatrix("blk.0.ffn_up.weight", "Q2_K", MIXES["Q2_K_S"])
    assert not requires_imatrix("blk.0.ffn_up.weight", "Q2_K", MIXES["Q2_K"])
    assert not requires_imatrix("blk.0.ffn_up.weight", "IQ3_S", MIXES["IQ3_S"])
    assert not requires_imatrix("token_embd.weight", "IQ2_XS", MIXES["IQ2_XS"])
    assert [kind for kind in ("F16", "BF16", "Q8_0", "Q6_K", "IQ4_NL") if is_weighted(kind)] == ["Q6_K", "IQ4_NL"]


@pytest.mark.parametrize("mix", GgufMix)
def test_the_recipe_knows_which_mixes_need_one(mix: GgufMix) -> None:
    tensors = llama_tensors(32, 4096, 14336, 1024, 128256, tied=False)
    kinds = {name: tensor_type(name, shape, MIXES[mix.value], WITHOUT) for name, shape in tensors.items()}
    assert mix.needs_imatrix == any(requires_imatrix(name, kind, MIXES[mix.value]) for name, kind in kinds.items())


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
    model = MixContext(layers=30, heads=9, kv_heads=3, tied_embeddings=True)
    assert counts(mix, model, llama_tensors(30, 576, 1536, 192, 49152, tied=True)) == NARROW_135M[mix]


@pytest.mark.parametrize("mix", LLAMA_CPP_FILE_MB)
def test_file_size_is_that_of_llama_cpp(mix: str) -> None:
    model = MixContext(layers=30, heads=9, kv_heads=3, tied_embeddings=True)
    bits = 0.0
    for name, shape in llama_tensors(30, 576, 1536, 192, 49152, tied=True).items():
        values = shape[0] * (shape[1] if len(shape) > 1 else 1)
        bits += values * BITS[tensor_type(name, shape, MIXES[mix], model)]
    assert bits / 8e6 + 1.8 == pytest.approx(LLAMA_CPP_FILE_MB[mix], abs=0.15)


def test_seventy_b_gives_values_more_bits() -> None:
    model = MixContext(layers=80, heads=64, kv_heads=8, tied_embeddings=False, seventy_b="grouped")
    found = counts("Q4_K_M", model, llama_tensors(80, 8192, 28672, 1024, 128256, tied=False))
    assert found == {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}


def test_q2_k_values_depend_on_heads_per_kv_head() -> None:
    few = MixContext(layers=24, heads=14, kv_heads=7, tied_embeddings=True)
    many = MixContext(layers=24, heads=28, kv_heads=7, tied_embeddings=True)
    assert tensor_type("blk.5.attn_v.weight", (512, 1024), MIXES["Q2_K"], few) == "Q3_K"
    assert tensor_type("blk.5.attn_v.weight", (512, 1024), MIXES["Q2_K"], many) == "Q4_K"


def test_untied_embedding_takes_the_usual_type_and_the_output_more() -> None:
    untied = MixContext(layers=32, heads=32, kv_heads=8, tied_embeddings=False)
    assert tensor_type("token_embd.weight", (32000, 4096), MIXES["Q4_K_M"], untied) == "Q4_K"
    assert tensor_type("output.weight", (32000, 4096), MIXES["Q4_K_M"], untied) == "Q6_K"


def test_rows_that_fit_no_block_stay_16_bit() -> None:
    model = MixContext(layers=2, heads=2, kv_heads=2, tied_embeddings=False)
    assert tensor_type("blk.0.attn_q.weight", (40, 40), MIXES["Q4_K_M"], model) == "F16"
    assert tensor_type("blk.0.attn_q.weight", (40, 40), MIXES["Q8_0"], model) == "F16"


def test_vectors_and_norms_stay_32_bit() -> None:
    model = MixContext(layers=2, heads=2, kv_heads=2, tied_embeddings=False)
    for name in ("blk.0.attn_q_norm.weight", "output_norm.weight", "blk.0.attn_q.bias"):
        assert tensor_type(name, (256,), MIXES["Q4_K_M"], model) == "F32"


def test_unknown_mix_names_the_known_ones() -> None:
    assert find_mix("q4_k_m") is MIXES["Q4_K_M"]
    with pytest.raises(RecipeError, match="Q4_K_XL") as raised:
        find_mix("Q4_K_XL")
    assert "Q4_K_M" in raised.value.problems[0].fix


EIGHT = MixContext(layers=32, heads=32, kv_heads=8, tied_embeddings=False, experts=8)
MANY = MixContext(layers=48, heads=32, kv_heads=16, tied_embeddings=False, experts=128)


# by hand from llama.cpp's rules: what experts change
@pytest.mark.parametrize(
    ("mix", "name", "model", "expected"),
    [
        ("Q4_K_M", "blk.9.attn_v", EIGHT, "Q8_0"),
        ("Q4_K_M", "blk.9.attn_k", EIGHT, "Q8_0"),
        ("Q4_K_M", "blk.9.attn_output", EIGHT, "Q5_K"),
        ("Q4_K_M", "blk.0.ffn_down_exps", EIGHT, "Q6_K"),
        ("Q4_K_M", "blk.4.ffn_down_exps", EIGHT, "Q4_K"),
        ("Q3_K_L", "blk.9.attn_output", EIGHT, "Q3_K"),
        ("Q6_K", "blk.9.attn_v", EIGHT, "Q8_0"),
        ("IQ3_M", "blk.6.ffn_down_exps", EIGHT, "Q4_K"),
        ("IQ3_XXS", "blk.9.attn_k", EIGHT, "Q8_0"),
        ("IQ2_XS", "blk.9.attn_v", EIGHT, "Q4_K"),
        ("IQ2_XS", "blk.9.attn_k", EIGHT, "Q4_K"),
        ("IQ2_XS", "blk.9.attn_output", EIGHT, "Q5_K"),
        ("IQ2_XS", "blk.9.attn_v", MANY, "Q4_K"),
        ("IQ2_XS", "blk.9.attn_k", MANY, "IQ2_XS"),
        ("Q4_K_M", "blk.47.ffn_down_shexp", MANY, "Q6_K"),
        ("Q4_K_M", "blk.9.ffn_gate_up_exps", MANY, "Q4_K"),
        ("Q4_K_M", "blk.9.ffn_gate_inp", MANY, "F32"),
        ("Q4_K_M", "blk.9.ssm_in", MANY, "Q4_K"),
        ("Q4_K_M", "blk.9.ssm_conv1d", MANY, "F32"),
        ("IQ3_XS", "blk.20.ffn_up_exps", MANY, "IQ3_XXS"),
        ("Q2_K", "per_layer_token_embd", MANY, "Q2_K"),
    ],
)
def test_experts_and_state_spaces(mix: str, name: str, model: MixContext, expected: str) -> None:
    assert tensor_type(f"{name}.weight", (8, 4096, 4096), MIXES[mix], model) == expected


def test_layers_without_values_are_not_counted_among_those_that_have_some() -> None:
    """A hybrid of 32 layers, of which every fourth has attention: the first of eight is one of the first eighth."""
    model = MixContext(layers=32, heads=0, kv_heads=0, tied_embeddings=False)
    assert not model.shares_values
    names = [f"blk.{layer}.attn_v.weight" for layer in range(3, 32, 4)]
    names += [f"blk.{layer}.ffn_down.weight" for layer in range(32)]
    places = places_of(names, model.layers, model.experts)
    kinds = [tensor_type(name, (256, 256), MIXES["Q4_K_M"], model, places[name]) for name in names[:8]]
    assert kinds == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert places["blk.31.ffn_down.weight"] == Place(31, 32, 31)


def test_experts_have_the_place_of_their_layer() -> None:
    names = ["blk.0.ffn_down.weight", "blk.1.ffn_down_exps.weight", "blk.1.ffn_down_shexp.weight", "output.weight"]
    places = places_of(names, 2, MANY.experts)
    assert places["blk.1.ffn_down_shexp.weight"] == Place(1, 2, 2)
    assert "output.weight" not in places


def test_what_is_not_quantized_stays_as_it_is_stored() -> None:
    assert kept_type("blk.0.laurel_l.weight", "BF16", (64, 256)) == "BF16"
    assert kept_type("blk.0.ffn_gate_inp.weight", "F32", (4, 256)) == "F32"
    assert kept_type("blk.0.attn_norm.weight", "BF16", (256,)) == "F32"
    assert kept_type("blk.0.attn_q_norm.weight", "BF16", (4, 64)) == "F32"
