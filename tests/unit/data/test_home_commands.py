"""The demo task: seeded, typed, and held-out rows that share no phrasing and no value with training."""

import json
import re
import subprocess
import sys

import pytest

from qlora_kit.core.errors import EXIT_BAD_RECIPE, RecipeError
from qlora_kit.data.home_commands import ANSWERS, main, rows, write_files
from qlora_kit.data.home_words import HELD_OUT, TRAIN
from qlora_kit.schema.data import RowFormat
from tests.example_files import read
from tests.example_rows import turns


def pairs(lines):
    parsed = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], json.loads(assistant["content"])) for user, assistant in parsed]


TRAINED, KEPT = pairs(rows(TRAIN, 1200, 0)), pairs(rows(HELD_OUT, 100, 1))

# Slots whose value is one of few words by design; the rest is copied from the command.
BOOLEANS = {"on", "daily"}


def test_slot_pools_are_disjoint():
    for pool in ("rooms", "first_names", "last_names", "items", "openers", "endings", "numbers"):
        assert not set(getattr(TRAIN, pool)) & set(getattr(HELD_OUT, pool)), pool


def test_phrasings_are_disjoint():
    for kind in ("orders", "statements"):
        for action in ANSWERS:
            mine = set(TRAIN.orders[action]) | set(TRAIN.statements[action])
            assert not mine & set(getattr(HELD_OUT, kind)[action]), action
    frames = set(TRAIN.asking) | set(TRAIN.neutral)
    assert (set(HELD_OUT.asking) | set(HELD_OUT.neutral)) & frames == {"{}"}


def test_no_value_of_a_held_out_row_occurs_in_training():
    def values(found):
        return {
            (str(value) if isinstance(value, int) else value)
            for _, answer in found
            for key, value in answer.items()
            if key not in BOOLEANS | {"do"}
        }

    assert not values(TRAINED) & values(KEPT)
    assert not {command for command, _ in TRAINED} & {command for command, _ in KEPT}


def test_numbers_of_held_out_rows_are_new_inside_training_commands_too():
    trained_numbers = {number for command, _ in TRAINED for number in re.findall(r"\d+(?::\d+)?", command)}
    kept_numbers = {number for command, _ in KEPT for number in re.findall(r"\d+(?::\d+)?", command)}
    assert kept_numbers
    assert not trained_numbers & kept_numbers


@pytest.mark.parametrize("found", [TRAINED, KEPT], ids=["train", "held_out"])
def test_values_are_copied_from_the_command_and_typed(found):
    for command, answer in found:
        for key, value in answer.items():
            if key in BOOLEANS:
                assert type(value) is bool
            elif key != "do":
                assert type(value) in (str, int)
                assert str(value) in command, (command, answer)
        if answer["do"] == "light":
            assert answer["on"] == (re.search(r"\bon\b", command) is not None), command
        if answer["do"] == "alarm":
            assert answer["daily"] == ("every day" in command)
            assert re.fullmatch(r"[0-2]\d:[0-5]\d", answer["time"])


@pytest.mark.parametrize("found", [TRAINED, KEPT], ids=["train", "held_out"])
def test_every_action_comes_equally_often(found):
    counts = {action: sum(answer["do"] == action for _, answer in found) for action in ANSWERS}
    assert len(counts) >= 7
    assert max(counts.values()) - min(counts.values()) <= 1


def test_free_text_ends_the_command():
    for command, answer in TRAINED + KEPT:
        if answer["do"] == "message" and not command.startswith("send the message"):
            tail = command.partition(answer["text"])[2]
            assert tail == "" or tail.startswith(" to "), command


def test_answers_are_compact_json_on_one_line():
    for line in rows(TRAIN, 50, 3):
        answer = json.loads(line)["messages"][1]["content"]
        assert answer == json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False)


def test_the_seed_fixes_the_rows():
    assert rows(TRAIN, 60, 5) == rows(TRAIN, 60, 5)
    assert rows(TRAIN, 60, 5) != rows(TRAIN, 60, 6)


def test_rows_are_distinct_and_shuffled():
    assert len({command for command, _ in TRAINED}) == 1200
    actions = [answer["do"] for _, answer in TRAINED[:9]]
    assert actions != list(ANSWERS)


def test_more_rows_than_there_are_commands():
    with pytest.raises(RecipeError, match=r"hardly more than \d+ distinct home commands; ask for fewer rows"):
        rows(HELD_OUT, 100_000, 0)


def test_the_files_are_readable_rows(tmp_path):
    train, held_out = write_files(tmp_path, 0, 40, 10)
    assert [len(turns(row, format=RowFormat.messages)) for _, row in read(train)] == [2] * 40
    assert [len(turns(row, format=RowFormat.messages)) for _, row in read(held_out)] == [2] * 10


def test_the_command_prints_the_paths(tmp_path, capsys):
    line = ["--out", str(tmp_path), "--train-rows", "20", "--held-out-rows", "9"]
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")]


def test_the_same_rows_may_be_written_again_and_others_only_with_force(tmp_path, capsys):
    line = ["--out", str(tmp_path), "--train-rows", "20", "--held-out-rows", "9"]
    main(line)
    (tmp_path / "held_out.jsonl").unlink()
    assert main(line) == 0
    before = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "held_out.jsonl").unlink()
    assert main([*line, "--seed", "1"]) == EXIT_BAD_RECIPE
    message = capsys.readouterr().err
    assert f"{tmp_path / 'train.jsonl'} would be overwritten with other rows" in message
    assert "--force" in message
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert not (tmp_path / "held_out.jsonl").exists()
    assert main([*line, "--seed", "1", "--force"]) == 0
    assert (tmp_path / "train.jsonl").read_bytes() != before


def test_a_row_count_below_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--train-rows", "0"])
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_without_torch(tmp_path):
    code = (
        "import sys\n"
        "from qlora_kit.data import home_commands, prepare\n"
        "from qlora_kit.data.formats import reader\nfrom qlora_kit.data.sources import source as rows\n"
        "from qlora_kit.evaluation import tasks\n"
        "from qlora_kit.model import demo, source, tokenizer\n"
        f"home_commands.main(['--out', {str(tmp_path)!r}, '--train-rows', '9', '--held-out-rows', '9'])\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
