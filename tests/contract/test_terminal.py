"""Text of strangers reaches the terminal without escape sequences, whichever way it comes."""

import json
import os

import pytest

from qlora_kit.cli.verbs import main
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.slow

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "llama")


def pair(asked, answer="b", **columns):
    return {"prompt": asked, "completion": answer, **columns}


ROWS = {
    "a row": [pair(f"a{EVIL}"), pair("c", f"d{EVIL}")],
    "a column that is not used": [pair("a", **{f"note{EVIL}": 1})],
    "columns of no format": [{f"ask{EVIL}": "a", "say": "b"}],
    "a role": [{"messages": [{"role": f"bot{EVIL}", "content": "a"}]}],
    "a special token in a text": [pair(f"a</s>{EVIL}")],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows(tmp_path, capfd, base, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    main(
        ["inspect", "model=demo", f"model.source={base}", "data=rows", f"data.train_file={path}", "data.max_tokens=64"]
    )
    shown(capfd)


NAMES = {
    "the file of the rows": ["data.train_file={evil}.jsonl"],
    "a template that is not there": ["data.train_file={rows}", "model.chat_template={evil}.jinja"],
    "a template that refuses": ["data.train_file={rows}", "model.chat_template={template}"],
    "a base that is not there": ["data.train_file={rows}", "model.source={evil}"],
    "a value of the recipe": ["data.train_file={rows}", "data.batching={evil}"],
}


@pytest.mark.parametrize("words", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("debug", [[], ["debug=true"]], ids=["", "debug"])
def test_names(tmp_path, capfd, base, words, debug):
    rows, template, evil = tmp_path / "a.jsonl", tmp_path / "t.jinja", tmp_path / f"x{EVIL}"
    rows.write_text(json.dumps(pair("a")), encoding="utf-8")
    template.write_text("{{ raise_exception('no EVIL') }}".replace("EVIL", EVIL), encoding="utf-8")
    quoted = [word.format(evil=f"'{evil}'", rows=rows, template=template) for word in words]
    main(["inspect", "model=demo", f"model.source={base}", "data=rows", "data.max_tokens=64", *quoted, *debug])
    shown(capfd)


def shown(capfd):
    out, err = capfd.readouterr()
    assert "␛" in out + err, "what the stranger wrote is not shown at all"
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err)


def test_a_verb_that_is_not_there(capfd):
    main([f"x{EVIL}"])
    shown(capfd)


def test_an_answer_of_a_model_keeps_its_lines(capfd):
    from qlora_kit.core.console.lines import show

    show(f"one\n\ttwo{EVIL}", end="")
    assert capfd.readouterr().out == "one\n\ttwo␛]0;owned␇␛[2J\ufffd31m"


def test_tables_and_consoles(capfd):
    from qlora_kit.core.console.safe import SafeConsole
    from qlora_kit.report.table import print_table

    print_table(f"title{EVIL}", ["name", f"size{EVIL}"], [[f"a{EVIL}", "pip install 'kit[gguf]'"]])
    out, _ = capfd.readouterr()
    assert "\x1b" not in out
    assert "kit[gguf]" in out
    SafeConsole(force_terminal=True, color_system="standard").print(f"a[/b]{EVIL}", style="bold", highlight=False)
    drawn = capfd.readouterr().out
    assert "a[/b]␛]0;owned" in drawn, "brackets are no markup"
    assert drawn.startswith("\x1b[1m"), "the kit's own styles are still drawn"
    assert os.linesep in drawn
