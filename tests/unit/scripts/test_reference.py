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
    """Path, or first cell where no group is named above -> the other cells, of every table of a page."""
    found, group = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            group = "" if line == "## Without a group" else f"{line[3:]}."
        if line.startswith("| `"):
            cells = [cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").strip("| ").split(" | ")]
            found[group + cells[0].strip("`")] = cells[1:]
    return found


@pytest.mark.parametrize("verb", RECIPE_OF_VERB)
def test_every_field_has_its_default_help_unit_and_bounds(reference, verb):
    found = rows(reference.pages()[f"reference/{verb}.md"])
    fields = list(schema_paths(RECIPE_OF_VERB[verb]))
    assert set(found) == {path for path, _, _ in fields}
    for path, _, field in fields:
        setting = field.metadata["setting"]
        default, told = (cell.replace("\\", "").replace("&lt;", "<") for cell in found[path])
        assert default == ("**required**" if field.default == "???" else shown_default(field))
        assert told.startswith(setting.help.replace("\\", ""))
        for word, value in (("in", setting.unit), ("at least", setting.minimum), ("above", setting.above)):
            assert not value or f"{word} {value if isinstance(value, str) else format(value, 'g')}" in told, path


def test_a_bound_and_a_required_field_are_told(reference):
    found = rows(reference.pages()["reference/train.md"])
    assert found["lora.r"] == ["16", "Rank of the update.<br>*int; at least 1*"]
    assert found["model.source"][0] == "**required**"


def test_every_recipe_file_is_on_the_page_of_groups(reference):
    found = rows(reference.pages()["reference/groups.md"])
    files = list((TOP / "recipes").glob("*/*.yaml"))
    assert len(files) > 80
    assert {f"{path.parent.name}.{path.stem}" for path in files} == set(found)
    assert found["optim.adamw_8bit"] != [""]


def test_signs_of_markdown_and_html_are_shown_as_they_are(reference):
    assert reference._cell("a|b <c> *d* [e] `f_<g>`") == "a\\|b &lt;c> \\*d\\* \\[e] `f_<g>`"


def test_the_page_of_each_verb_is_in_the_navigation(reference):
    navigation = (TOP / "mkdocs.yml").read_text("utf-8")
    assert [page for page in reference.pages() if f": {page}\n" not in navigation] == []
    ours = [str(path.relative_to(TOP / "docs")) for path in (TOP / "docs").rglob("*.md")]
    assert [page for page in ours if f": {page}\n" not in navigation] == []
