"""Names of a model's tensors and of its checkpoint's."""

from qlora_kit.export.merging.names import checkpoint_names

LAYERS = [f"layers.{layer}.mlp.{kind}.weight" for layer in range(3) for kind in ("up_proj", "down_proj")]


def test_names_that_are_there_are_themselves() -> None:
    names = [f"model.{name}" for name in LAYERS]
    assert checkpoint_names(names, [*names, "other.layers.0.mlp.up_proj.weight"]) == {name: name for name in names}


def test_another_prefix_is_found_beside_a_tower_and_a_head_of_its_own() -> None:
    stored = [f"model.language_model.{name}" for name in LAYERS]
    beside = [f"model.vision_tower.{name}" for name in LAYERS] + [f"mtp.{name}" for name in LAYERS[:2]]
    wanted = [f"model.{name}" for name in LAYERS]
    assert checkpoint_names(wanted, [*beside, *stored]) == dict(zip(wanted, stored, strict=True))


def test_tables_outside_of_the_layers_are_found_by_their_last_words() -> None:
    found = checkpoint_names(["model.embed_tokens.weight"], ["model.language_model.embed_tokens.weight"])
    assert found == {"model.embed_tokens.weight": "model.language_model.embed_tokens.weight"}


def test_what_is_not_there_is_left_out() -> None:
    stored = [f"model.language_model.{name}" for name in LAYERS[:-1]]
    found = checkpoint_names([f"model.{name}" for name in LAYERS], stored)
    assert list(found) == [f"model.{name}" for name in LAYERS[:-1]]


def test_of_two_prefixes_with_as_much_none_is_taken() -> None:
    stored = [f"{prefix}.{name}" for prefix in ("text", "audio") for name in LAYERS]
    assert checkpoint_names([f"model.{name}" for name in LAYERS], stored) == {}
