"""What a base is calibrated and scored on: never the same rows."""

import json

import pytest

from qlora_kit.export.general_text import passages
from qlora_kit.export.rows import GENERAL_TOKENS, rows_of_export, rows_of_general_text
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import AUTO, DataConfig
from qlora_kit.schema.export import ExportConfig
from qlora_kit.schema.root import ExportRecipe
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama3", tmp_path_factory.mktemp("rows") / "base", max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def write(path, count, head):
    lines = [
        {"messages": [{"role": "user", "content": f"{head} {n}"}, {"role": "assistant", "content": "ok"}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows_of_data(data, config, base, tokenizer):
    recipe = ExportRecipe(base=str(base), export=config, data=data)
    return rows_of_export(Run(RunDirectory(base), recipe, Base(str(base), base), tokenizer), config)


def data_of(path, **more):
    return DataConfig(train_file=path, max_tokens=AUTO, cache=False, processes=1, **more)


def test_general_text_is_parted_and_said(tokenizer, capsys):
    rows = rows_of_general_text(ExportConfig(calibration_rows=20, score_rows=8), tokenizer, 0)
    assert (len(rows.calibration), len(rows.scored)) == (20, 8)
    assert {len(ids) for ids in rows.calibration} == {GENERAL_TOKENS}
    text = "\n".join(passages())
    for row in rows.scored:
        assert all(row.trained) and len(row.trained) == len(row.input_ids) == GENERAL_TOKENS
        assert row.input_ids[0] == tokenizer.bos_token_id
        # a stretch of the kit's text that no calibration row holds
        stretch = list(row.input_ids[40:80])
        assert tokenizer.decode(stretch).strip("\ufffd\n ").split("\n")[0] in text
        assert not any(ids[start : start + 40] == stretch for ids in rows.calibration for start in range(len(ids)))
    said = capsys.readouterr().err
    assert "calibrating on 20 rows of built-in general text" in said and "scoring on 8 others" in said
    assert rows.origin == {"calibration": "general text of the kit", "rows": 20, "scored": 8, "tokens": 128}


def test_more_than_the_text_holds_leaves_a_third_to_score_on(tokenizer):
    rows = rows_of_general_text(ExportConfig(calibration_rows=10_000, score_rows=10_000), tokenizer, 0)
    whole = len(rows.calibration) + len(rows.scored) + 1  # and one between them
    assert len(rows.scored) == whole // 3
    assert len({tuple(ids) for ids in rows.calibration} | {row.input_ids for row in rows.scored}) == whole - 1


def test_the_seed_decides_which_text(tokenizer):
    few = ExportConfig(calibration_rows=2, score_rows=2)
    one, same, other = (rows_of_general_text(few, tokenizer, seed) for seed in (1, 1, 2))
    assert one == same
    assert one.calibration != other.calibration


def test_rows_that_are_held_out_are_scored_and_the_others_calibrate(tmp_path, base, tokenizer):
    data = data_of(write(tmp_path / "a.jsonl", 12, "alpha"), eval_file=write(tmp_path / "b.jsonl", 5, "beta"))
    rows = rows_of_data(data, ExportConfig(calibration_rows=6, score_rows=4, general_text_share=0), base, tokenizer)
    assert [line.line for line in rows.scored] == [1, 2, 3, 4]
    assert all("beta" in tokenizer.decode(row.input_ids) for row in rows.scored)
    assert len(rows.calibration) == 6 and all("alpha" in tokenizer.decode(ids) for ids in rows.calibration)
    assert (rows.origin["train"]["rows"], rows.origin["held_out"]["rows"]) == (12, 5)


def test_rows_of_one_file_are_parted_here(tmp_path, base, tokenizer, capsys):
    config = ExportConfig(calibration_rows=100, score_rows=100, general_text_share=0)
    rows = rows_of_data(data_of(write(tmp_path / "a.jsonl", 50, "alpha")), config, base, tokenizer)
    assert "data holds no rows out: 20% of them are set aside to score on" in capsys.readouterr().err
    calibrated, scored = {tuple(ids) for ids in rows.calibration}, {row.input_ids for row in rows.scored}
    assert len(calibrated) + len(scored) == 50 and not calibrated & scored
    assert 3 <= len(scored) <= 20


def test_auto_is_the_context_of_the_base(tmp_path, base, tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, 20, "alpha")
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "ok"}]}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    data = data_of(str(path), overflow="drop", eval_rows=3)
    rows = rows_of_data(data, ExportConfig(general_text_share=0), base, tokenizer)
    assert rows.origin["train"]["max_tokens"] == rows.origin["held_out"]["max_tokens"] == 64
