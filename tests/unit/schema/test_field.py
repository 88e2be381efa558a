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
        knob = field.metadata["knob"]
        assert knob.help.endswith("."), path
        if annotation in (int, float):
            assert knob.minimum is not None or knob.above is not None, path


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


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rr", "lora.r"),
        ("optim.lr_rate", "optim.learning_rate"),
        ("zzz", None),
        ("learning_rat", "optim.learning_rate"),
    ],
)
def test_nearest_path(wrong, right):
    assert walk.nearest_path(TrainRecipe, wrong) == right


@pytest.mark.parametrize(
    ("wrong", "value", "line"),
    [
        ("data.train", "x.jsonl", "data.train_file=x.jsonl"),
        ("data.train", "last", "data.train_on=last"),
        ("engine.fp8_copies", False, "engine.weight_copies=auto"),
        ("optim.learning_rat", 1, "optim.learning_rate=1"),
        ("trainer.sed", True, "trainer.seed=0"),
        ("lora.targts", ["a", "b"], "lora.targets=[a,b]"),
        ("engine.cuda_graph", False, "engine.cuda_graphs=False"),
        ("engine.cuda_graph", 3, "engine.cuda_graphs=True"),
        ("model.sourc", 7, "model.source=<str>"),
    ],
)
def test_the_nearest_field_is_one_that_takes_the_value_if_there_is_one(wrong, value, line):
    found = walk.nearest_path(TrainRecipe, wrong, value)
    assert walk.example(TrainRecipe, found, value) == line
