"""Rows tokenized in a test go to a cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache, empty at the start of every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(folder))
    return folder
