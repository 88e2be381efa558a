"""Quantized bases load in the recipe's storage, keep their gradients after an eval, and reload when pre-quantized."""

import bitsandbytes
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from qlora_kit.core.errors import RecipeError
from qlora_kit.model.load import load_base
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "llama")


def linear_types(model):
    return {type(module).__name__ for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("quant", "linear"),
    [
        (QuantConfig(kind=QuantKind.nf4), "Linear4bit"),
        (QuantConfig(kind=QuantKind.nf4, double_quant=False), "Linear4bit"),
        (QuantConfig(kind=QuantKind.fp4), "Linear4bit"),
        (QuantConfig(kind=QuantKind.int8, int8_outlier_threshold=4.5), "Linear8bitLt"),
        (QuantConfig(kind=QuantKind.none), "Linear"),
    ],
    ids=["nf4_double", "nf4", "fp4", "int8", "none"],
)
def test_storage_follows_the_recipe(folder, quant, linear):
    model = load_base(folder, quant)
    assert linear_types(model) == {linear}
    assert type(model.lm_head) is torch.nn.Linear
    assert model.get_input_embeddings().weight.dtype is torch.bfloat16
    projection = model.model.layers[0].self_attn.q_proj
    if linear == "Linear4bit":
        assert projection.weight.quant_type == quant.kind.value
        assert projection.weight.quant_state.nested is quant.double_quant
        assert projection.compute_dtype is torch.bfloat16
    if linear == "Linear8bitLt":
        assert projection.state.threshold == 4.5


def test_named_modules_stay_in_16_bit(folder):
    model = load_base(folder, QuantConfig(keep_16bit=["down_proj"]))
    layer = model.model.layers[0]
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert isinstance(layer.mlp.up_proj, bitsandbytes.nn.Linear4bit)


def test_an_eval_forward_leaves_gradients_and_weights_whole(folder, monkeypatch):
    # The repacking shows on CPUs with AVX512-BF16; this makes every CPU look like one to bitsandbytes.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_base(folder, QuantConfig())
    layer = model.model.layers[0].mlp.up_proj

    def dequantized():
        return bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).float()

    before = dequantized()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(8, device=model.device)[None])
    assert torch.equal(dequantized(), before)
    model.train()
    inputs = torch.randn(1, 4, layer.in_features, dtype=torch.bfloat16, device=model.device, requires_grad=True)
    layer(inputs).float().sum().backward()
    assert inputs.grad is not None
    assert float(inputs.grad.abs().sum()) > 0


def test_a_prequantized_folder_loads_as_it_is_stored(folder, tmp_path):
    load_base(folder, QuantConfig()).save_pretrained(tmp_path)
    model = load_base(tmp_path, QuantConfig(compute_dtype=ComputeDtype.float32))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.compute_dtype is torch.float32
    assert layer.support_avx512bf16_for_cpu is False


def test_a_tensor_that_transformers_renames_is_in_the_format_of_activations_too(tmp_path):
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"vocab_size": 640, "bos_token_id": 1, "eos_token_id": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**widths, **ids)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load_base(tmp_path / "base", QuantConfig()).save_pretrained(tmp_path / "stored")
    model = load_base(tmp_path / "stored", QuantConfig(compute_dtype=ComputeDtype.float32))
    assert model.get_output_embeddings().weight.dtype is torch.float32
    with torch.no_grad():
        assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_a_prequantized_folder_of_another_kind_is_refused(folder, tmp_path):
    load_base(folder, QuantConfig()).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"is stored as nf4, but quant\.kind=int8"):
        load_base(tmp_path, QuantConfig(kind=QuantKind.int8))


def test_a_base_quantized_for_serving_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(RecipeError, match="is quantized with gptq; only bases in 16 bit, by bits"):
        load_base(tmp_path, QuantConfig())
