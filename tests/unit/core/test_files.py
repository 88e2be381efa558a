"""Files are whole or absent."""

import math
from pathlib import Path

import pytest

from qlora_kit.core.errors import UnreadableFileError
from qlora_kit.core.files import (
    clear_left_overs,
    file_part,
    read_json,
    remove,
    size_on_disk,
    staged_directory,
    typed_path,
    write_json,
    write_text,
)


def test_staged_directory_takes_its_place(tmp_path):
    with staged_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_stage_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(OSError, match="disk is full"), staged_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise OSError("disk is full")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stage_that_cannot_take_its_place_keeps_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    rename = Path.rename

    def refuse(source, target):
        if target == tmp_path / "out" and (source / "a").read_text() == "new":
            raise PermissionError("read-only")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), staged_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stage_replaces_the_whole_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("old")
    with staged_directory(tmp_path / "out") as folder:
        (folder / "fresh").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fresh"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_text_leaves_no_partial_file(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "é\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "é\n".encode()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert size_on_disk(tmp_path) == 3


def test_what_a_killed_process_left_is_undone(tmp_path):
    (tmp_path / ".new.12345678.partial").mkdir()
    (tmp_path / ".new.12345678.partial" / "half").write_text("")
    (tmp_path / ".file.json.12345678.partial").write_text("half")
    for name in (".moved.12345678.before", ".replaced.12345678.before", "replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    clear_left_overs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "replaced"]
    assert (tmp_path / "moved" / "from").read_text() == ".moved.12345678.before"
    assert (tmp_path / "replaced" / "from").read_text() == "replaced"


def test_a_stage_takes_the_place_of_a_link_and_leaves_its_aim(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a").write_text("moved")
    (tmp_path / "out").symlink_to(tmp_path / "big")
    for text in ("new", "newer"):
        with staged_directory(tmp_path / "out") as folder:
            (folder / "a").write_text(text)
        assert (tmp_path / "out" / "a").read_text() == text
        assert (tmp_path / "big" / "a").read_text() == "moved"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "out"]


def test_a_stage_takes_the_place_of_a_link_whose_aim_is_gone(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with staged_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_left_overs_that_are_links_are_put_back_or_unlinked(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a").write_text("moved")
    folder = tmp_path / "exports"
    (folder / "taken").mkdir(parents=True)
    for name in (".taken.0a1b2c3d.before", ".half.0a1b2c3d.partial", ".free.0a1b2c3d.before"):
        (folder / name).symlink_to(tmp_path / "big")
    clear_left_overs(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["free", "taken"]
    assert (folder / "free").is_symlink()
    assert (tmp_path / "big" / "a").read_text() == "moved"


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a").write_text("moved")
    (tmp_path / "link").symlink_to(tmp_path / "big")
    remove(tmp_path / "link")
    assert (tmp_path / "big" / "a").read_text() == "moved"
    assert not (tmp_path / "link").is_symlink()
    remove(tmp_path / "big")
    remove(tmp_path / "big")
    assert not (tmp_path / "big").exists()


def test_a_name_is_one_part_of_a_path():
    assert file_part("a/b\nc\\d\x00é 漢") == "a_b_c_d_é 漢"


def test_json_never_holds_a_number_that_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN", "e": 3}})
    assert read_json(tmp_path / "a.json") == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN", "e": 3}}


@pytest.mark.parametrize("held", [b"{", b"5", b"[]", b"\xff\xfe", b"[" * 5000, b"", None])
def test_a_damaged_json_file_is_named(tmp_path, held):
    path = tmp_path / "a.json"
    if held is not None:
        path.write_bytes(held)
    with pytest.raises(UnreadableFileError) as caught:
        read_json(path)
    assert str(path) in caught.value.problems[0].what and caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)  # as which readers of strangers' files catch it


def test_a_typed_path_knows_the_home_folder_and_no_other_users(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert typed_path("~/a") == Path("/somewhere/a")
    assert typed_path("~nobody_of_this_name/a") == Path("~nobody_of_this_name/a")
