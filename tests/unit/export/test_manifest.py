"""manifest.json of any folder, a damaged or a stranger's too."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import write_json
from qlora_kit.export.manifest import faults_of_export, read_manifest, record_scores

GOOD = {"format": "gguf", "file": "m.gguf"}


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ("5", "does not hold a JSON object"),
        ("{}", "does not say which file there is"),
        ('{"format": 5, "file": "m.gguf"}', "does not say which file there is"),
        ('{"format": "gguf", "file": "../../m.gguf"}', "names a file outside its folder"),
        ('{"format": "gguf", "file": "/m.gguf"}', "names a file outside its folder"),
    ],
)
def test_one_that_names_no_file_of_its_own_is_refused_by_name(tmp_path, held, why):
    (tmp_path / "manifest.json").write_text(held, encoding="utf-8")
    with pytest.raises(RecipeError, match=why) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)


def test_what_is_of_another_kind_is_left_out(tmp_path):
    odd = {**GOOD, "settings": 5, "faults": "x", "evaluation": [], "max_mean_kl": "much", "fidelity": None}
    write_json(tmp_path / "manifest.json", odd)
    assert read_manifest(tmp_path) == GOOD


def test_faults_that_scores_add_go_with_those_scores(tmp_path):
    write_json(tmp_path / "manifest.json", {**GOOD, "faults": ["no begin token"]})
    for faults in (["mean KL 3"], ["mean KL 2"], []):
        record_scores(tmp_path, {"verdict": "rejected", "rejected": True, "faults": faults}, {"rows": 3})
        found = read_manifest(tmp_path)
        assert found["faults"] == ["no begin token", *faults]
        assert faults_of_export(found) == ["no begin token"]
        assert found["evaluated_on"] == {"rows": 3}
