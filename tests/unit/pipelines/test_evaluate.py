"""Evaluation of a small run, every reader the real one: base, adapter, a merged folder and a GGUF file."""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import FidelityError, RecipeError, RunError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.data.encode import Encoder
from qlora_kit.data.prepare import prepare
from qlora_kit.evaluation.eval_plan import build_eval_plan
from qlora_kit.evaluation.scores import Fidelity, compare
from qlora_kit.export.rows import rows_of_eval
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.pipelines import evaluate as evaluation
from qlora_kit.pipelines.evaluate import evaluate, raise_failed_scores
from qlora_kit.report.scores import print_scores
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.run import Run
from qlora_kit.schema.data import DataConfig, Task
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from tests.scored_rows import scored
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizers import TRAINING_TEXT

pytestmark = pytest.mark.slow

NEW_TOKENS = 4


def write_rows(path, count, head):
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            turns = [("user", f"{head} {number}?"), ("assistant", f"The answer is {number * 7}.")]
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            stream.write(json.dumps(row) + "\n")


def export(run, name, format, file, rejected=False):
    write_json(run / "exports" / name / "manifest.json", {"format": format, "file": file, "rejected": rejected})


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A run of an adapter that was drawn and not trained."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QLORA_KIT_CACHE", str(folder / "cache"))
        base = build_tiny_model("llama", folder / "base")
        write_rows(folder / "train.jsonl", 6, "ask")
        write_rows(folder / "held_out.jsonl", 5, "what is")
        (folder / "text.txt").write_text("\n".join(TRAINING_TEXT), encoding="utf-8")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings)
        run = folder / "run"
        tokenizer = load_tokenizer(base)
        model.save_pretrained(run / "adapter")
        tokenizer.save_pretrained(run / "adapter")
        merged = model.merge_and_unload()
        merged.save_pretrained(run / "exports" / "merged_16bit")
        tokenizer.save_pretrained(run / "exports" / "merged_16bit")
        export(run, "merged_16bit", "merged", ".")
        (run / "exports" / "gguf_q8_0").mkdir()
        write_gguf(run / "exports" / "merged_16bit", run / "exports" / "gguf_q8_0" / "m.gguf", "Q8_0")
        export(run, "gguf_q8_0", "gguf", "m.gguf", rejected=True)
        recipe = TrainRecipe()
        recipe.quant = QuantConfig(kind=QuantKind.none)
        recipe.data = DataConfig(
            train_file=str(folder / "train.jsonl"),
            eval_file=str(folder / "held_out.jsonl"),
            max_tokens=128,
            task=Task.exact_match,
            cache=False,
            processes=1,
        )
        write_json(run / "data.json", asdict(prepare(recipe.data, tokenizer, 128).summary))
        yield Run(RunDirectory(run), recipe, Base.of(recipe.model, base), tokenizer)


@pytest.fixture(scope="module")
def table(opened):
    text = str(opened.base.folder.parent / "text.txt")
    config = EvalConfig(max_new_tokens=NEW_TOKENS, text_file=text, text_window=32, text_windows=3, task_rows=4)
    rows = evaluate(opened, config)
    return {row.name: row for row in rows}, read_json(opened.directory.evaluation)


def test_eval_json_holds_the_table_with_its_intervals(opened, table):
    rows, record = table
    assert list(rows) == ["base", "adapter", "merged_16bit", "gguf_q8_0"]
    assert record["confidence"] == 0.95 and record["text_file"].endswith("text.txt")
    for written in record["rows"]:
        row = rows[written["name"]]
        assert Fidelity.from_record(written["fidelity"]) == row.fidelity
        assert row.fidelity.rows == 5
        assert row.fidelity.loss_interval[0] < row.fidelity.loss < row.fidelity.loss_interval[1]
        assert written["exact_match_interval"] == pytest.approx([0, 0.48989], abs=1e-4)  # Wilson, 0 of 4
        assert written["rejected"] is (written["name"] == "gguf_q8_0")
    # What an export rejected stays so; what it did not measure is measured now, and its card says so too.
    assert [row["verdict"] for row in record["rows"]] == ["", "", "measured", "rejected"]
    manifests = {name: read_json(opened.directory.exports / name / "manifest.json") for name in list(rows)[2:]}
    assert manifests["gguf_q8_0"]["evaluation"] == record["rows"][3]
    assert {name: one["verdict"] for name, one in manifests.items()} == {
        "merged_16bit": "measured",
        "gguf_q8_0": "rejected",
    }
    card = (opened.directory.exports / "merged_16bit" / "README.md").read_text(encoding="utf-8")
    assert "**Measured**, without a bound" in card and "mean KL to the trained model" in card


