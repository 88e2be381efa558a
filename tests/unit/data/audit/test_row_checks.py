"""Repeats, leaks, odd text and rows that were left out, put into hand-made rows, are found with level and place."""

import re

import numpy as np

from qlora_kit.data.audit.audit import audit
from qlora_kit.data.audit.finding import Level
from qlora_kit.data.audit.oddities import Oddity
from qlora_kit.data.summary import LongRowCounts
from qlora_kit.data.tokens import REASONING_DROPPED, TEXT_DROPPED
from qlora_kit.schema.data import TrainOn
from tests.marked_rows import SMOLLM, chat, found, good, row
from tests.stored_rows import StoredData, stored_rows
from tests.tiny_tokenizers import llama3_tokenizer


def test_rows_without_a_loss_token_are_an_error(tmp_path):
    ids, _ = chat(5)
    rows = [*good(), (ids, [False] * len(ids))]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)))["no_loss_token"]
    assert (finding.level, finding.count, finding.places) == (Level.error, 1, ("train.jsonl:31",))
    assert finding.what == "1 row has no loss token"


def test_a_tiny_share_of_loss_tokens_is_a_warning(tmp_path):
    long = row("<|im_start|>user\n" + "word " * 900 + "<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧")
    finding = found(StoredData(stored_rows(tmp_path / "train", [long])))["little_is_trained"]
    assert re.fullmatch(
        r"only 0\.\d\d% of the tokens are loss tokens, so most of the work teaches nothing", finding.what
    )


def test_a_huge_share_of_loss_tokens_is_a_warning_for_chats_alone(tmp_path):
    mostly = row("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n⟦" + "word " * 900 + "<|im_end|>⟧")
    finding = found(StoredData(stored_rows(tmp_path / "chat", [mostly])))["nearly_all_is_trained"]
    said = r"99\.\d% of the tokens are loss tokens, so prompts are too short to be real; are the roles swapped\?"
    assert re.fullmatch(said, finding.what)
    assert "nearly_all_is_trained" not in found(
        StoredData(stored_rows(tmp_path / "chat_all", [mostly])), train_on=TrainOn.last
    )
    with_bos = llama3_tokenizer()
    text = row("<|begin_of_text|>⟦" + "word " * 900 + "<|eot_id|>⟧", with_bos)
    assert "nearly_all_is_trained" not in found(StoredData(stored_rows(tmp_path / "text", [text])), with_bos)


def test_rows_that_repeat_are_counted_with_their_first(tmp_path):
    hashes = np.random.default_rng(0).integers(0, 256, (30, 16))
    hashes[9] = hashes[21] = hashes[4]
    finding = found(StoredData(stored_rows(tmp_path / "train", good(), hashes=hashes)))["duplicates"]
    assert (finding.level, finding.count) == (Level.warning, 2)
    assert finding.places == ("train.jsonl:10 = train.jsonl:5", "train.jsonl:22 = train.jsonl:5")


def test_one_repeat_in_many_rows_is_a_note(tmp_path):
    hashes = np.random.default_rng(0).integers(0, 256, (150, 16))
    hashes[1] = hashes[0]
    finding = found(StoredData(stored_rows(tmp_path / "train", good(150), hashes=hashes)))["duplicates"]
    assert finding.level is Level.note


def test_pieces_of_one_row_do_not_repeat_each_other(tmp_path):
    whole = stored_rows(tmp_path / "train", good())
    assert "duplicates" not in found(StoredData(whole.select(np.array([0, 0, 1, 1, *range(2, 30)]))))


