"""A checkpoint that another hand wrote is told by what it holds, whatever its mark says; no code in it runs."""

import json
import os
import pickle

import pytest
import torch

from qlora_kit.core.errors import EXIT_BAD_RECIPE, DamagedFileError
from qlora_kit.training.checkpoint import last_complete, mark_complete
from qlora_kit.training.checkpoint_contents import strange_contents, told_as_foreign

SCHEDULE = {"base_lrs": [0.1, 0.1], "last_epoch": 6}


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-6"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 6}')
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{}, {}]}, folder / "optimizer.pt")
    torch.save(SCHEDULE, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state(), "python": (3, (1, 2), None)}, folder / "rng_state.pth")
    return folder


def told(checkpoint, last_step=40):
    return "\n".join(strange_contents(checkpoint, last_step))


def test_an_own_one_passes(checkpoint):
    assert told(checkpoint) == ""
    assert told(checkpoint, 6) == ""


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_told_and_not_run(checkpoint, tmp_path, name, zipped):
    evil = {"a": Evil(tmp_path / "owned")}
    if zipped:
        torch.save(evil, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(evil))
    assert told(checkpoint) == f"{name} is damaged or foreign: it is more than tensors and numbers, or less"
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("state", [{"global_step": 10**9}, {"global_step": 5}, {"global_step": "6"}, {}, []])
def test_a_step_that_is_not_its_folder_s_is_told(checkpoint, state):
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert told(checkpoint).startswith("trainer_state.json is damaged or foreign: it")


def test_a_step_beyond_the_run_s_last_is_told(checkpoint):
    assert told(checkpoint, 5) == "it is of step 6, and the run has 5"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base_lrs": [0.1]}, "it has 1 learning rates, and optimizer.pt 2 groups"),
        ({"base_lrs": None}, "it holds no learning rates"),
        ({"last_epoch": 7}, "it stands at step 7, and the checkpoint at 6"),
    ],
)
def test_a_schedule_that_does_not_fit_is_told(checkpoint, changes, what):
    torch.save({**SCHEDULE, **changes}, checkpoint / "scheduler.pt")
    assert told(checkpoint) == f"scheduler.pt is damaged or foreign: {what}"


def test_states_that_are_no_states_are_told(checkpoint):
    torch.save([1], checkpoint / "optimizer.pt")
    assert told(checkpoint) == "optimizer.pt is damaged or foreign: it holds no states by name"


def test_a_run_of_strange_ones_alone_is_refused_as_a_wrong_file(checkpoint):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (checkpoint / name).write_text("{}")
    mark_complete(checkpoint)
    with pytest.raises(DamagedFileError, match="it is of step 6, and the run has 5") as caught:
        last_complete(checkpoint.parent, lambda one: strange_contents(one, 5))
    assert caught.value.exit_code == EXIT_BAD_RECIPE
    assert last_complete(checkpoint.parent, lambda one: strange_contents(one, 6)) == checkpoint


def test_what_a_library_cannot_take_up_is_told_by_the_checkpoint_s_name(tmp_path):
    place = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    with pytest.raises(DamagedFileError, match="checkpoint-6 is damaged or foreign") as caught, told_as_foreign(place):
        raise ValueError("zip() argument 2 is shorter")
    assert caught.value.problems[0].fix == f"rm -r {place} && qlora-kit train resume={tmp_path / 'run'}"
    assert "(zip() argument 2 is shorter)" in caught.value.problems[0].what


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), torch.AcceleratorError("device-side assert", 1)])
def test_a_fault_of_the_device_is_not_laid_on_the_checkpoint(tmp_path, error):
    with pytest.raises(type(error)), told_as_foreign(tmp_path / "checkpoint-6"):
        raise error
