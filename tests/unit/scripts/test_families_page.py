"""The table of families: the record, the page and what comes with the package say the same."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.cli.verbs import main
from qlora_kit.core.errors import RecipeError
from qlora_kit.families.support import (
    RECORD,
    kl_text,
    lines_of_family,
    lines_of_table,
    meant_families,
    options_of,
    rows_of,
    supported,
)
from qlora_kit.schema.compose import training_unchecked
from qlora_kit.schema.folders import groups

SCRIPTS = Path(__file__).parents[3] / "scripts"
REFUSED = {"reason": "its experts would stay in 16 bit", "before_training": True}
MADE: dict[str, Any] = {
    "commit": "abc1234",
    "versions": {"torch": "2.13.0"},
    "families": {
        "moe": {
            "architecture": "SomeMoeForCausalLM",
            "model_type": "some_moe",
            "plan": 0,
            "train": 0,
            "fast": 0,
            "packed": {"exit": 2, "reason": "packed rows need <another> attention", "before_training": True},
            "engine": ["the MLP of 2 of 2 layers runs plain, because of its experts", "engine: fast, bf16, 2 layers"],
            "exports": {
                "merged_16bit": {"mean_kl": 0.00021, "rejected": False},
                "gguf_q8_0": {"mean_kl": 0.0123, "rejected": False},
                "gguf_q4_k_m": {"reason": "llama.cpp refuses it", "before_training": False},
                "bnb_nf4": REFUSED,
            },
        },
        "state": {
            "architecture": "StateForCausalLM",
            "model_type": "state",
            "plan": 0,
            "train": 0,
            "fast": 0,
            "packed": {"exit": 1, "fault": "KeyError: 'x'"},
            "engine": ["engine.mode=fast has no state layers: they run plain, on transformers and peft"],
            "exports": {"merged_16bit": {"mean_kl": 0.5, "rejected": True}, "bnb_nf4": REFUSED},
        },
    },
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_the_page_and_the_package_are_made_of_the_newest_record() -> None:
    from families_page import PAGE, newest_record, packaged, page

    record = json.loads(newest_record().read_text(encoding="utf-8"))
    assert RECORD.read_text(encoding="utf-8") == packaged(record)
    assert PAGE.read_text(encoding="utf-8") == page(record)
    assert list(rows_of(json.loads(packaged(record)))) == list(rows_of(record)) == list(supported())


def test_the_record_holds_no_fault_and_names_options() -> None:
    faults = [(row.name, name) for row in supported() for name, cell in row.cells.items() if cell.word == "FAULT"]
    assert faults == []
    assert set(options_of(json.loads(RECORD.read_text(encoding="utf-8")))) <= set(groups()["export"])


def test_a_page_has_a_row_for_each_family_and_each_reason_once() -> None:
    from families_page import page

    text = page(MADE)
    assert "| moe | yes | *part* (1) | no (2) | yes 0.0002 | yes 0.0123 | no (3) | no (4) |" in text
    assert "| state | yes | *plain* (5) | FAULT (6) | *rejected* 0.50 | - | - | no (4) |" in text
    assert "\n2. packed rows need &lt;another> attention\n3. llama.cpp refuses it (told after training)\n" in text
    assert text.count("its experts would stay in 16 bit") == 1
    assert "say nothing of real ones" in text
    assert "Of this record: packed rows were not tried.\n\n| family" in page(
        {**MADE, "note": "packed rows were not tried"}
    )


def test_the_terminal_has_one_word_a_cell() -> None:
    head, moe, state, *legend = lines_of_table(list(rows_of(MADE)))
    assert head.split()[:6] == ["family", "train", "fast", "pack", "16bit", "gguf"]
    assert moe.split() == ["moe", "yes", "part", "no", "yes", "no", "-", "-", "-", "no", "-", "-", "-"]
    assert state.split()[:6] == ["state", "yes", "plain", "FAULT", "rej.", "-"]
    assert "qlora-kit recipes families NAME" in "\n".join(legend)
    assert list(lines_of_table(list(rows_of(MADE)), "packed rows were not tried"))[-1] == "packed rows were not tried"


def test_a_family_is_told_with_every_reason_in_full() -> None:
    moe, state = rows_of(MADE)
    told = list(lines_of_family(moe))
    assert told[0] == "moe: SomeMoeForCausalLM, model_type some_moe, tiny and with random weights"
    assert [line.split(maxsplit=1) for line in told[2:]] == [
        ["fast", "yes, in part: the MLP of 2 of 2 layers runs plain, because of its experts"],
        ["packed", "refused before training: packed rows need <another> attention"],
        ["merged_16bit", "yes, mean KL 0.0002"],
        ["gguf_q8_0", "yes, mean KL 0.0123"],
        ["gguf_q4_k_m", "refused after training: llama.cpp refuses it"],
        ["bnb_nf4", "refused before training: its experts would stay in 16 bit"],
    ]
    assert "  packed        fails: KeyError: 'x'" in list(lines_of_family(state))
    assert "  merged_16bit  rejected, mean KL 0.50" in list(lines_of_family(state))
    assert (kl_text(0.00012), kl_text(1.234)) == ("0.0001", "1.23")


def test_the_printed_table_is_no_wider_than_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(supported()) > 20
    assert max(map(len, lines)) <= 80
    assert len(lines[0].split()) == 13


def test_a_family_is_found_by_any_of_its_names_and_by_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in supported() if row.architecture == "Qwen3MoeForCausalLM")
    for name in (row.name, row.architecture, row.model_type):
        assert row in meant_families(name)
    config = {"architectures": [row.architecture], "model_type": row.model_type}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert meant_families(str(tmp_path)) == meant_families(row.architecture)
    assert main(["recipes", "families", row.architecture]) == 0
    assert capsys.readouterr().out.startswith(f"{row.name}: {row.architecture}, model_type {row.model_type}")


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("qwen3_mo", "qlora-kit recipes families qwen3_moe"),
        ("gemma3_4b", "qlora-kit recipes families gemma3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qlora-kit recipes families qwen3_moe"),
        ("zzz", "qlora-kit recipes families"),
    ],
)
def test_a_name_of_none_is_answered_with_the_nearest(word: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=f"there is no family '{word}'") as found:
        meant_families(word)
    assert found.value.problems[0].fix == fix
    assert main(["recipes", "families", word]) == 2
    assert main(fix.split()[1:]) == 0


def test_a_folder_of_another_family_is_answered_with_a_plan_that_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody_s", "architectures": ["NobodyS"]}', encoding="utf-8")
    with pytest.raises(RecipeError, match="'nobody_s', which is not among the families that were tried") as found:
        meant_families(str(tmp_path))
    kit, verb, *words = shlex.split(found.value.problems[0].fix)
    assert (kit, verb) == ("qlora-kit", "plan")
    assert training_unchecked(words).recipe.model.source == str(tmp_path)