def test_near_repeats_and_leaks_name_both_rows(tmp_path):
    generator = np.random.default_rng(0)
    bodies = [generator.integers(5, 500, 200).tolist() for _ in range(30)]
    ends = [SMOLLM.eos_token_id]
    rows = [(body + ends, [True] * 201) for body in bodies]
    close = [*bodies[3][:199], 1, *ends]
    train = stored_rows(tmp_path / "train", [*rows, (close, [True] * 201)])
    held_out = stored_rows(
        tmp_path / "held", [rows[0], ([1, *bodies[8][1:], *ends], [True] * 201)], hashes=[[1] * 16, [2] * 16]
    )
    names = found(StoredData(train, held_out))
    assert names["near_duplicates"].places == ("train.jsonl:31 = train.jsonl:4",)
    assert names["near_leak"].places == ("held.jsonl:1 = train.jsonl:1", "held.jsonl:2 = train.jsonl:9")
    assert "held_out_leak" not in names


def test_a_held_out_row_that_is_trained_on_is_an_error(tmp_path):
    train = stored_rows(tmp_path / "train", good())
    held_out = stored_rows(tmp_path / "held", good()[:3], hashes=[[1] * 16, train.store.table.hashes[7], [2] * 16])
    finding = found(StoredData(train, held_out))["held_out_leak"]
    assert (finding.level, finding.count, finding.places) == (Level.error, 1, ("held.jsonl:2 = train.jsonl:8",))


def test_each_flaw_of_the_text_is_a_finding(tmp_path):
    bits = [int(Oddity.LATIN)] * 30
    bits[2] |= int(Oddity.MOJIBAKE)
    bits[5] |= int(Oddity.MOJIBAKE | Oddity.MARKUP)
    bits[6] |= REASONING_DROPPED
    bits[7] |= TEXT_DROPPED
    names = found(StoredData(stored_rows(tmp_path / "train", good(), oddities=bits)))
    assert (names["text_mojibake"].level, names["text_mojibake"].places) == (
        Level.warning,
        ("train.jsonl:3", "train.jsonl:6"),
    )
    assert (names["text_markup"].level, names["text_markup"].count) == (Level.note, 1)
    for name, place in (("reasoning_left_out", "train.jsonl:7"), ("text_left_out", "train.jsonl:8")):
        assert (names[name].level, names[name].places) == (Level.warning, (place,))
        assert "which the chat template leaves out, so it is not learned" in names[name].what
    assert "scripts" not in names


def test_rows_without_letters_are_in_no_script(tmp_path):
    bits = [int(Oddity.LATIN)] * 28 + [0, REASONING_DROPPED]
    result = audit(StoredData(stored_rows(tmp_path / "train", good(), oddities=bits)), SMOLLM, 100, frozenset())
    assert result.scripts == {"Latin": 1.0}


def test_a_row_in_another_script_stands_out_among_many(tmp_path):
    bits = [int(Oddity.LATIN)] * 149 + [int(Oddity.HAN)]
    data = StoredData(stored_rows(tmp_path / "train", good(150), oddities=bits))
    names = found(data)
    assert (names["other_script"].count, names["other_script"].places) == (1, ("train.jsonl:150",))
    assert "Latin 99.3%, Han 0.7%" in names["scripts"].what
    bits[0] = bits[1] = int(Oddity.HAN)
    mixed = StoredData(stored_rows(tmp_path / "mixed", good(150), oddities=bits))
    assert "other_script" not in found(mixed)


def test_what_became_of_long_and_bad_rows_is_told(tmp_path):
    bad = [{"file": "train.jsonl", "line": 4, "why": "no JSON"}]
    rows = stored_rows(tmp_path / "train", good(), bad_rows=bad)
    names = found(StoredData(rows, long_rows=LongRowCounts(longer=5, dropped=3, cut=2, untrained=1)))
    assert (names["rows_dropped"].count, names["rows_cut"].count, names["rows_left_untrained"].count) == (3, 2, 1)
    assert names["rows_left_untrained"].what == "training rows dropped because no loss token was left: 1"
    assert names["rows_skipped"].places == ("train.jsonl:4",)
    assert "no JSON" in names["rows_skipped"].what
    names = found(StoredData(rows, long_rows=LongRowCounts(longer=2, cut=2, pieces=5)))
    assert names["rows_split"].level is Level.note and "into 5" in names["rows_split"].what
    assert "rows_cut" not in names
