"""The pip line of a missing extra fits how the kit was installed."""

import shlex

import pytest
from packaging.requirements import Requirement

from qlora_kit.core.extras import install_from, install_line, is_install_line, missing_extra


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "it's a checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("")
    return folder


def test_in_the_checkout_the_line_is_short(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    assert install_from("gguf", checkout, {}) == "pip install -c constraints.txt -e '.[gguf]'"


def test_elsewhere_the_line_names_the_checkout_and_survives_a_shell(checkout):
    line = install_from("gguf", checkout, {})
    assert shlex.split(line)[2:] == ["-c", f"{checkout}/constraints.txt", "-e", f"{checkout}[gguf]"]


def test_a_folder_that_was_copied_is_copied_again(checkout):
    line = install_from("gguf", None, {"url": checkout.as_uri(), "dir_info": {}})
    assert shlex.split(line)[2:] == ["-c", f"{checkout}/constraints.txt", f"{checkout}[gguf]"]


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        ({"url": "file:///tmp/w/qlora_kit-0.1.0-py3-none-any.whl", "archive_info": {}}, None),
        (
            {"url": "https://example.org/kit.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b2c"}},
            "git+https://example.org/kit.git@0a1b2c",
        ),
    ],
)
def test_a_file_or_a_repository_is_named(origin, url):
    pip, install, what = shlex.split(install_from("gguf", None, origin))
    assert (pip, install) == ("pip", "install")
    wanted = Requirement(what)
    assert (wanted.name, wanted.extras, wanted.url) == ("qlora-kit", {"gguf"}, url or origin["url"])


def test_what_came_from_an_index_comes_from_there_again():
    assert install_from("gguf", None, {}) == "pip install 'qlora-kit[gguf]'"


def test_errors_hold_the_line():
    assert missing_extra("xllamacpp", "this", "gguf").problems[0].fix == install_line("gguf")
    assert "[gguf]" in install_line("gguf")
    assert is_install_line(install_line("gguf")) and not is_install_line("export=merged_16bit")
