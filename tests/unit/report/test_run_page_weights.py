"""The page's tables of merge bases and of what rounding left of the update."""

import json
import re

import pytest

from qlora_kit.report.run_page import run_page
from qlora_kit.report.run_page_facts import Artifact, Environment, RunPage, Survival
from qlora_kit.report.run_page_read import read_run
from qlora_kit.runs.directory import RunDirectory
from tests.html_reader import read

WARNING = "the file keeps 66% of what was learned; 2 of 4 weights keep less than 50%: a 44%\n  try      more bits"
SURVIVAL = {
    "kept": 0.664,
    "noise": 6.4,
    "worst": "model.layers.1.mlp.gate_proj.weight",
    "worst_kept": 0.44,
    "kinds": {"q_proj": {"kept": 0.9, "worst_kept": 0.8}, "gate_proj": {"kept": -0.001, "worst_kept": -0.25}},
    "warning": WARNING,
}


def words(html):
    return " ".join(" ".join(read(html).texts).split())


@pytest.fixture
def page_of(tmp_path):
    """The page of a run with one exported file by name, from the records of its manifest."""

    def write(**manifests):
        run = RunDirectory(tmp_path / "outputs" / "mine" / "2026-01-31_12-30-00")
        for name, manifest in manifests.items():
            place = run.exports / name / "manifest.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps({"format": "gguf", **manifest}))
        run.recipe.write_text("")
        return run_page(read_run(run))

    return write


def page_with(*artifacts):
    """The page of a run that has these and no more."""
    run = RunPage(
        path="runs/a",
        name="a",
        started="",
        is_finished=True,
        recipe=None,
        recipe_yaml="",
        overrides=(),
        environment=Environment(),
        metrics=(),
        result={},
        splits=(),
        artifacts=artifacts,
        samples=(),
        missing=(),
    )
    return run_page(run)


def section(html, name):
    found = re.search(f'<section id="{name}">(.*?)</section>', html, re.DOTALL)
    return found and words(found[1])


def test_each_base_has_its_loss_and_the_one_taken_is_named(page_of):
    html = page_of(
        nf4={"merge": {"base": "original"}, "merge_bases": {"dequantized": 2.9931327, "original": 0.0150524}},
        q8={"merge": {"base": "dequantized"}, "merge_bases": {"dequantized": 0.0138769, "original": 0.0238862}},
        lora={"merge": {"base": "dequantized"}},
    )
    said = section(html, "bases")
    assert said.startswith(
        "Merge bases file dequantized loss, nats original loss, nats nf4 2.9931 0.0151 taken q8 0.0139 taken 0.0239 "
    )
    assert "lora" not in said
    assert section(html, "survival") is None


def test_the_share_of_the_update_is_shown_by_kind_with_its_warning(page_of):
    html = page_of(
        q2={"survival": SURVIVAL}, q8={"survival": {"kept": 1.0, "worst_kept": 0.991, "warning": ""}}, nf4={}
    )
    said = section(html, "survival")
    assert said.startswith(
        "What is left of the update file verdict all layers least q_proj least gate_proj least "
        "q2 partly lost 66% 44% 90% 80% 0% less than none q8 kept 100% 99% - - "
        "q2: the file keeps 66% of what was learned; 2 of 4 weights keep less than 50%: a 44% q2: try more bits "
    )
    assert said.endswith("Not measured for nf4.")
    assert section(html, "bases") is None


def test_there_are_no_sections_without_anything_to_show(page_of):
    html = page_of(q8={"survival": {}, "merge_bases": {}})
    assert section(html, "bases") is section(html, "survival") is None


@pytest.mark.parametrize("value", [None, "x", [], {}, True, {"kept": "much"}, {"q_proj": 1}])
def test_values_of_the_wrong_kind_count_as_absent(page_of, value):
    part = {"kept": 0.5, "worst_kept": value, "kinds": {"q_proj": value}, "warning": value}
    html = page_of(a={"survival": part, "merge": value, "merge_bases": {"original": value}}, b={"survival": value})
    verdict = "partly lost" if value == "x" else "not judged"
    assert f" a {verdict} 50% - - " in section(html, "survival")
    assert section(html, "bases") is None


def test_numbers_that_are_none_are_said():
    nan = float("nan")
    assert "not a number" in section(page_with(Artifact("a", "gguf", merge_bases={"original": nan})), "bases")
    assert "not a number" in section(page_with(Artifact("a", "gguf", survival=Survival(nan))), "survival")


def test_a_base_that_was_not_tried_for_a_file_is_a_dash():
    both = Artifact("a", "gguf", merge_base="dequantized", merge_bases={"dequantized": 1.0, "original": 2.0})
    one = Artifact("b", "gguf", merge_base="original", merge_bases={"original": 2.0})
    assert "b - 2.0000 taken" in section(page_with(both, one), "bases")


def test_advice_that_files_share_is_given_once():
    files = [Artifact(name, "gguf", survival=Survival(0.1, warning=WARNING)) for name in ("a", "b")]
    said = section(page_with(*files), "survival")
    assert said.count("try more bits") == 1
    assert "a: the file keeps" in said
    assert "b: the file keeps" in said
    assert "a, b: try more bits" in said


def test_no_text_of_a_manifest_acts_as_html(page_of):
    nasty = "</style><script>x</script>"
    found = {**SURVIVAL, "kinds": {nasty: {"kept": 1.0}}, "warning": f"{nasty}\n{nasty}"}
    html = page_of(a={"survival": found, "merge": {"base": nasty}, "merge_bases": {nasty: 1.0}})
    assert "script" not in {tag for tag, _ in read(html).tags}
    assert "taken" in section(html, "bases")
