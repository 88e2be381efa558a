"""What is in the wheel, and what the constraints hold."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from qlora_kit import __version__
from tests.chat_templates import trl_templates

ROOT = Path(__file__).resolve().parents[2]


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.iterdir())


@pytest.mark.slow
def test_the_wheel_holds_the_package_every_recipe_and_nothing_else(tmp_path):
    names = set(zipfile.ZipFile(build("wheel", tmp_path)).namelist())
    recipes = {f"qlora_kit/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "qlora_kit").rglob("*.py")}
    kinds = ("*.css", "*.jinja", "*.json", "*.txt")
    files = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "qlora_kit").rglob(kind)}
    assert len(files) >= 7
    metadata = {name for name in names if ".dist-info/" in name}
    assert len(recipes) > 80
    assert names == recipes | modules | files | metadata | {"qlora_kit/py.typed"}
    assert {name.rsplit("/", 1)[1] for name in metadata if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert any(name.endswith("entry_points.txt") for name in metadata)


@pytest.mark.slow
def test_the_source_archive_builds_the_same_recipes(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")} <= names
    assert {"LICENSE", "NOTICE", "README.md", "constraints.txt", "pyproject.toml", "scripts/quickstart"} <= names


def test_whoever_is_named_in_the_notice_has_a_copyright_line_and_a_license():
    parts = (ROOT / "NOTICE").read_text(encoding="utf-8").split("\n\n\n")
    assert [part.strip().splitlines()[0].split(" (")[0] for part in parts] == [
        "qlora-kit",
        "Under the MIT License",
        "Under the Apache License, Version 2.0",
        "Under other terms",
        "MIT License",
    ]
    works = [work for part in parts[1:4] for work in part.strip().split("\n\n")[1:]]
    assert len(works) >= 12
    for work in works:
        lines = work.splitlines()
        assert "https://" in lines[0]
        assert "Copyright" in work
        assert any(line.startswith("  - ") for line in lines)


def test_no_chat_template_in_the_tree_is_a_published_one():
    published = {
        line.strip() for path in trl_templates().glob("*.jinja") for line in path.read_text("utf-8").splitlines()
    }
    ours = [path for folder in ("tests", "qlora_kit") for path in (ROOT / folder).rglob("*.jinja")]
    assert len(published) > 1000
    assert len(ours) >= 11
    for path in ours:
        lines = {line.strip() for line in path.read_text("utf-8").splitlines()}
        assert not {line for line in lines & published if len(line) > 45}, path


def test_every_declared_package_is_pinned_inside_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    declared = [Requirement(line) for line in [*project["dependencies"], *(part for extra in extras for part in extra)]]
    pins = _pins()
    for wanted in declared:
        if wanted.name == project["name"]:
            continue
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is not None, f"{wanted.name} is not in constraints.txt"
        assert wanted.specifier.contains(pin, prereleases=True), f"{wanted.name}=={pin} is outside {wanted.specifier}"


def test_all_names_every_extra_that_users_have():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\w+", extras["all"][0].split("[")[1]))
    # harness needs packages that exist as sources only, which would be built at every installation.
    assert named == set(extras) - {"all", "dev", "docs", "export", "harness"}


def test_every_file_that_names_the_version_names_the_same():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__
    headings = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == __version__


def test_forms_of_issues_ask_for_something_and_the_workflow_runs_what_ci_runs():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text("utf-8"))
        assert {"name", "description", "body"} <= set(form)
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in asked}) == len(asked) > 1
        assert any(part.get("validations", {}).get("required") for part in asked)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert (ROOT / ".ci/run").is_file()


def test_constraints_hold_pins_only():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(_pins()) == len(pins)


def _pins() -> dict[str, str]:
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}
