"""A line that is pasted says to a program what was meant, whatever is in a name."""

import os
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qlora_kit.core.shell import is_line, override, read_hydra_text, shell_line

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
    "/a/*.jsonl",
    "a?.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_back_the_word(name, tmp_path):
    line = shell_line(["printf", "%s", name])
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path).stdout
    assert out.decode() == name
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\x85b", "a\u202eb", "a\u2028b", "\x9b'x'\\", "\udcff.jsonl"])
def test_what_a_terminal_does_not_show_is_written_out(name, tmp_path):
    line = shell_line(["printf", "%s", name])
    assert line.isprintable()
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True, cwd=tmp_path).stdout
    assert os.fsdecode(out) == name
    assert is_line(shell_line([override("data.train_file", name)]))


def test_letters_of_any_script_stay_as_they_are():
    assert shell_line(["क\u200dष", "漢", "👩\u200d🚀"]) == "'क\u200dष' '漢' '👩\u200d🚀'"


def test_a_path_is_never_read_as_a_flag(tmp_path):
    assert shell_line(["rm", "-r", Path("-x/checkpoints"), Path("--help"), "--force"]) == (
        "rm -r ./-x/checkpoints ./--help --force"
    )
    line = shell_line(["rm", Path("-a b")])
    (tmp_path / "-a b").write_text("")
    subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    assert shell_line([Path("a"), Path("/-x"), Path("./-x")]) == "a /-x ./-x"


@pytest.mark.parametrize("name", [*NAMES, "", " ", "a(b)", "{a}", "\\", "a\\\\'b"])
def test_hydra_reads_back_the_value(name):
    (parsed,) = OverridesParser.create().parse_overrides([override("data.train_file", name)])
    assert str(parsed.value()) == name
    assert read_hydra_text(override("data.train_file", name).split("=", 1)[1]) == name


@pytest.mark.slow
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20))
def test_hydra_reads_back_any_text(name):
    (parsed,) = OverridesParser.create().parse_overrides([override("name", f"x{name}")])
    assert OmegaConf.create({"name": str(parsed.value())}).name == f"x{name}"
    assert read_hydra_text(override("name", f"x{name}").split("=", 1)[1]) == f"x{name}"


def test_a_dollar_stays_text():
    (parsed,) = OverridesParser.create().parse_overrides([override("name", "a${oc.env:HOME}b")])
    assert OmegaConf.create({"name": parsed.value()}).name == "a${oc.env:HOME}b"
    assert read_hydra_text(override("name", "a${oc.env:HOME}b").split("=", 1)[1]) == "a${oc.env:HOME}b"


def test_a_glob_is_quoted_for_the_shell_alone():
    assert shell_line([override("data.train_file", "/a/*.jsonl")]) == "'data.train_file=/a/*.jsonl'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.r=8", True),
        ("lora.targets=[all_linear] lora.modules_to_save=[lm_head]", True),
        ("'data.columns={prompt: question}'", True),
        ("qlora-kit train resume=latest", True),
        ("qlora-kit train --help", True),
        ("qlora-kit recipes copy experiment/a b", True),
        ("pip install -c constraints.txt '.[gguf]'", True),
        ("jq -c '.train[]' a.json > a.train.jsonl", True),
        ("rm 'it'\"'\"'s'", True),
        ("'data.train_file=a<b>.jsonl'", True),
        ("data.train_file=$'a\\x0ab'", True),
        ("qlora-kit train a=1 && qlora-kit export run=latest", True),
        ("data.train_file=<a file of rows>", False),
        ("model.revision=<commit>", False),
        ("make room", False),
        ("add debug=true to see where", False),
        ("model.attention=sdpa or data.batching=padded", False),
        ("run=a, or base=b, not both", False),
        ("qlora-kit eval base=a, or qlora-kit report base=a", False),
        ("qlora-kit train --help lists every field", False),
        ("imatrix: true", False),
        ("", False),
    ],
)
def test_what_can_be_pasted_is_told_from_advice(text, expected):
    assert is_line(text) is expected
