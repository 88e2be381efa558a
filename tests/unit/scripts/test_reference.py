"""The reference pages say all that the recipe classes and files do."""

from pathlib import Path

import pytest

from qlora_kit.schema.explain import shown_default
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.walk import schema_paths

TOP = Path(__file__).parents[3]


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(TOP / "scripts"))
    import reference

    return reference


def rows(page):
    """First cell -> the others, of every table of a page."""
    lines = [line.replace("\\|", "\0") for line in page.splitlines() if line.startswith("| `")]
    cells = [[cell.strip().replace("\0", "|") for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


@pytest.mark.parametrize("verb", RECIPE_OF_VERB)
def test_every_field_has_its_default_help_unit_and_bounds(reference, verb):
    found = rows(reference.pages()[f"reference/{verb}.md"])
    fields = list(schema_paths(RECIPE_OF_VERB[verb]))
    assert list(found) == [path for path, _, _ in fields]
    for path, _, field in fields:
        knob = field.metadata["knob"]
        default, told = (cell.replace("\\", "").replace("&lt;", "<") for cell in found[path])
        assert default == shown_default(field)
        assert told.startswith(knob.help.replace("\\", ""))
        for word, value in (("in", knob.unit), ("at least", knob.minimum), ("above", knob.above)):
            assert not value or f"{word} {value if isinstance(value, str) else format(value, 'g')}" in told, path


def test_a_bound_is_written_out(reference):
    assert rows(reference.pages()["reference/train.md"])["lora.r"] == ["16", "Rank of the update.<br>*int; at least 1*"]


def test_every_recipe_file_is_on_the_page_of_groups(reference):
    found = rows(reference.pages()["reference/groups.md"])
    files = list((TOP / "recipes").glob("*/*.yaml"))
    assert len(files) > 80
    assert {path.stem for path in files} == set(found)
    assert found["adamw_8bit"] != [""]


def test_signs_of_markdown_and_html_are_shown_as_they_are(reference):
    assert reference._cell("a|b <c> *d* [e] `f_<g>`") == "a\\|b &lt;c> \\*d\\* \\[e] `f_<g>`"


def test_the_page_of_each_verb_is_in_the_navigation(reference):
    navigation = (TOP / "mkdocs.yml").read_text("utf-8")
    assert [page for page in reference.pages() if f": {page}\n" not in navigation] == []
    ours = [str(path.relative_to(TOP / "docs")) for path in (TOP / "docs").rglob("*.md")]
    assert [page for page in ours if f": {page}\n" not in navigation] == []