def test_the_adapter_is_no_worse_than_itself_and_the_base_is_another_model(table):
    rows, _ = table
    assert rows["adapter"].fidelity.loss_change == 0
    assert not rows["adapter"].fidelity.is_worse
    base = rows["base"].fidelity
    assert base.loss_change == pytest.approx(base.loss - rows["adapter"].fidelity.loss)
    assert base.mean_kl > 0.1 > rows["merged_16bit"].fidelity.mean_kl


def test_text_perplexity_agrees_between_readers(table):
    rows, _ = table
    adapter, merged, gguf = (rows[name] for name in ("adapter", "merged_16bit", "gguf_q8_0"))
    assert {row.text_tokens for row in rows.values()} == {3 * 31}
    assert merged.text_perplexity == pytest.approx(adapter.text_perplexity, rel=1e-3)
    assert gguf.text_perplexity == pytest.approx(adapter.text_perplexity, rel=0.1)
    assert rows["base"].text_perplexity != pytest.approx(adapter.text_perplexity, rel=1e-3)
    assert adapter.text_perplexity_interval[0] < adapter.text_perplexity < adapter.text_perplexity_interval[1]


def test_answers_are_kept_as_samples(table):
    _, record = table
    assert [sample["prompt"] for sample in record["samples"]] == ["what is 0?", "what is 1?", "what is 2?"]
    assert [sample["expected"] for sample in record["samples"]] == [f"The answer is {n * 7}." for n in range(3)]
    assert list(record["samples"][0]["answers"]) == ["base", "adapter", "merged_16bit", "gguf_q8_0"]
    assert record["samples"][0]["answers"]["merged_16bit"] == record["samples"][0]["answers"]["adapter"]


def test_stops_are_counted(opened, table):
    rows, _ = table
    # a model that was never taught to stop, and four tokens
    assert [row.stops for row in rows.values()] == [0, 0, 0, 0]
    assert rows["adapter"].stops_interval == pytest.approx((0, 0.48989), abs=1e-4)


def with_task_none(opened):
    recipe = TrainRecipe()
    recipe.quant, recipe.data = opened.recipe.quant, DataConfig(**{**vars(opened.recipe.data), "task": Task.none})
    return Run(opened.directory, recipe, opened.base, opened.tokenizer)


@pytest.mark.parametrize(("prompts", "answered"), [(0, 0), (2, 2)])
def test_without_a_task_stops_are_measured_where_asked(opened, prompts, answered):
    config = EvalConfig(artifacts=["adapter"], eos_rows=prompts, max_new_tokens=NEW_TOKENS)
    (row,) = scored(evaluate(with_task_none(opened), config))
    assert (row.answered, row.exact_match, row.exact_match_interval) == (answered, None, None)
    assert row.stops == (0 if answered else None)
    assert row.text_perplexity is None


