"""The rows a user looks at show what is trained, on a terminal and in a file, and errors stop a run."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from qlora_kit.core.errors import EXIT_BAD_RECIPE, EXIT_OK, RecipeError
from qlora_kit.data.audit.audit import audit, stop_on_errors, tell_warnings
from qlora_kit.data.prepare import prepare
from qlora_kit.pipelines.inspect import TRAINED_STYLE, Inspected, marked_text, print_inspection
from qlora_kit.schema.data import DataConfig, Overflow, RowFormat
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizers import smollm_tokenizer

TOKENIZER = smollm_tokenizer()


def config(folder, answer="the [answer]", **more):
    for name, prompts in (("train", "abc"), ("held_out", "d")):
        rows = [json.dumps({"prompt": f"{prompt} [bold]", "completion": answer}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    files = {"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "held_out.jsonl")}
    settings = {"max_tokens": 64, "cache": False, "processes": 1, "format": RowFormat.prompt_completion}
    return DataConfig(**{**files, **settings, **more})


def inspected(config):
    data = prepare(config, TOKENIZER)
    found = audit(data, TOKENIZER, 64, frozenset(), batch_size=2)
    return Inspected("my_recipe", data.train, data.summary, found, TOKENIZER)


def said(shown, rows, page=None, **console):
    stream = io.StringIO()
    print_inspection(shown, rows, page, Console(file=stream, **{"width": 200, **console}))
    return stream.getvalue()


def test_brackets_mark_the_trained_tokens_where_there_is_no_terminal(tmp_path):
    text = said(inspected(config(tmp_path)), 2)
    row = "<|im_start|>user\na [bold]<|im_end|>\n<|im_start|>assistant\n[[the [answer]<|im_end|>]]\n"
    assert row in text
    assert row.replace("\na ", "\nb ") in text
    assert "user\nc [bold]" not in text
    assert "loss tokens are marked with [[ ]]" in text


def test_the_numbers_are_those_of_the_rows(tmp_path):
    shown = inspected(config(tmp_path))
    lines = [line.split() for line in said(shown, 0).splitlines()]
    train, held_out = shown.summary.train, shown.summary.held_out
    share = f"{sum(shown.train.trained_counts.tolist()) / sum(shown.train.lengths.tolist()):.1%}"
    length = str(train.longest_row)
    assert ["train", "train", "3", str(train.tokens), share, length, "0"] in lines
    assert ["held", "out", "held", "out", "1", str(held_out.tokens), share, str(held_out.longest_row), "0"] in lines
    bar = next(line for line in lines if line and line[-1] == "3")
    assert bar[1] == "█" * 40


def test_a_terminal_gets_a_style_and_no_brackets(tmp_path):
    text = said(inspected(config(tmp_path)), 1, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mthe [answer]<|im_end|>\x1b[0m" in text
    assert "[[" not in text


def test_the_style_covers_the_trained_tokens_alone(tmp_path):
    row = prepare(config(tmp_path), TOKENIZER).train[0]
    text = marked_text(row, TOKENIZER, with_brackets=False)
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("the [answer]<|im_end|>", TRAINED_STYLE)
    ]


def test_findings_are_printed_with_their_places_and_fixes_in_one_line_each(tmp_path):
    text = said(inspected(config(tmp_path, answer="caf\u00c3\u00a9 [x]")), 0, width=20)
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("warning 3 rows hold text decoded"))
    assert lines[at + 1].split() == ["at", *(f"{tmp_path}/train.jsonl:{n}" + "," * (n < 3) for n in (1, 2, 3))]
    assert lines[at + 2].split()[0] == "do"  # advice, not a line to paste


def test_the_page_is_written_and_named(tmp_path):
    page = tmp_path / "out" / "rows.html"
    text = said(inspected(config(tmp_path, answer="<b>bold</b>")), 2, page)
    assert text.splitlines()[-1] == f"page: {page}"
    html = page.read_text(encoding="utf-8")
    assert "&lt;" in html and "<b>" not in html
    assert html.count('<article class="row">') == 2
    assert "train.jsonl" in html and "held_out.jsonl" in html and "my_recipe" in html


def test_a_training_is_told_warnings_and_stops_on_errors(tmp_path, capsys):
    warned = inspected(config(tmp_path, answer="caf\u00c3\u00a9")).audit
    tell_warnings(warned)
    told = capsys.readouterr()
    assert told.out == ""
    assert (
        f"warning: 3 rows hold text decoded with the wrong encoding, such as Ã© for é (100.0%) ({tmp_path}" in told.err
    )
    assert told.err.splitlines()[0].endswith("train.jsonl:3); do: mend the rows' text")
    assert "pads" not in told.err
    long = "well " * 100
    cut = inspected(config(tmp_path, answer=long, overflow=Overflow.truncate_end)).audit
    with pytest.raises(RecipeError, match="never learn to stop") as raised:
        stop_on_errors(cut)
    assert raised.value.exit_code == EXIT_BAD_RECIPE


def line(folder, *words):
    command = [sys.executable, "-m", "qlora_kit", "inspect", *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_prints_everything_and_exits_by_what_it_found(tmp_path):
    build_tiny_model("llama", tmp_path / "base")
    config(tmp_path, answer="well " * 100)
    recipe = ["model=demo", "model.source=base", "data.train_file=train.jsonl", "data.eval_file=held_out.jsonl"]
    recipe += ["data=prompt_completion", "data.max_tokens=512"]
    good = line(tmp_path, *recipe, "page=rows.html")
    assert (good.returncode, (tmp_path / "rows.html").is_file()) == (EXIT_OK, True), good.stderr
    bad = line(tmp_path, *recipe, "data.max_tokens=64", "data.overflow=truncate_end")
    assert bad.returncode == EXIT_BAD_RECIPE
    assert "[[" in bad.stdout and "never learn to stop" in bad.stdout
    (tmp_path / "mine.html").write_text("mine")
    taken = line(tmp_path, *recipe, "page=mine.html")
    assert taken.returncode == EXIT_BAD_RECIPE
    assert "page=mine-inspect.html" in taken.stderr and taken.stdout == ""
    wrong = line(tmp_path, *recipe, "page=rows.txt")
    assert "page must name an HTML file, got rows.txt" in wrong.stderr
