"""A run folder of a stranger has no command write or delete elsewhere."""

import pytest

from qlora_kit.core.errors import EXIT_BAD_RECIPE, RecipeError
from qlora_kit.core.links import refuse_links_outside
from qlora_kit.runs.directory import find_run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name in ("adapter", "exports/gguf_q8_0", "exports/.merged.original", "checkpoints/checkpoint-2"):
        (folder / name).mkdir(parents=True)
    for name in ("recipe.yaml", "result.json"):
        (folder / name).write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("weights")
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "exports/.merged.dequantized",
        "exports/.merged.original/model.safetensors",
        "exports/.gguf_q8_0.0a1b2c3d.partial",
        ".export.lock",
        "metrics.jsonl",
        "checkpoints/checkpoint-4",
        "checkpoints/checkpoint-2/optimizer.pt",
        "tokenizer",
        "tensorboard",
    ],
)
@pytest.mark.parametrize("aim", ["mine", "mine/model.safetensors", "gone"])
def test_a_link_out_of_the_run_is_refused_by_name(run, tmp_path, place, aim):
    (run / place).symlink_to(tmp_path / aim)
    with pytest.raises(RecipeError) as caught:
        find_run(str(run), finished=True)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == EXIT_BAD_RECIPE
    assert problem.what.startswith(f"{run / place} is a link out of the run's folder, to {tmp_path / aim}")
    assert problem.fix == f"rm {run / place}"


@pytest.mark.parametrize("place", ["exports", "checkpoints"])
def test_a_whole_folder_that_is_a_link_is_refused(run, tmp_path, place):
    (run / place).rename(tmp_path / "moved")
    (run / place).symlink_to(tmp_path / "moved")
    with pytest.raises(RecipeError, match="is a link out of the run's folder"):
        refuse_links_outside(run)


def test_a_link_in_a_circle_is_refused(run):
    (run / "metrics.jsonl").symlink_to(run / "metrics.jsonl")
    with pytest.raises(RecipeError, match="is a link out of the run's folder"):
        refuse_links_outside(run)


def test_many_links_are_told_with_their_number(run, tmp_path):
    for number in range(10):
        (run / "checkpoints" / str(number)).symlink_to(tmp_path)
    with pytest.raises(RecipeError) as caught:
        refuse_links_outside(run)
    assert len(caught.value.problems) == 4
    assert caught.value.problems[-1].what == f"7 more links lead out of {run}"


def test_a_moved_export_and_a_link_within_the_run_are_fine(run, tmp_path):
    (run / "exports" / "gguf_q8_0").rmdir()
    (run / "exports" / "gguf_q8_0").symlink_to(tmp_path / "mine")
    (run / "adapter").rmdir()
    (run / "adapter").symlink_to(tmp_path / "mine")
    (run / "checkpoints" / "newest").symlink_to("checkpoint-2")
    assert find_run(str(run), finished=True).path == run


def test_the_log_that_wandb_links_to_is_left_alone(run, tmp_path):
    logs = run / "wandb" / "offline-run-20260131_123000-ab12" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "mine" / "core.log")
    refuse_links_outside(run)
    (run / "wandb" / "run-20260131_123000-ab12").symlink_to(tmp_path / "mine")
    with pytest.raises(RecipeError, match="run-20260131_123000-ab12 is a link out of the run's folder"):
        refuse_links_outside(run)
