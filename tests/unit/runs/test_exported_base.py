"""Which exports `base=` names for eval and report: by folder, by the word that export was given, or the newest."""

import os

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.runs.exported_base import find_exported_base


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Exports below outputs/ of the working folder, each newer than the one before."""
    monkeypatch.chdir(tmp_path)
    made = []

    def exports(place, base):
        folder = tmp_path / place
        (folder / "exports" / "gguf_q8_0").mkdir(parents=True)
        note = folder / "export.yaml"
        note.write_text(f"base: {base}\n")
        made.append(note)
        os.utime(note, (1000 + len(made), 1000 + len(made)))
        return folder

    return exports


def refused(name):
    with pytest.raises(RecipeError) as caught:
        find_exported_base(name)
    (problem,) = caught.value.problems
    assert problem.where == f"base={name}"
    return problem.what, problem.fix


def test_a_folder_a_base_or_the_newest(make, tmp_path, capsys):
    (tmp_path / "models" / "b").mkdir(parents=True)
    make("outputs/b/1", "models/b")
    second = make("outputs/b/2", "models/b")
    other = make("outputs/c/1", "smollm2_360m")
    away = make("away", "models/b")
    assert find_exported_base("outputs/b/1").path.name == "1"
    assert find_exported_base(str(away)).path == away
    assert find_exported_base("models/b").path.resolve() == second
    assert find_exported_base(str(tmp_path / "models" / "b")).path.resolve() == second
    assert find_exported_base("smollm2_360m").path.resolve() == other
    assert find_exported_base("latest").path.resolve() == other
    assert capsys.readouterr().err == "latest is outputs/c/1\n"


def test_exports_whose_note_is_damaged_are_passed_over_by_name(make):
    make("outputs/b/1", "models/b")
    for place, note in (("outputs/b/2", "a: ["), ("outputs/b/3", "- 1"), ("outputs/b/4", "base: 7")):
        (make(place, "models/b") / "export.yaml").write_text(note)
    assert find_exported_base("models/b").path.parts[-1] == "1"


def test_no_exports_at_all(make):
    fix = "qlora-kit export base=<folder> export=gguf_q4_k_m"
    assert refused("latest") == ("there are no exports of a base below outputs/", fix)


def test_what_is_no_exports_of_a_base(make, tmp_path):
    make("outputs/mine/1", "models/mine")
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "models" / "new" / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    named = "no exports of a base of that name lie below outputs/"
    assert refused("run") == ("run is the directory of a training run", "run=run")
    inside = "lies inside of what base= names"
    assert refused("outputs/mine/1/exports") == (f"outputs/mine/1/exports {inside}", "base=outputs/mine/1")
    file = "outputs/mine/1/exports/gguf_q8_0"
    assert refused(file) == (f"{file} {inside}", "base=outputs/mine/1")
    assert refused("models/new") == (
        "no exports of models/new lie below outputs/",
        "qlora-kit export base=models/new export=gguf_q4_k_m",
    )
    assert refused("models/mien") == (
        f"models/mien is no folder, and {named}; did you mean 'models/mine'?",
        "base=models/mine",
    )
    assert refused("run/..") == (f"run/.. holds no export.yaml, and {named}", "base=latest")
