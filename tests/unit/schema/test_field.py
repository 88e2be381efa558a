"""Recipe fields: sealed, walked, named."""

import pytest

from qlora_kit.schema import walk
from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe


def test_a_sealed_recipe_cannot_change():
    recipe = TrainRecipe()
    recipe.seal()
    with pytest.raises(AttributeError, match=r"frozen: cannot set LoraConfig\.r"):
        recipe.lora.r = 3


@pytest.mark.parametrize("root", [TrainRecipe, ExportRecipe, EvalRecipe])
def test_every_field_has_a_help_line_and_numbers_have_bounds(root):
    for path, annotation, field in walk.schema_paths(root):
        setting = field.metadata["setting"]
        assert setting.help.endswith("."), path
        if annotation in (int, float):
            assert setting.minimum is not None or setting.above is not None, path


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("lora.r", True),
        ("lora", True),
        ("lora.rank_pattern.q_proj", True),
        ("model.shape.hidden_size", True),
        ("lora.rr", False),
        ("lora.r.x", False),
        ("nothing", False),
    ],
)
def test_find_path(path, known):
    assert walk.find_path(TrainRecipe, path) is known


def test_find_path_inside_a_named_target():
    assert walk.find_path(ExportRecipe, "export.gptq.gptq_4bit.group_size")
    assert not walk.find_path(ExportRecipe, "export.gptq.gptq_4bit.groupsize")
