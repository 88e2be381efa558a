"""A recipe's rows on this device: what `auto` comes to, the bins, and prompts that differ from the rows."""

import json

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.audit.audit import tell_warnings
from qlora_kit.schema.data import Batching, DataConfig, OnBadRow
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training import rows as rows_module
from qlora_kit.training.rows import audit_of, longest_row, packing_of, rows_that_fit
from tests.tiny_tokenizers import smollm_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def memory(monkeypatch):
    """Sets the free memory."""
    return lambda gigabytes: monkeypatch.setattr(rows_module, "free_memory_bytes", lambda: gigabytes * 1e9)


def recipe(batching=Batching.padded, max_tokens="auto", **data):
    config = DataConfig(max_tokens=max_tokens, batching=batching, **data)
    return TrainRecipe(model=ModelConfig(source="base"), data=config, trainer=TrainerConfig(batch_size=1))


def test_a_number_stays_what_it_is(base):
    assert longest_row(recipe(max_tokens=512), base, 9999) == 512


def test_auto_is_the_smallest_of_context_longest_row_and_what_fits(base, memory, capsys):
    memory(1000)
    assert longest_row(recipe(), base, 300) == 300
    assert "data.max_tokens=auto: 300, the longest row (1.0 TB free" in capsys.readouterr().err
    assert longest_row(recipe(), base, 99999) == 8192
    assert longest_row(recipe(Batching.packed), base, 300) == 8192
    assert "data.max_tokens=auto: 8192, the model's context" in capsys.readouterr().err
    memory(9)
    fits = longest_row(recipe(), base, 99999)
    assert 64 <= fits < 8192
    assert fits % 64 == 0
    assert f"data.max_tokens=auto: {fits}, what fits (9.0 GB free" in capsys.readouterr().err
    memory(10)
    assert longest_row(recipe(), base, 99999) > fits


def test_where_not_even_a_short_row_fits_the_run_is_refused(base, memory):
    memory(2)
    with pytest.raises(RecipeError) as caught:
        longest_row(recipe(), base, 99999)
    assert "by the estimate not even a short row fits into the 2.0 GB that are free" in str(caught.value)
    assert "trainer.batch_size=1" in str(caught.value)


def test_rows_are_packed_into_bins_of_the_limit_only_where_the_recipe_says_so(base, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    memory(1000)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": str(n), "completion": "b"}) for n in range(20)))
    packed = recipe(Batching.packed, max_tokens=100, train_file=str(file))
    data = rows_that_fit(packed, base, smollm_tokenizer())
    packing = packing_of(packed.data, data)
    assert packing is not None
    assert packing.capacity == 100
    assert sorted(packing.rows.tolist()) == list(range(20))
    padded = recipe(train_file=str(file))
    assert packing_of(padded.data, rows_that_fit(padded, base, smollm_tokenizer())) is None


@pytest.mark.parametrize(
    ("prompts", "settings", "fix"),
    [
        ("abc", {}, "fix: data.eval_share=0.02"),
        ("aaa", {}, "do: data.eval_file=<other rows>"),
        ("abc", {"eval_share": 0.02}, None),
        ("abc", {"eval_rows": 1}, None),
    ],
)
def test_where_nothing_is_held_out_one_line_says_so_before_training(base, tmp_path, capsys, prompts, settings, fix):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "completion": "b"}) for prompt in prompts))
    known = recipe(max_tokens=100, train_file=str(file), cache=False, processes=1, **settings)
    tokenizer = smollm_tokenizer()
    data = rows_that_fit(known, base, tokenizer)
    capsys.readouterr()
    tell_warnings(audit_of(known, data, None, base, tokenizer))
    said = [line for line in capsys.readouterr().err.splitlines() if "held out" in line]
    what = "no row is held out, by data.eval_share or data.eval_file, so an export of this run could not be measured"
    assert said == ([f"warning: {what}; {fix}"] if fix else [])


def test_a_skipped_row_is_told_once(base, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": one, "completion": one.strip()}) for one in ("a", "b", " ")))
    skip = {"on_bad_row": OnBadRow.skip, "max_bad_share": 0.5, "cache": False, "processes": 1}
    known = recipe(max_tokens=100, train_file=str(file), **skip)
    tokenizer = smollm_tokenizer()
    tell_warnings(audit_of(known, rows_that_fit(known, base, tokenizer), None, base, tokenizer))
    assert capsys.readouterr().err.count("is empty") == 1
