"""A line that is pasted says to a program what was meant, whatever is in a name."""

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qlora_kit.core.shell import override, read_hydra_text, shell_line

NAMES = [
    "plain",
    "a b",
    "it's",
    'say "x"',
    "$(touch x)",
    "`x`",
    "a;b",
    "a\nb",
    "x\\",
    "\\'",
    "é ü 漢",
    "~/x",
    "#x",
    "a=b,c",
    "[1]",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_back_the_word(name, tmp_path):
    line = shell_line(["printf", "%s", name])
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path).stdout
    assert out.decode() == name
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*NAMES, "", " ", "a(b)", "{a}", "\\", "a\\\\'b"])
def test_hydra_reads_back_the_value(name):
    (parsed,) = OverridesParser.create().parse_overrides([override("data.train_file", name)])
    assert str(parsed.value()) == name
    assert read_hydra_text(override("data.train_file", name).split("=", 1)[1]) == name


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20))
def test_hydra_reads_back_any_text(name):
    (parsed,) = OverridesParser.create().parse_overrides([override("name", f"x{name}")])
    assert str(parsed.value()) == f"x{name}"
    assert read_hydra_text(override("name", f"x{name}").split("=", 1)[1]) == f"x{name}"


def test_a_dollar_stays_text():
    (parsed,) = OverridesParser.create().parse_overrides([override("name", "a${oc.env:HOME}b")])
    assert OmegaConf.create({"name": parsed.value()}).name == "a${oc.env:HOME}b"
    assert read_hydra_text(override("name", "a${oc.env:HOME}b").split("=", 1)[1]) == "a${oc.env:HOME}b"
