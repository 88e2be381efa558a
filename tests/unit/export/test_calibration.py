"""Calibration rows: every length and source, nothing held out, some general text, the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.data.tokens import TokenRows
from qlora_kit.export.calibration import calibration_rows
from qlora_kit.export.general_text import general_rows, passages
from qlora_kit.schema.data import DataConfig, SourceConfig
from tests.prepared_rows import TOKENIZER, write
from tests.tiny_tokenizers import llama3_tokenizer

LONG = 200  # tokens; rows of the one source are shorter, of the other longer


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    """80 short rows of one source and 20 long ones of another, all different; four held out."""
    short = write(tmp_path / "short.jsonl", *((f"s{i}", "word " * (1 + i % 40)) for i in range(80)))
    long = write(tmp_path / "long.jsonl", *((f"l{i}", "word " * (100 + i)) for i in range(20)))
    held_out = write(tmp_path / "held_out.jsonl", *((f"h{i}", "word " * 10) for i in range(4)))
    sources = {"short": SourceConfig(path=short), "long": SourceConfig(path=long)}
    return prepare(DataConfig(sources=sources, eval_file=held_out, max_tokens=512), TOKENIZER)


def whole(rows: TokenRows) -> set[tuple[int, ...]]:
    return {row.input_ids for row in rows}


def test_rows_come_from_every_source_in_proportion_and_from_every_length(data: PreparedData) -> None:
    picked = calibration_rows(data.train, 10)
    assert {tuple(row) for row in picked} <= whole(data.train) and len({tuple(row) for row in picked}) == 10
    lengths = sorted(len(row) for row in picked)
    assert sum(length > LONG for length in lengths) == 2  # 20 of the 100 rows are long
    of_short = sorted(len(row.input_ids) for row in data.train if len(row.input_ids) < LONG)
    quarters = np.quantile(of_short, [0.25, 0.5, 0.75])
    assert np.bincount(np.searchsorted(quarters, lengths[:8]), minlength=4).tolist() == [2, 2, 2, 2]


def test_a_small_source_is_not_left_out(data: PreparedData) -> None:
    picked = calibration_rows(data.train, 2)
    assert [length > LONG for length in sorted(len(row) for row in picked)] == [False, True]


def test_the_seed_decides(data: PreparedData) -> None:
    first = calibration_rows(data.train, 12, tokenizer=TOKENIZER, general_share=0.25)
    assert calibration_rows(data.train, 12, tokenizer=TOKENIZER, general_share=0.25) == first
    assert calibration_rows(data.train, 12, tokenizer=TOKENIZER, general_share=0.25, seed=1) != first


def test_held_out_contents_and_copies_are_left_out(tmp_path: Path, data: PreparedData) -> None:
    train = write(tmp_path / "mixed.jsonl", *((f"h{i}", "word " * 10) for i in range(4)), ("a", "b"), ("a", "b"))
    other = prepare(DataConfig(train_file=train, max_tokens=512), TOKENIZER)
    assert len(calibration_rows(other.train, 99)) == 5
    (kept,) = calibration_rows(other.train, 99, held_out=data.held_out)
    assert tuple(kept) == other.train[4].input_ids


def test_a_quarter_is_general_text_of_typical_length(data: PreparedData) -> None:
    picked = calibration_rows(data.train, 16, tokenizer=TOKENIZER, general_share=0.25)
    own = whole(data.train)
    assert [tuple(row) in own for row in picked] == [True] * 12 + [False] * 4
    assert {len(row) for row in picked[12:]} == {int(np.median([len(row) for row in picked[:12]]))}
    words = " ".join(TOKENIZER.decode(row) for row in picked[12:]).split()
    assert len(set(words)) > 50


def test_share_of_general_text(data: PreparedData) -> None:
    none = calibration_rows(data.train, 8, tokenizer=TOKENIZER, general_share=0)
    assert {tuple(row) for row in none} <= whole(data.train)
    most = calibration_rows(data.train, 8, tokenizer=TOKENIZER, general_share=1)
    assert sum(tuple(row) in whole(data.train) for row in most) == 1


def test_general_rows_never_repeat_a_token_and_end_with_the_text() -> None:
    stream = [token for text in passages() for token in TOKENIZER(text + "\n\n").input_ids]
    rows = general_rows(TOKENIZER, 10**6, 50, seed=3)
    assert len(rows) == len(stream) // 50
    assert len({tuple(row) for row in rows}) == len(rows)
    few = general_rows(TOKENIZER, 5, 50, seed=3)
    assert [rows.index(row) for row in few] == [round(i * (len(rows) - 1) / 4) for i in range(5)]


def test_general_rows_begin_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = llama3_tokenizer()
    rows = general_rows(tokenizer, 3, 40, seed=0)
    assert [row[0] for row in rows] == [tokenizer.bos_token_id] * 3
    assert {len(row) for row in rows} == {40}
    assert tokenizer.bos_token_id not in rows[0][1:]


def test_the_text_is_of_many_kinds() -> None:
    text = "\n".join(passages())
    assert len(passages()) > 30 and 20_000 < len(text.encode()) < 40_000
    assert "%%" not in text
    assert all(sign in text for sign in ("def ", "#include", "SELECT", "√", "的", "の", "привет"[0], "في", "ß"))
