"""Recipes of older run directories are read under today's names."""

import pytest

from qlora_kit.schema.compose import load_recipe


@pytest.mark.parametrize(("name", "services"), [("mlflow", ["mlflow"]), ("jsonl", [])])
def test_the_one_service_of_an_older_run(tmp_path, name, services):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{source: demo}}\ndata: {{max_tokens: 64}}\ntracker: {{name: {name}, mode: offline, project: mine}}\n"
    )
    tracker = load_recipe("train", path).tracker
    assert tracker.services == services
    assert (tracker.mode.value, tracker.project) == ("offline", "mine")
