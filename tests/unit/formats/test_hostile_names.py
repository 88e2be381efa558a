"""Names with anything in them do no more than stand in the files and lines that hold them."""

import ast
import os
import re
import stat
import subprocess
from html import unescape
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt

from qlora_kit.data.template.ollama import MODELFILE, Modelfile
from qlora_kit.export.serving.commands import Served
from qlora_kit.export.serving.model_card import write_model_card
from qlora_kit.formats.gguf.modelfile import write_modelfile
from qlora_kit.formats.gguf.serving import ollama_name
from qlora_kit.formats.registry import FORMATS
from qlora_kit.runs.base import Base
from tests.served_artifact import Made

NAMES = [
    "$(touch X)",
    "`touch X`",
    "a b",
    "it's",
    'say "x"',
    "a;touch X",
    "a\ntouch X\nFROM bad",
    "é 漢 👍",
    "<script>alert(1)</script>",
    "[a](http://example.org) ![b](c)",
    "a_b *c* _d_ ~~e~~ |f| #g",
    "\\",
    "---\nlicense: mit",
]
TAGS = {"h1", "h2", "p", "ul", "li", "code", "pre", "strong", "table", "thead", "tbody", "tr", "th", "td"}
STUB = """#!/bin/bash
printf '%s\\0' "$@" >> ../said
[ {name} != python ] || cat >> ../read
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Programs that only note what they were given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "python", "llama-server", "ollama", "lms"):
        program = folder / name
        program.write_text(STUB.format(name=name))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_shell_hands_names_over_as_they_are(name: str, kind: str, stubs: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    served = Served(name, f"/x/{name}", f"{name}.gguf" if "gguf" in kind else ".", base=f"o/{name}")
    lines = "\n".join(line for command in FORMATS[kind].serve_commands(served) for line in command.lines)
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", lines], check=True, cwd=work, env=environment, stdin=subprocess.DEVNULL)
    assert not list(work.iterdir())
    said = (tmp_path / "said").read_text().split("\0")
    given = {served.path, served.root, name, f"o/{name}", f"{name}={served.root}", f"/x/{name}/Modelfile"}
    given.add(ollama_name(name))
    read = tmp_path / "read"
    tree = ast.parse(read.read_text() if read.exists() else "")
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert given & set(said) or served.root in texts
    assert served.root in texts or not texts
    assert not [word for word in set(said) - given if "touch" in word or "script" in word]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_card_shows_names_and_obeys_none(facts: Made, base: Path, tmp_path: Path, name: str) -> None:
    made = facts(name=name, base=Base(f"./{name}", base, name), settings={"mix": name}, faults=(name,))
    assert made.run is not None
    made.run.data.write_text(made.run.data.read_text().replace("rows.jsonl", "rows.jsonl`<b>"))
    write_model_card(tmp_path, made)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata is not None and metadata["license"] == "other"
    body = (tmp_path / "README.md").read_text("utf-8").removeprefix("---\n").partition("\n---\n")[2]
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    assert set(re.findall(r"<(\w+)", html)) <= TAGS
    (heading,) = re.findall(r"<h1>(.*)</h1>", html)
    assert unescape(heading) == _as_line(name)
    assert f"<li>{heading}</li>" in html


@pytest.mark.parametrize("name", NAMES)
def test_a_modelfile_has_one_base_whatever_its_names_hold(facts: Made, base: Path, tmp_path: Path, name: str) -> None:
    write_modelfile(tmp_path, facts(name=name, base=Base(f"./{name}", base), file=f"{name}.gguf"))
    text = (tmp_path / MODELFILE).read_text("utf-8")
    assert sum(line.startswith("FROM") for line in text.splitlines()) == 1
    assert Modelfile.read(text).source == f"./{_as_line(name)}.gguf"


def test_a_stop_token_that_a_modelfile_cannot_hold_is_told(
    facts: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = facts()
    made.tokenizer.add_special_tokens({"eos_token": '<"end"'})
    write_modelfile(tmp_path, made)
    text = (tmp_path / MODELFILE).read_text("utf-8")
    assert '<"end"' not in Modelfile.read(text).stops
    assert '# Ollama cannot be told to stop at the token <"end".' in text


def _as_line(name: str) -> str:
    return name.replace("\n", "␊")
