"""The plan's numbers, read off the printed table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from qlora_kit.core.errors import RecipeError
from qlora_kit.memory.card import CONTEXT_BYTES, Card, card_of
from qlora_kit.pipelines import plan as module
from qlora_kit.pipelines.plan import count_rows, known_base, known_rows, plan
from qlora_kit.schema.check_wished import UNCHECKED
from qlora_kit.schema.compose import compose_unchecked
from qlora_kit.schema.data import Batching, DataConfig, OnBadRow
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import ModelConfig, ModelShape
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training import rows as rows_module
from qlora_kit.training.forecast import KnownBase, forecast
from qlora_kit.training.known_rates import note_rate
from qlora_kit.training.rows import packing_of
from tests.tiny_models import build_tiny_model

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, False)


def recipe(train_file: Path | None, **trainer) -> TrainRecipe:
    data = DataConfig(train_file=str(train_file) if train_file else None, max_tokens=2048)
    return TrainRecipe(model=ModelConfig(source="base"), data=data, trainer=TrainerConfig(**trainer))


def printed(planned: TrainRecipe) -> dict[str, str]:
    lines = plan(planned, KnownBase(LLAMA_8B, "llama")).splitlines()
    assert max(len(line) for line in lines if not line.startswith("  qlora-kit")) <= 80
    table, part = dict[str, str](), ""
    for row in (line.split("│") for line in lines if line.startswith("│")):
        if row[1].strip():
            part = row[1].strip()
            table[part] = f"{row[2].strip()} | {row[3].strip()}"
        else:  # the rest of a long explanation
            table[part] += f" {row[3].strip()}"
    return table


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"row": row}) + "\n" for row in range(100)) + "\n", encoding="utf-8")
    return path


def test_parts_total_and_steps(rows, monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1e12)
    table = printed(recipe(rows, batch_size=8, gradient_accumulation=2, epochs=2))
    assert table["weights"].startswith("5.7 GB | 8.0 B weights, nf4 + double quantization")
    assert "41.9 M trained weights" in table["adapter"]
    assert table["total"].startswith("14.9 GB")
    assert table["tokens a step"].startswith("32.8 k")
    assert table["steps"].startswith("14 | 100 rows")  # 13 batches of 8, 7 steps of 2, twice


@pytest.mark.parametrize(
    ("has_gpu", "more"),
    [
        (True, "on one device; CUDA's context comes on top"),
        (False, "on one GPU, beside CUDA's context; on a CPU process and optimizer take 1.1 GB more"),
    ],
    ids=["gpu", "cpu"],
)
def test_what_the_total_leaves_out_is_said(rows, monkeypatch, has_gpu, more):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: has_gpu)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1e12)
    assert printed(recipe(rows))["total"].endswith(f" | {more}")


def test_a_plan_is_one_for_a_gpu_wherever_it_is_made(rows, monkeypatch):
    totals = []
    for has_gpu in (True, False):
        monkeypatch.setattr(module, "has_nvidia_gpu", lambda: has_gpu)  # noqa: B023  # called in this round
        monkeypatch.setattr(module, "_free_bytes", lambda: None)
        monkeypatch.setattr(module, "free_memory_bytes", lambda: 1e12)
        totals.append(printed(recipe(rows))["total"].split(" | ")[0])
    assert totals[0] == totals[1]


def test_without_an_optimizer_of_its_own_a_cpu_needs_the_process_more(rows, monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    planned = recipe(rows)
    planned.optim.name = OptimizerName.adamw
    assert printed(planned)["total"].endswith("on a CPU the process takes 800.0 MB more")


def test_rows_of_no_tokens_are_not_planned(monkeypatch):
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1e9)
    planned = recipe(None)
    planned.data.max_tokens = "auto"
    with pytest.raises(RecipeError, match=r"not even a short row fits into the 1\.0 GB that are free"):
        printed(planned)


def test_counts_of_one_are_told_as_one(tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text('{"row": 1}\n', encoding="utf-8")
    table = printed(recipe(one, batch_size=1, gradient_accumulation=1, epochs=1))
    assert table["tokens a step"] == "2.0 k | at most: 1 row of 2,048 tokens; the rows were not read"
    assert table["steps"] == "1 | 1 row, 1 pass over it"


def test_without_the_file_the_steps_are_unknown(tmp_path):
    assert printed(recipe(tmp_path / "none.jsonl"))["steps"].startswith("unknown")


def test_steps_that_the_recipe_says_need_no_rows(tmp_path):
    assert printed(recipe(tmp_path / "none.jsonl", max_steps=20))["steps"] == "20 | trainer.max_steps"
    assert printed(recipe(None, max_steps=20))["steps"] == "20 | trainer.max_steps"


def test_rows_of_any_kind_that_training_reads_are_counted(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n')
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": "b"}, {"text": "c"}]')
    assert count_rows(tmp_path / "rows.csv", None) == 2
    assert count_rows(tmp_path / "rows.json", None) == 3


def test_the_optimizer_that_would_run_here_is_told(monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    assert "here, without a GPU, adamw in 32 bit" in printed(recipe(None))["optimizer"]
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(module, "_free_bytes", lambda: None)
    assert printed(recipe(None))["optimizer"].endswith("| paged_adamw_8bit")


def test_a_recipe_without_a_train_file_can_be_planned():
    assert printed(recipe(None))["steps"] == "unknown | give data.train_file to count them"


def test_rows_leave_blank_lines_out_and_keep_to_the_limit(rows):
    assert count_rows(rows, None) == 100
    assert count_rows(rows, 7) == 7
    assert count_rows(rows.with_name("none"), None) is None


def test_rows_at_hand_make_the_largest_batch_of_the_run(tmp_path):
    base = build_tiny_model("llama", tmp_path / "base")
    text = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}]} for n in (9, 90)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in text * 4), encoding="utf-8")
    planned = TrainRecipe(
        model=ModelConfig(source=str(base)),
        data=DataConfig(train_file=str(file), max_tokens=2048, cache=False),
        trainer=TrainerConfig(batch_size=2),
    )
    data = known_rows(planned)
    assert data is not None
    longest = int(data.train.lengths.max())
    shown = plan(planned, known_base(planned), data)
    assert longest < 200
    assert f"{2 * longest} tokens at once" in shown
    assert "4.1 k tokens at once" in plan(planned, known_base(planned))


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_steps_and_their_time_are_those_of_the_run(tmp_path, monkeypatch, batching):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    base = build_tiny_model("llama", tmp_path / "base")
    text = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 9}]}] * 40
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n, row in enumerate(text)), encoding="utf-8")
    planned = TrainRecipe(
        model=ModelConfig(source=str(base)),
        data=DataConfig(train_file=str(file), max_tokens=128, cache=False, batching=Batching[batching]),
        trainer=TrainerConfig(batch_size=2, epochs=3),
    )
    data, known = known_rows(planned), known_base(planned)
    assert data is not None
    tokens, packing = int(data.train.lengths.sum()), packing_of(planned.data, data)
    items = len(data.train) if packing is None else len(packing)
    assert (items < 40) == (batching == "packed")
    shown = plan(planned, known, data)
    assert f"│ steps         │ {planned.trainer.steps(items):>8} │" in shown
    assert "time in steps" not in shown
    note_rate(planned, known.shape, tokens / 20, 50)
    assert "│ time in steps │ 1 min 00 s │ at" in " ".join(plan(planned, known, data).split()).replace("│ │", "│")
    assert "time in steps" not in plan(planned, known, data, card_of("24GB"))


def test_without_a_tokenizer_at_hand_rows_are_not_read(rows):
    assert known_rows(recipe(rows)) is None


def fast(**engine) -> TrainRecipe:
    planned = recipe(None)
    planned.engine = EngineConfig(mode=EngineMode.fast, **engine)
    return planned


def on_a_card_of(monkeypatch, free, **engine):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(module, "_free_bytes", lambda: free)
    return printed(fast(**engine))


@pytest.mark.parametrize(
    ("engine", "measured"), [({"cached_weights": "6.4GB"}, 38.7), ({"recompute": "1MB"}, 8.1)]
)  # GB of an 8B model, 4 x 2,048 tokens, on an H100 (docs/benchmarks.md)
def test_the_fast_engine_needs_what_was_measured(monkeypatch, engine, measured):
    table = on_a_card_of(monkeypatch, 84e9, **engine)
    assert float(table["total"].split()[0]) == pytest.approx(measured, rel=0.04)  # 1% and 3% off


def test_the_fast_engine_keeps_what_fits_into_the_card_at_hand(monkeypatch):
    everything = on_a_card_of(monkeypatch, 84e9)
    assert "nothing is recomputed" in everything["activations"]
    assert everything["cached"].startswith("14.0 GB")
    small = on_a_card_of(monkeypatch, 15.5e9)
    assert "recomputed in the backward pass" in small["activations"]
    assert "cached" not in small
    assert 10 < float(small["total"].split()[0]) < 15.5
    assert printed(fast(recompute="all"))["total"] == on_a_card_of(monkeypatch, None)["total"]


def test_layers_that_the_engine_does_not_know_are_planned_plain():
    planned = fast()
    assert plan(planned, KnownBase(LLAMA_8B, "opt")) == plan(recipe(None), KnownBase(LLAMA_8B, "opt"))
    planned.lora.dropout = 0.1
    assert "recomputed in the backward pass" in printed(planned)["activations"]


def test_the_optimizer_s_bytes_are_those_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    assert printed(recipe(None))["optimizer"].startswith("83.9 MB")  # 41.9 M weights of 2 bytes


def test_rows_that_are_not_there_are_refused_and_none_at_all_are_not(tmp_path):
    with pytest.raises(RecipeError, match=r"no such file: .*none\.jsonl") as caught:
        known_rows(recipe(tmp_path / "none.jsonl"))
    assert caught.value.problems[0].where == "data.train_file"
    assert known_rows(recipe(None)) is None


def test_the_line_of_a_run_without_a_gpu_tells_what_the_process_takes_too():
    found = forecast(recipe(None), KnownBase(LLAMA_8B, "llama"), 2048)
    assert " of memory and 800.0 MB of the process itself, for 2.0 k tokens" in found.told(on_gpu=False)
    assert " of memory, for 2.0 k tokens at once (an estimate)" in found.told(on_gpu=True)


@pytest.mark.parametrize(
    ("has_gpu", "free", "said"),
    [
        (True, 20e9, "20.0 GB | on the GPU: it fits"),
        (True, 10e9, "10.0 GB | on the GPU: it does not fit"),
        (False, 15.5e9, "15.5 GB | in main memory, for want of a GPU: it does not fit"),
    ],
)
def test_whether_it_fits_here_is_said(rows, monkeypatch, has_gpu, free, said):
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: has_gpu)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: free)
    assert printed(recipe(rows, batch_size=8))["free here"] == said


def lines_that_fit(planned, card, words=()):
    text = plan(planned, KnownBase(LLAMA_8B, "llama"), card=card_of(card), words=words)
    return [line.strip() for line in text.splitlines() if line.startswith(("to fit", "  qlora-kit", "nothing"))]


def test_a_card_that_is_not_at_hand_is_planned_for(rows):
    text = plan(recipe(rows, batch_size=8), KnownBase(LLAMA_8B, "llama"), card=card_of("rtx_4090"))
    assert "23.5 GB │ on rtx_4090, 24 GB: it fits" in text and "to fit" not in text
    assert "without a GPU" not in text
    text = plan(recipe(rows, batch_size=8), KnownBase(LLAMA_8B, "llama"), card=card_of("8GB"))
    assert "7.5 GB │ on a card of 8 GB: it does not fit" in text


def test_where_it_does_not_fit_lines_that_do_are_printed_and_do_fit(rows):
    words = [f"data.train_file={rows}", "trainer.batch_size=8", "card=12GB"]
    told = lines_that_fit(recipe(rows, batch_size=8), "12GB", words)
    assert told[0] == "to fit (10.7 GB, the same learning, fewer rows at once):"
    line = f"qlora-kit plan data.train_file={rows} card=12GB trainer.batch_size=4 trainer.gradient_accumulation=2"
    assert told[1] == line
    again = recipe(rows, batch_size=4, gradient_accumulation=2)
    assert lines_that_fit(again, "12GB") == []
    fast = replace(recipe(rows, batch_size=8), engine=EngineConfig(mode=EngineMode.fast, recompute="none"))
    told = lines_that_fit(fast, "16GB")
    assert told[0].endswith("the same learning, slower):") and "engine.recompute=all" in told[1]
    copies = replace(fast, engine=EngineConfig(mode=EngineMode.fast, cached_weights="all", recompute="all"))
    told = lines_that_fit(copies, "16GB")
    assert told[1] == "qlora-kit plan engine.cached_weights=none" and len(set(told[1::2])) == len(told[1::2])
    assert all("cached_weights=none" in line for line in told[1::2])


def test_rows_are_cut_only_where_fewer_at_once_are_not_enough(rows):
    planned = replace(recipe(rows, batch_size=1), data=DataConfig(train_file=str(rows), max_tokens=16384))
    told = lines_that_fit(planned, "9GB")
    assert "rows that are longer are dropped" in told[0]
    assert "data.max_tokens=" in told[1] and told[1].endswith("data.overflow=drop")
    assert lines_that_fit(planned, "3GB") == [
        "nothing that plan knows makes it fit: take a smaller base, or a larger card"
    ]


def test_a_base_that_is_counted_is_counted_anew_for_what_is_changed(rows, tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    words = [f"model.source={folder}", "data.max_tokens=256", "quant.kind=none", "trainer.batch_size=1"]
    planned = compose_unchecked("train", ["data=rows", f"data.train_file={rows}", *words])
    base = known_base(planned)
    needed = forecast(planned, base, 256).memory.total
    card = Card("", (needed - 0.2e6 + CONTEXT_BYTES) / 1e9)
    told = plan(planned, base, None, card, words).splitlines()
    line = next(line for line in told if line.startswith("  qlora-kit"))
    assert "quant.kind=nf4" in line and "quant.kind=none" not in line
    again = compose_unchecked("train", ["data=rows", f"data.train_file={rows}", *line.split()[2:]])
    assert "it fits" in plan(again, known_base(again), None, card)


def test_a_change_that_the_base_refuses_is_no_way_out(rows, tmp_path, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    words = [f"model.source={folder}", "data.max_tokens=256", "quant.kind=none", "trainer.batch_size=1"]
    planned = compose_unchecked("train", ["data=rows", f"data.train_file={rows}", *words])
    base = known_base(planned)

    def refuses(*_):
        raise RecipeError("no", "quant.kind")

    monkeypatch.setattr(module, "known_base", refuses)
    told = plan(planned, base, None, Card("", (1e6 + CONTEXT_BYTES) / 1e9), words)
    assert "nothing that plan knows makes it fit" in told and "│ total" in told


def test_rows_of_auto_are_as_long_as_the_card_has_room_for(rows, tmp_path, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "base")
    row = '{"prompt": "turn on the lamp in the kitchen and the one in the hall", "completion": "done"}\n'
    (tmp_path / "chats.jsonl").write_text(row * 9, encoding="utf-8")
    data = DataConfig(train_file=str(tmp_path / "chats.jsonl"), max_tokens="auto")
    planned = TrainRecipe(model=ModelConfig(source=str(folder)), data=data, trainer=TrainerConfig(max_steps=1))
    monkeypatch.setattr(rows_module, "free_memory_bytes", lambda: 1e6)
    with pytest.raises(RecipeError, match=r"not even a short row fits into the 1\.0 MB"):
        known_rows(planned)
    assert known_rows(planned, card_of("8GB")) is not None


def test_the_demo_in_the_cache_is_planned_with_the_rows_that_training_would_take(tmp_path, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "demo")
    monkeypatch.setattr(module, "demo_place", lambda: folder)
    row = '{"prompt": "turn on the lamp", "completion": "done"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 9 + '{"prompt": "a", "completion": ""}\n', encoding="utf-8")
    data = DataConfig(
        train_file=str(tmp_path / "rows.jsonl"),
        max_tokens="auto",
        on_bad_row=OnBadRow.skip,
        max_bad_share=0.2,
        cache=False,
        processes=1,
    )
    planned = TrainRecipe(model=ModelConfig(source="demo"), data=data)
    text = plan(planned, known_base(planned), known_rows(planned))
    assert "9 rows, 1 pass over them" in text and "were not read" not in text


def test_auto_is_no_longer_than_the_context_where_rows_are_not_at_hand(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    planned = TrainRecipe(model=ModelConfig(source=str(folder)), data=DataConfig(max_tokens="auto"))
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    assert f"of {context:,} tokens" in " ".join(plan(planned, known_base(planned)).split())


def test_a_usual_export_that_the_base_cannot_become_is_told_below_the_plan(tmp_path):
    OPTConfig(
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(tmp_path)
    planned = TrainRecipe(
        model=ModelConfig(source=str(tmp_path)), data=DataConfig(train_file=None, max_tokens=64), exports=[]
    )
    assert known_base(planned).notes[-1].startswith("warning: no adapter of this base can be exported as gguf_q4_k_m (")
    planned.exports = ["merged_16bit"]
    assert not [note for note in known_base(planned).notes if "export" in note]


def test_wishes_for_a_base_that_is_not_at_hand_are_checked_by_their_names_alone():
    planned = TrainRecipe(
        model=ModelConfig(source="owner/name", shape=LLAMA_8B), data=DataConfig(max_tokens=64), exports=["w8a16"]
    )
    assert plan(planned, known_base(planned)).endswith(f"\n{UNCHECKED}")
    planned.exports = ["w8a17"]
    with pytest.raises(RecipeError, match="did you mean 'w8a16'"):
        known_base(planned, "recipes/experiment/mine.yaml")