def test_the_harness_is_given_models_of_transformers_and_not_others(opened, monkeypatch, capsys):
    seen, said = [], []

    def run_harness(model, tokenizer, tasks, batch_size, limit):
        with torch.no_grad():
            said.append(model(torch.tensor([[5, 6, 7]])).logits)
        seen.append((type(model).__name__, tasks.names, batch_size, limit))
        return {"arc_easy": {"acc,none": 0.25}}

    monkeypatch.setattr(evaluation, "require_harness", lambda: None)
    monkeypatch.setattr(evaluation, "run_harness", run_harness)
    config = EvalConfig(lm_eval=["arc_easy"], lm_eval_limit=9, batch_size=3)
    rows = scored(evaluate(with_task_none(opened), config))
    assert seen == [
        ("PeftModelForCausalLM", ["arc_easy"], 3, 9),
        ("PeftModelForCausalLM", ["arc_easy"], 3, 9),
        ("LlamaForCausalLM", ["arc_easy"], 3, 9),
    ]
    base, adapter, merged = said
    assert torch.allclose(adapter, merged, atol=1e-3)
    assert not torch.allclose(base, adapter, atol=0.1)
    assert [row.lm_eval for row in rows] == [{"arc_easy": {"acc,none": 0.25}}] * 3 + [{}]
    assert "gguf_q8_0: lm-eval runs models of transformers only" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_a_weight_is_loaded(opened, monkeypatch):
    monkeypatch.setattr(evaluation, "open_models", lambda *_: pytest.fail("loaded"))
    text = str(opened.base.folder.parent / "text.txt")
    monkeypatch.setattr(evaluation, "require_harness", lambda: None)
    for config, what, fix in (
        (EvalConfig(artifacts=["awq"]), "no artifact named awq; it has base, adapter, merged_16bit, gguf_q8_0", "=["),
        (EvalConfig(text_file="absent.txt"), "cannot read absent.txt", "eval.text_file=null"),
        (EvalConfig(lm_eval=["absent.yaml"]), "cannot read the task file absent.yaml", "eval.lm_eval"),
        (
            EvalConfig(text_file=text, text_window=100_000),
            "eval.text_window=100000 is more than the .* positions that this base was made for",
            "eval.text_window=",
        ),
    ):
        with pytest.raises(RecipeError, match=what) as caught:
            evaluate(opened, config)
        assert fix in str(caught.value)


def test_texts_without_a_prompt_are_told_and_left_out(opened, monkeypatch, capsys):
    prompts = iter([[], [1, 2], [3], [], [4]])
    monkeypatch.setattr(Encoder, "prompt_ids", lambda *_: next(prompts))
    rows = rows_of_eval(opened, EvalConfig(), None)
    found = build_eval_plan(opened, rows.scored, rows.conversations, EvalConfig())
    assert found.prompts == [[1, 2], [3], [4]]
    assert found.expected == [f"The answer is {number * 7}." for number in (1, 2, 4)]
    assert "2 held-out rows are texts without a prompt" in capsys.readouterr().err


def test_scores_that_are_no_numbers_reject_a_file_in_every_record(opened, monkeypatch):
    folder = opened.directory.exports / "merged_16bit"
    before = read_json(folder / "manifest.json")
    plain = compare

    def broken(reference, other):
        fit = plain(reference, other)
        return replace(fit, mean_kl=math.nan) if fit.mean_kl else fit  # the adapter's own is exact

    monkeypatch.setattr(evaluation, "compare", broken)
    config = EvalConfig(artifacts=["adapter", "merged_16bit"], eos_rows=0)
    adapter, merged = scored(evaluate(with_task_none(opened), config))
    assert (adapter.rejected, merged.rejected, merged.verdict) == (False, True, "rejected")
    with pytest.raises(FidelityError, match=r"merged_16bit is rejected: its scores are not finite numbers"):
        raise_failed_scores([adapter, merged], opened.directory.exports)
    assert read_json(folder / "manifest.json")["verdict"] == "rejected"
    assert "**Rejected**, do not serve this file" in (folder / "README.md").read_text(encoding="utf-8")
    for path in (folder / "manifest.json", opened.directory.evaluation):
        assert "NaN" not in path.read_text(encoding="utf-8")
    monkeypatch.undo()
    # The fault was of that scoring, so the next one is judged by itself.
    (again,) = scored(evaluate(with_task_none(opened), EvalConfig(artifacts=["merged_16bit"])))
    assert (again.verdict, read_json(folder / "manifest.json")["faults"]) == ("measured", [])
    raise_failed_scores([again], opened.directory.exports)
    write_json(folder / "manifest.json", before)


def test_a_bound_of_the_export_counts_when_eval_measures(opened):
    folder = opened.directory.exports / "gguf_q8_0"
    before = read_json(folder / "manifest.json")
    for bound, verdict in ((1.0, "accepted"), (1e-9, "rejected")):
        write_json(folder / "manifest.json", {"format": "gguf", "file": "m.gguf", "max_mean_kl": bound})
        (row,) = scored(evaluate(with_task_none(opened), EvalConfig(artifacts=["gguf_q8_0"])))
        assert row.verdict == read_json(folder / "manifest.json")["verdict"] == verdict
    assert "is above export.max_mean_kl=1e-09" in row.faults[0]
    write_json(folder / "manifest.json", before)


