"""The export of a small run in this process: verdicts in every record, with held-out rows, without, and given later."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import FidelityError
from qlora_kit.core.files import read_json, write_json, write_text
from qlora_kit.data.prepare import prepare
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.pipelines.export import export
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.run import Run
from qlora_kit.schema.compose import recipe_yaml
from qlora_kit.schema.data import DataConfig, LaterRows
from qlora_kit.schema.export import BnbTarget, ExportConfig, MergedTarget
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from tests.tiny_models import build_tiny_model

MERGED = {"merged_16bit": MergedTarget()}


def write_rows(path, count, head):
    rows = [{"prompt": f"{head} {number}?", "completion": f"It is {number * 7}."} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A run on an NF4 base, with an adapter that was drawn and no held-out rows."""
    folder = tmp_path_factory.mktemp("run")
    base = build_tiny_model("llama", folder / "base", dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder / "run" / "adapter")
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(folder / "run" / "adapter")
    train = write_rows(folder / "train.jsonl", 12, "what is")
    recipe = TrainRecipe(
        model=ModelConfig(source=str(base)),
        data=DataConfig(train_file=train, max_tokens=64, cache=False, processes=1),
    )
    directory = RunDirectory(folder / "run")
    write_json(directory.data, asdict(prepare(recipe.data, tokenizer, 64).summary))
    write_text(directory.recipe, recipe_yaml(recipe))
    return Run(directory, recipe, Base.of(recipe.model, base), tokenizer)


def following(said):
    return [line for line in said.splitlines() if line.startswith("next: ")]


def test_a_file_that_nobody_measured_is_called_so_everywhere(opened, capsys):
    (done,) = export(opened, ExportConfig(merged=MERGED))
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("NOT MEASURED")
    assert "NOT MEASURED: this run has no held-out rows" in said.err
    assert "\n  do       data.eval_file=<rows that were not trained on>" in said.err
    # Nothing has opened it, so it is not said that it can be talked to
    assert following(said.err) == [f"next: qlora-kit report run={opened.directory.path}"]
    manifest = read_json(done.folder / "manifest.json")
    assert (manifest["verdict"], manifest["rejected"], manifest["scored_on"]) == ("not measured", False, {})
    assert "**Not measured**: without held-out rows" in (done.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rows_that_are_given_later_measure_each_file(opened, tmp_path, capsys):
    later = LaterRows(write_rows(tmp_path / "later.jsonl", 4, "and"))
    config = ExportConfig(merged=MERGED, bnb={"bnb_nf4": BnbTarget()}, max_mean_kl=0.01)
    with pytest.raises(FidelityError, match="bnb_nf4 is rejected: mean KL"):
        export(replace(opened, later=later), config)
    said = capsys.readouterr()
    assert following(said.err) == [
        f"next: qlora-kit chat {opened.directory.exports / 'merged_16bit'}",
        f"next: qlora-kit report run={opened.directory.path}",
    ]
    found = {name: read_json(opened.directory.exports / name / "manifest.json") for name in ("merged_16bit", "bnb_nf4")}
    assert {name: one["verdict"] for name, one in found.items()} == {
        "merged_16bit": "accepted",
        "bnb_nf4": "rejected",
    }
    # Rounded to NF4 again, the base that was trained on would swallow the update.
    assert {name: one["merge"]["base"] for name, one in found.items()} == {
        "merged_16bit": "dequantized",
        "bnb_nf4": "original",
    }
    assert found["bnb_nf4"]["survival"]["kept"] == pytest.approx(1, abs=0.3)
    assert found["merged_16bit"]["scored_on"]["rows"] == 4
    assert found["merged_16bit"]["scored_on"]["files"] == [later.eval_file]
    assert "**Accepted**" in (opened.directory.exports / "merged_16bit" / "README.md").read_text(encoding="utf-8")
    assert [line.split()[-1] for line in said.out.splitlines()[2:]] == ["accepted", "REJECTED"]
