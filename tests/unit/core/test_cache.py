"""The user's cache: where it is, and what is said where it cannot be written."""

import shlex
import tempfile
from pathlib import Path

import pytest

from qlora_kit.core.cache import cache_folder, made_in_cache
from qlora_kit.core.errors import RecipeError


def test_the_kits_own_variable_goes_before_everyones_and_that_before_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("QLORA_KIT_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "qlora_kit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "qlora_kit"


def test_a_relative_folder_is_that_of_now_wherever_one_goes_later(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_KIT_CACHE", "cache")
    found = cache_folder()
    monkeypatch.chdir("/")
    assert found == tmp_path / "cache"


def test_a_folder_is_made_empty_and_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    place = made_in_cache("rows", "ab")
    assert place == tmp_path / "cache" / "rows" / "ab"
    assert list(place.iterdir()) == []
    (place / "kept").touch()
    assert [path.name for path in made_in_cache("rows", "ab").iterdir()] == ["kept"]


def test_a_cache_that_cannot_be_written_is_told_with_the_line_that_moves_it(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RecipeError) as caught:
        made_in_cache("rows")
    (problem,) = caught.value.problems
    assert problem.what == f"the cache {tmp_path / 'file' / 'cache'} cannot be written: Not a directory"
    assert problem.where == "QLORA_KIT_CACHE"
    assert shlex.split(problem.fix) == ["export", f"QLORA_KIT_CACHE={Path(tempfile.gettempdir(), 'qlora_kit_cache')}"]
