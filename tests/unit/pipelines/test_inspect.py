"""The rows a user looks at show what is trained, on a terminal and in a file."""

import io
import json

from rich.console import Console

from qlora_kit.data.prepare import prepare
from qlora_kit.pipelines.inspect import TRAINED_STYLE, inspect, marked_text
from qlora_kit.schema.data import DataConfig
from tests.tiny_models import smollm_tokenizer

TOKENIZER = smollm_tokenizer()


def config(folder):
    for name, prompts in (("train", "abc"), ("held_out", "d")):
        rows = [json.dumps({"prompt": f"{prompt} [bold]", "completion": "the [answer]"}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return DataConfig(train_file=str(folder / "train.jsonl"), eval_file=str(folder / "held_out.jsonl"), max_tokens=64)


def test_brackets_mark_the_trained_tokens_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    inspect(config(tmp_path), TOKENIZER, 2, Console(file=stream, width=200))
    said = stream.getvalue()
    row = "<|im_start|>user\na [bold]<|im_end|>\n<|im_start|>assistant\n[[the [answer]<|im_end|>]]\n"
    assert row in said
    assert row.replace("\na ", "\nb ") in said
    assert "user\nc [bold]" not in said
    assert "trained tokens are marked with [[ ]]" in said


def test_the_counts_are_those_of_the_files(tmp_path):
    stream = io.StringIO()
    inspect(config(tmp_path), TOKENIZER, 0, Console(file=stream, width=20))
    summary = prepare(config(tmp_path), TOKENIZER).summary
    said = stream.getvalue().splitlines()
    train = summary.train
    assert said[-2] == (
        f"train     {train.file}: 3 rows, {train.tokens} tokens, {train.trained_share:.1%} trained, "
        f"longest row {train.longest_row} tokens"
    )
    assert said[-1].startswith(f"held out  {summary.held_out.file}: 1 rows")


def test_a_terminal_gets_a_style_and_no_brackets(tmp_path):
    stream = io.StringIO()
    inspect(
        config(tmp_path), TOKENIZER, 1, Console(file=stream, force_terminal=True, width=200, color_system="standard")
    )
    assert "\x1b[1;32mthe [answer]<|im_end|>\x1b[0m" in stream.getvalue()
    assert "[[" not in stream.getvalue()


def test_the_style_covers_the_trained_tokens_alone(tmp_path):
    row = prepare(config(tmp_path), TOKENIZER).train[0]
    text = marked_text(row, TOKENIZER, with_brackets=False)
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("the [answer]<|im_end|>", TRAINED_STYLE)
    ]
