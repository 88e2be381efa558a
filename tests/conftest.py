"""Every test draws alike, finds an empty cache, uses no network, and leaves environment and folder as they were."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.isolation import as_before, draw_alike, go_offline, refuse_network, set_libraries_aside


def pytest_configure() -> None:
    go_offline()  # before a library reads it
    sys.addaudithook(refuse_network)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    set_libraries_aside()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The test draws alike each time, and nothing that it sets outlives it."""
    draw_alike()
    with as_before():
        yield


@pytest.fixture(autouse=True)
def cache(alone: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty at the start of every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(folder))
    return folder
