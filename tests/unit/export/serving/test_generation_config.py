"""generation_config.json: the union of stop ids, and the base's sampling settings untouched."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.export.serving.generation_config import served_stop_ids, write_generation_config
from tests.tiny_tokenizers import llama3_tokenizer, qwen_tokenizer


def written(folder: Path, base: Path, tokenizer: Any) -> dict[str, Any]:
    assert write_generation_config(folder, base, tokenizer) == "generation_config.json"
    settings: dict[str, Any] = json.loads((folder / "generation_config.json").read_text("utf-8"))
    return settings


def test_stop_ids_of_base_tokenizer_and_template_come_together(tmp_path: Path, base: Path) -> None:
    tokenizer = llama3_tokenizer()
    tokenizer.eos_token = "<|end_of_text|>"
    closing, end = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert served_stop_ids(base, tokenizer) == [closing, 600, end]
    assert written(tmp_path, base, tokenizer)["eos_token_id"] == [closing, 600, end]


def test_one_id_is_written_as_one(tmp_path: Path, base: Path) -> None:
    (base / "generation_config.json").unlink()
    tokenizer = qwen_tokenizer()
    assert written(tmp_path, base, tokenizer) == {"eos_token_id": tokenizer.eos_token_id}


@pytest.mark.parametrize("left", [{"do_sample": True, "eos_token_id": 5}, {"temperature": 9}])
def test_what_a_quantizer_left_is_replaced_by_the_bases_settings(
    tmp_path: Path, base: Path, left: dict[str, object]
) -> None:
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_length": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps(left))
    tokenizer = qwen_tokenizer()
    expected = {"do_sample": False, "max_length": 7, "eos_token_id": tokenizer.eos_token_id}
    assert written(tmp_path, base, tokenizer) == expected


def test_without_a_template_the_tokenizers_own_end_stays(tmp_path: Path, base: Path) -> None:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = None
    assert served_stop_ids(base, tokenizer) == sorted({600, tokenizer.eos_token_id})
