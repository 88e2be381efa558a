"""The language model of checkpoints that see or hear, whatever class holds it."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T  # noqa: N812

from qlora_kit.core.errors import DamagedFileError, RecipeError
from qlora_kit.model.language_model import language_model, load_language_model, outer_modules
from qlora_kit.model.stored_names import stored_names
from qlora_kit.weights.headers import read_headers
from qlora_kit.weights.own_names import own_names_of
from tests.tiny_models import build_tiny_model
from tests.unit.export.merging.trained import rewrite

WIDTHS: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = torch.arange(10, 22)[None]


def _text(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "architectures"}


def _llava() -> Any:
    seeing = {"model_type": "clip_vision_model", **SIGHT}
    return T.LlavaConfig(text_config=_text(T.LlamaConfig(**WIDTHS)), vision_config=seeing, image_token_index=5)


def _llama4() -> Any:
    sizes = {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    seeing = {**SIGHT, "intermediate_size": 128}
    seeing |= dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 32)
    return T.Llama4Config(text_config=_text(T.Llama4TextConfig(**WIDTHS, **sizes)), vision_config=seeing)


def _qwen2_audio() -> Any:
    hearing = {"d_model": 32, "encoder_ffn_dim": 64, "encoder_layers": 1, "encoder_attention_heads": 2}
    return T.Qwen2AudioConfig(text_config=_text(T.Qwen2Config(**WIDTHS)), audio_config=hearing)


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    seeing = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return T.Qwen2VLConfig(text_config={**WIDTHS, "rope_parameters": rope}, vision_config=seeing, image_token_id=5)


KINDS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "llava": (_llava, "LlamaForCausalLM", ["model.multi_modal_projector", "model.vision_tower"]),
    "llama4": (_llama4, "Llama4ForCausalLM", ["multi_modal_projector", "vision_model"]),
    "qwen2_audio": (_qwen2_audio, "Qwen2ForCausalLM", ["model.audio_tower", "model.multi_modal_projector"]),
    "qwen2_vl": (_qwen2_vl, "Qwen2VLForConditionalGeneration", ["model.visual"]),
}


def _own_class(config: Any) -> Any:
    return next(
        auto
        for auto in (T.AutoModelForImageTextToText, T.AutoModelForMultimodalLM)
        if type(config) in auto._model_mapping
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_checkpoints_own_class_says_and_holds_no_tower(kind: str, tmp_path: Path) -> None:
    make, trained, towers = KINDS[kind]
    own = _own_class(make()).from_config(make()).eval()
    own.save_pretrained(tmp_path)
    found = language_model(tmp_path)
    assert outer_modules(found.names.outside) == towers
    model = load_language_model(tmp_path, dtype=torch.float32).eval()
    assert type(model).__name__ == trained
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, own(input_ids=TOKENS).logits)
    names = own_names_of(model)
    held = {names.own(name) for name, _ in model.named_parameters()}
    assert not [name for name in held if any(name.startswith(f"{tower}.") for tower in towers)]
    stored = stored_names(tmp_path, read_headers(tmp_path))
    assert held <= {*stored.by_own, *stored.stacks}
    assert {names.own(str(names.trained(name))) for name in held} == held
    assert set(stored.outside.values()) == set(towers)
    assert not set(stored.outside) & {stored.by_own[name] for name in held if name in stored.by_own}


def test_a_weight_that_is_not_there_is_told(tmp_path: Path) -> None:
    _own_class(_llava()).from_config(_llava()).save_pretrained(tmp_path)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path / "model.safetensors", lambda found: {key: value for key, value in found.items() if key != name})
    with pytest.raises(DamagedFileError, match=r"lacks 1 weight of its model: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_language_model(tmp_path, dtype=torch.float32)


@pytest.mark.skipif(find_spec("timm") is not None, reason="the tower's library is there")
def test_a_tower_whose_library_is_not_installed_is_no_hindrance(tmp_path: Path) -> None:
    per_layer = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 200, "laurel_rank": 8}
    sizes = {
        "head_dim": 16,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 5,
    }
    hearing = {"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 16}
    text = _text(T.Gemma3nTextConfig(**{**WIDTHS, **sizes, **per_layer}))
    config = T.Gemma3nConfig(text_config=text, audio_config={**hearing, "vocab_offset": 200})
    built = deepcopy(config)
    tower = T.SiglipVisionConfig(**SIGHT)
    vars(tower).update({key: value for key, value in vars(config.vision_config).items() if not hasattr(tower, key)})
    vars(tower).update(vocab_size=16, vocab_offset=200)
    vars(built)["vision_config"] = tower
    own = T.AutoModelForImageTextToText.from_config(built).eval()
    own.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config"] = config.vision_config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load_language_model(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, own(input_ids=TOKENS).logits)
    assert set(stored_names(tmp_path, read_headers(tmp_path)).outside.values()) >= {"model.vision_tower"}


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    T.CLIPVisionConfig(**SIGHT).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has no text model for model_type clip_vision_model"):
        language_model(tmp_path)


def test_scores_that_are_capped_are_computed_with_the_cap(tmp_path):
    """torch's kernel would leave the cap out, and transformers 5.17 lets it; 5.23 has no other way than eager."""
    folder = build_tiny_model("gemma2", tmp_path / "base", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    logits = {}
    for cap in (None, 1e-3):
        (folder / "config.json").write_text(json.dumps({**config, "attn_logit_softcapping": cap}))
        model = load_language_model(folder, dtype=torch.float32)
        taken = "eager" if cap or not model._supports_sdpa else "sdpa"
        assert model.config._attn_implementation == taken
        logits[cap] = model(TOKENS).logits
    assert not torch.allclose(logits[None], logits[1e-3], atol=1e-3)


def test_a_class_is_found_once_until_its_config_changes(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    first = language_model(folder)
    vars(first.config)["quantization_config"] = {"quant_method": "written by a caller"}
    again = language_model(folder)
    assert again.own is first.own
    assert not hasattr(again.config, "quantization_config")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert language_model(folder).config.num_hidden_layers == 1
    assert len(language_model(folder).own.model.layers) == 1
