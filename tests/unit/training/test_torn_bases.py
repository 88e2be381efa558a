"""A checkpoint that is not the one of its config.json is told before a weight is loaded, by the name of the tensor."""

import json

import pytest
from safetensors.torch import load_file, save_file

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.reach import reach_of
from tests.tiny_models import build_tiny_image_text_model, build_tiny_model


def torn(folder, *, drop=(), cut=(), **config):
    """Leave tensors out of a folder's file, halve others, and change its config.json."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in drop}
    tensors |= {name: tensors[name][: len(tensors[name]) // 2].clone() for name in cut}
    save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(written | config), encoding="utf-8")
    return folder


def reach(folder):
    recipe = TrainRecipe(model=ModelConfig(source=str(folder)), data=DataConfig(max_tokens=64))
    return reach_of(recipe, folder)


MOE = "model.layers.0.mlp"


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "qwen3_moe",
            {"cut": [f"{MOE}.gate.weight"]},
            rf"{MOE}.gate.weight is \[2, 256\], and .* \[4, 256\]",
        ),
        ("qwen3_moe", {"drop": [f"{MOE}.experts.2.up_proj.weight"]}, "are 3 tensors, and config.json says 4 experts"),
        (
            "qwen3_moe",
            {"cut": [f"{MOE}.experts.2.up_proj.weight"]},
            rf"{MOE}.experts.2.up_proj.weight is .*those of",
        ),
        ("qwen3_moe", {"num_local_experts": 8}, "are 4 tensors, and config.json says 8 experts"),
        ("llama", {"drop": ["model.norm.weight"]}, "lacks 1 weight of the model .*: model.norm.weight"),
        ("qwen3_5", {"cut": ["model.layers.0.input_layernorm.weight"]}, r"layers.0.input_layernorm.weight is \[128\]"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(family, changes, told, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base")
    assert not reach(folder).lacking
    with pytest.raises(RecipeError, match=told) as found:
        reach(torn(folder, **changes))
    assert [problem.where for problem in found.value.problems] == ["model.source"]
    assert "copy or fetch the whole folder again" in str(found.value)


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_that_config_json_does_not_count_are_told(family, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base")
    assert not any("of more" in line for line in reach(folder).lines())
    layers = {"num_hidden_layers": 1} | ({"layer_types": None} if family == "qwen3_moe" else {})
    found = reach(torn(folder, **layers))
    (line,) = (line for line in found.lines() if "of more" in line)
    assert line.startswith(
        f"warning: config.json says 1 layer, and the checkpoint holds {len(found.beyond)} tensors of more"
    )
    assert all(name.startswith("model.layers.1.") for name in found.beyond)


def test_a_tower_that_lacks_a_tensor_is_told_and_the_language_model_trained(tmp_path):
    folder = build_tiny_image_text_model(tmp_path / "base")
    name = next(name for name in sorted(load_file(folder / "model.safetensors")) if "vision" in name)
    assert not any("warning" in line for line in reach(folder).lines())
    found = reach(torn(folder, drop=[name]))
    assert len(found.lacking) == 1
    (line,) = (line for line in found.lines() if line.startswith("warning: the checkpoint lacks 1 weight of what"))
    assert "merged files will lack them too" in line