def test_a_part_that_is_scored_again_joins_the_others_in_eval_json(opened):
    subject, held = with_task_none(opened), opened.directory.evaluation
    held.unlink(missing_ok=True)
    evaluate(subject, EvalConfig())
    evaluate(subject, EvalConfig(artifacts=["adapter"], eos_rows=1, max_new_tokens=2))
    rows = {row["name"]: row for row in read_json(held)["rows"]}
    assert list(rows) == ["base", "adapter", "merged_16bit", "gguf_q8_0"]
    assert [row["answered"] for row in rows.values()] == [0, 1, 0, 0]
    evaluate(subject, EvalConfig(artifacts=["adapter"], kl_rows=2))
    record = read_json(held)
    assert [row["name"] for row in record["rows"]] == ["adapter"]
    assert len(record["earlier"][0]["rows"]) == 4


def test_each_artifact_is_named_before_it_is_scored(opened, capsys):
    config = EvalConfig(artifacts=["base", "merged_16bit"], task_rows=1, max_new_tokens=NEW_TOKENS)
    evaluate(opened, config)
    lines = [line.partition(" loss ")[0] for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line.startswith(("eval: ", "base:", "merged_16bit:"))]
    first = "eval: scoring adapter, which the others are held against, on 5 rows"
    assert told == [first, "eval: base ...", "base:", "eval: merged_16bit ...", "merged_16bit:"]


def test_a_damaged_manifest_is_left_out_and_said(opened, capsys):
    broken = opened.directory.exports / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("5", encoding="utf-8")
    (row,) = scored(evaluate(with_task_none(opened), EvalConfig(artifacts=["gguf_q8_0"])))
    assert row.name == "gguf_q8_0"
    assert (
        f"warning: broken is left out: {broken / 'manifest.json'} does not hold a JSON object"
        in capsys.readouterr().err
    )
    (broken / "manifest.json").unlink()
    broken.rmdir()


def test_a_file_that_cannot_be_read_is_a_row_and_the_others_are_scored(opened, capsys):
    folder, held = opened.directory.exports / "a_broken_one", opened.directory.evaluation
    held.unlink(missing_ok=True)
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    export(opened.directory.path, folder.name, "gguf", "m.gguf")
    (opened.directory.exports / "bare").mkdir()
    table = evaluate(with_task_none(opened), EvalConfig(eos_rows=2, max_new_tokens=2))
    assert [row.name for row in table] == ["base", "adapter", "merged_16bit", "a_broken_one", "gguf_q8_0"]
    assert "warning: bare is left out: it holds no manifest.json" in capsys.readouterr().err
    record = read_json(held)
    assert [row["name"] for row in record["rows"]] == [row.name for row in table]
    assert "llama.cpp cannot load" in record["rows"][3]["error"] and "fidelity" not in record["rows"][3]
    assert all("fidelity" in row for row in record["rows"] if row["name"] != "a_broken_one")
    print_scores("x", [asdict(row) for row in table], "adapter", "the trained model")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a_broken_one" in line]
    assert line.endswith("FAILED")
    with pytest.raises(RunError, match=r"a_broken_one was not scored: llama\.cpp cannot load") as caught:
        raise_failed_scores(table, opened.directory.exports)
    assert (caught.value.exit_code, caught.value.problems[0].where) == (1, str(folder))
    assert caught.value.problems[0].fix == "export it again, or move its folder out of exports/"
    # An answer of the file as it was is not the broken one's.
    write_json(held, {**record, "rows": [{**row, "answered": 9} for row in record["rows"]]})
    evaluate(with_task_none(opened), EvalConfig(artifacts=["a_broken_one"]))
    assert "answered" not in {row["name"]: row for row in read_json(held)["rows"]}["a_broken_one"]
    shutil.rmtree(folder)
    (opened.directory.exports / "bare").rmdir()
