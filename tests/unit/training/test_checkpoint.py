"""A checkpoint counts only when it is whole; a damaged one is named, and the one before is taken."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from qlora_kit.core.errors import RunError
from qlora_kit.training.checkpoint import MARK, keep_newest, last_complete, mark_complete, step_of, whole_or_none

FILES = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"),
    *("scheduler.pt", "trainer_state.json", "training_args.bin"),
)


def written(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_bytes(f"{name} at {step} ".encode() * 50)
    return checkpoint


def whole(folder, *steps):
    for step in steps:
        mark_complete(written(folder, step))
    return folder / f"checkpoint-{steps[-1]}"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def garbage(path):
    path.write_bytes(b"\x00\xff" * 100)


def gone(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def nested(path):
    path.write_text("[" * 100_000)


def without_names(path):
    path.write_text(json.dumps({"files": {}}))


DAMAGES = [
    ("optimizer.pt", cut, "optimizer.pt has 450 bytes, and was written with 900"),
    ("optimizer.pt", emptied, "optimizer.pt has 0 bytes"),
    ("optimizer.pt", gone, "optimizer.pt is missing"),
    ("scheduler.pt", gone, "scheduler.pt is missing"),
    ("rng_state.pth", gone, "rng_state.pth is missing"),
    ("trainer_state.json", gone, "trainer_state.json is missing"),
    ("trainer_state.json", garbage, "trainer_state.json has 200 bytes"),
    ("adapter_model.safetensors", gone, "adapter_model.safetensors is missing"),
    ("adapter_model.safetensors", flipped, "adapter_model.safetensors holds other bytes than were written"),
    ("adapter_config.json", a_folder, "adapter_config.json is missing"),
    (MARK, cut, f"{MARK} cannot be read"),
    (MARK, emptied, f"{MARK} cannot be read"),
    (MARK, garbage, f"{MARK} cannot be read"),
    (MARK, nested, f"{MARK} cannot be read"),
    (MARK, without_names, f"{MARK} cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, name, damage, told):
    newest = whole(tmp_path, 2, 4)
    damage(newest / name)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    said = capsys.readouterr().err
    assert f"{newest} is damaged: {told}" in said and "going on from checkpoint-2" in said
    assert not newest.exists()


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGES[:3])
def test_nothing_is_begun_anew_in_silence_and_nothing_deleted_when_no_checkpoint_is_whole(tmp_path, name, damage, told):
    whole(tmp_path / "checkpoints", 2, 4)
    for step in (2, 4):
        damage(tmp_path / "checkpoints" / f"checkpoint-{step}" / name)
    with pytest.raises(RunError, match="can only start again from step 0") as caught:
        last_complete(tmp_path / "checkpoints")
    assert str(caught.value).count(told) == 2
    places = tmp_path / "checkpoints", tmp_path
    assert caught.value.problems[0].fix == "rm -r {} && qlora-kit train resume={}".format(*places)
    assert sorted(path.name for path in places[0].iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_the_newest_whole_one_wins_and_half_written_ones_go(tmp_path, capsys):
    whole(tmp_path, 5, 10)
    written(tmp_path, 100)
    found = last_complete(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert found is not None and step_of(found) == 10
    assert not (tmp_path / "checkpoint-100").exists()
    said = f"{tmp_path / 'checkpoint-100'} was not written to its end, so it is passed over and removed"
    assert capsys.readouterr().err == f"warning: {said}; going on from checkpoint-10\n"
    assert last_complete(tmp_path) == found
    assert capsys.readouterr().err == ""


def test_folders_of_other_names_are_left_alone(tmp_path):
    newest = whole(tmp_path, 2)
    for name in ("checkpoint-2.bak", "checkpoint-old", "checkpoint-", "checkpoint-3-copy"):
        shutil.copytree(newest, tmp_path / name)
    assert last_complete(tmp_path) == newest
    keep_newest(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 5


def test_one_of_an_older_kit_is_taken_with_a_word(tmp_path, capsys):
    old = written(tmp_path, 2)
    (old / "complete").write_text("")
    assert last_complete(tmp_path) == old
    assert f"{old} does not say what its files were, so they could not be verified" in capsys.readouterr().err
    emptied(old / "optimizer.pt")
    with pytest.raises(RunError, match=r"optimizer\.pt is empty"):
        last_complete(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_one_that_cannot_be_written_to_its_end_is_removed(tmp_path, error):
    before = whole(tmp_path, 2)
    with pytest.raises(type(error)), whole_or_none(tmp_path / "checkpoint-4"):
        written(tmp_path, 4)
        raise error
    with pytest.raises(type(error)), whole_or_none(tmp_path / "checkpoint-4"):
        raise error  # before there is a folder
    assert list(tmp_path.iterdir()) == [before]


def test_no_checkpoint(tmp_path, capsys):
    written(tmp_path, 3)
    assert last_complete(tmp_path) is None
    assert "checkpoint-3 was not written to its end" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert last_complete(tmp_path / "absent") is None


def test_all_is_on_the_disk_before_the_mark(tmp_path, monkeypatch):
    order = []
    fsync = os.fsync

    def noted(stream):
        order.append(str(Path(f"/proc/self/fd/{stream}").readlink()))
        fsync(stream)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint = whole(tmp_path, 2)
    marked = next(place for place, path in enumerate(order) if MARK in path)
    assert {*(f"{checkpoint}/{name}" for name in FILES), str(checkpoint)} <= set(order[:marked])
    assert {str(checkpoint), str(tmp_path)} <= set(order[marked:])


def test_only_the_newest_are_kept(tmp_path):
    whole(tmp_path, 9, 10, 11)
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
