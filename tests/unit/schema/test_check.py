"""Every issue of the cross-checks: the field it names, what it says, and a line that mends it."""

import dataclasses
from typing import Any

import pytest

from qlora_kit.core.extras import install_line
from qlora_kit.schema import check as checks
from qlora_kit.schema.check import check, check_targets
from qlora_kit.schema.data import DataConfig, Task
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.export import (
    AwqLayout,
    AwqTarget,
    CompressedTarget,
    ExportConfig,
    GgufMix,
    GgufTarget,
    GptqTarget,
    MergedTarget,
)
from qlora_kit.schema.lora import LoraConfig, LoraInit
from qlora_kit.schema.model import Attention, ModelConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe
from qlora_kit.schema.tracker import TrackerConfig
from qlora_kit.schema.trainer import TrainerConfig


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    return DataConfig(train_file=str(file), max_tokens=64)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """No GPU; every package of an extra is there, flash_attn is not."""
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(checks, "is_present", lambda module: module != "flash_attn")


def found(recipe):
    return {issue.path: (issue.what, issue.fix) for issue in check(recipe)}


def train(rows, **groups):
    return TrainRecipe(model=ModelConfig(source="demo"), data=rows, **groups)


def test_a_good_recipe_has_no_issue(rows):
    assert found(train(rows, optim=OptimConfig(name=OptimizerName.adamw))) == {}
    assert found(train(rows, optim=OptimConfig(name=OptimizerName.loraplus, loraplus_ratio=4.0))) == {}


TRAIN: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "below": ({"lora": LoraConfig(r=0)}, "lora.r", "lora.r must be at least 1, got 0", "lora.r=1"),
    "above": (
        {"lora": LoraConfig(dropout=2.0)},
        "lora.dropout",
        "lora.dropout must be at most 0.99, got 2",
        "lora.dropout=0.99",
    ),
    "open bound": (
        {"optim": OptimConfig(learning_rate=0.0)},
        "optim.learning_rate",
        "optim.learning_rate must be above 0, got 0",
        "optim.learning_rate=0.0002",
    ),
    "a decay of one": (
        {"optim": OptimConfig(beta1=1.0)},
        "optim.beta1",
        "optim.beta1 must be at most 0.999999, got 1",
        "optim.beta1=0.9",
    ),
    "not a number": (
        {"optim": OptimConfig(weight_decay=float("nan"))},
        "optim.weight_decay",
        "optim.weight_decay must be a finite number, got nan",
        "optim.weight_decay=0.0",
    ),
    "unmergeable": (
        {"lora": LoraConfig(init=LoraInit.orthogonal)},
        "lora.init",
        "lora.init=orthogonal cannot be trained and merged on a nf4 base: it needs floating-point base weights",
        "lora.init=default",
    ),
    "bias": ({"lora": LoraConfig(lora_bias=True)}, "lora.lora_bias", "cannot be merged", "lora.lora_bias=false"),
    "DoRA on int8": (
        {"lora": LoraConfig(use_dora=True), "quant": QuantConfig(kind=QuantKind.int8)},
        "lora.use_dora",
        "DoRA cannot be merged faithfully on an int8 base",
        "quant=nf4_double",
    ),
    "no target": ({"lora": LoraConfig(targets=[])}, "lora.targets", "nothing would be trained", "[all_linear]"),
    "head": (
        {"lora": LoraConfig(targets=["lm_head"])},
        "lora.targets",
        "an adapter on it would be ignored",
        "lora.modules_to_save=[lm_head]",
    ),
    "pattern": (
        {"lora": LoraConfig(rank_pattern={"q_proj": 0})},
        "lora.rank_pattern",
        "lora.rank_pattern gives q_proj the value 0; it must be above 0",
        "",
    ),
    "evaluates nothing": (
        {"trainer": TrainerConfig(eval_every_steps=5)},
        "trainer.eval_every_steps",
        "trainer.eval_every_steps is set, but there are no held-out rows",
        "data.eval_share=0.02",
    ),
    "no fallback": (
        {"optim": OptimConfig(fallback=False)},
        "optim.fallback",
        "optim.name=paged_adamw_8bit needs a GPU, there is none",
        "optim.fallback=true",
    ),
    "a ratio of rates that nothing reads": (
        {"optim": OptimConfig(loraplus_ratio=4.0)},
        "optim.loraplus_ratio",
        "optim.loraplus_ratio has no effect: with optim.name=paged_adamw_8bit all of LoRA learns at one rate",
        "optim.name=loraplus",
    ),
    "half precision": (
        {"quant": QuantConfig(compute_dtype=ComputeDtype.float16)},
        "quant.compute_dtype",
        "float16 training needs a GPU",
        "quant.compute_dtype=bfloat16",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_issues_of_a_training_recipe(rows, case):
    groups, path, what, fix = TRAIN[case]
    issues = found(train(rows, **groups))
    assert list(issues) == [path]
    assert what in issues[path][0] and fix in issues[path][1]
    assert bool(fix) == bool(issues[path][1])


def test_a_task_needs_rows_to_judge(rows):
    rows.task = Task.exact_match
    assert found(train(rows)) == {
        "data.task": (
            "data.task=exact_match is set, but there are no held-out rows whose answers it could judge",
            "data.eval_share=0.02",
        )
    }


def test_files_that_are_not_there(rows):
    other = DataConfig(train_file=rows.train_file, eval_file="data/home_commands/no.jsonl", max_tokens=64)
    assert found(train(other)) == {
        "data.eval_file": (
            "no such file: data/home_commands/no.jsonl",
            "data.eval_file=null data.eval_share=0.02",
        )
    }
    recipe = TrainRecipe(model=ModelConfig(source="demo", chat_template="no.jinja"), data=rows)
    what = "no such chat template file: no.jinja"
    assert found(recipe) == {"model.chat_template": (what, "model.chat_template=null")}


ENGINES = {
    "a word for an amount": (
        EngineConfig(recompute="some"),
        "engine.recompute",
        "engine.recompute: 'some' is none of auto, none, all, and no amount of memory such as 20GB",
        "engine.recompute=auto",
    ),
    "no memory at all": (
        EngineConfig(cached_weights="0GB"),
        "engine.cached_weights",
        "engine.cached_weights: '0GB' is none of auto, none, all, and no amount of memory such as 20GB",
        "engine.cached_weights=auto",
    ),
    "fp8 by peft": (
        EngineConfig(compute=Compute.fp8),
        "engine.compute",
        "engine.compute=fp8 needs the fast engine; the plain one is peft's own arithmetic",
        "engine.mode=fast",
    ),
}


@pytest.mark.parametrize("amount", ["1MB", "6.4GB", "1.5 gib", "512MiB", "all"])
def test_an_amount_that_the_engine_reads_is_no_problem(rows, amount):
    assert found(dataclasses.replace(train(rows), engine=EngineConfig(recompute=amount, cached_weights=amount))) == {}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_that_cannot_be(rows, monkeypatch, name):
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: True)
    engine, path, what, fix = ENGINES[name]
    assert found(train(rows, engine=engine))[path] == (what, fix)


def test_fp8_needs_a_gpu_and_4_bit_weights(rows, monkeypatch):
    engine = EngineConfig(mode=EngineMode.fast, compute=Compute.fp8_backward)
    what = "engine.compute=fp8_backward needs a GPU with fp8 (Ada, Hopper or newer), and there is none"
    assert found(train(rows, engine=engine))["engine.compute"] == (what, "engine.compute=bf16")
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: True)
    assert "engine.compute" not in found(train(rows, engine=engine))
    what = "engine.compute=fp8_backward is made from 4-bit weights, and quant.kind is none"
    quant = QuantConfig(kind=QuantKind.none)
    assert found(train(rows, engine=engine, quant=quant))["engine.compute"] == (what, "quant=nf4_double")


def test_budgets_of_the_engine(rows):
    for budget in ("auto", "none", "all", "20GB", "1.5GB"):
        assert "engine.recompute" not in found(train(rows, engine=EngineConfig(recompute=budget)))


def test_flex_attention_without_a_gpu(rows, monkeypatch):
    recipe = TrainRecipe(model=ModelConfig(source="demo", attention=Attention.flex_attention), data=rows)
    what = "flex_attention cannot train without a GPU: torch has no backward of it on a CPU"
    assert found(recipe)["model.attention"] == (what, "model.attention=sdpa")
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: True)
    assert "model.attention" not in found(recipe)


def test_flash_attention_without_its_package_or_a_gpu(rows, monkeypatch):
    recipe = TrainRecipe(model=ModelConfig(source="demo", attention=Attention.flash_attention_2), data=rows)
    whats = [issue.what for issue in check(recipe)]
    assert whats == [
        "flash_attention_2 needs the package 'flash_attn', which is not installed",
        "flash_attention_2 needs a GPU, and there is none",
    ]
    monkeypatch.setattr(checks, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(checks, "is_present", lambda module: True)
    assert check(recipe) == []


def test_a_tracker_that_is_not_installed(rows, monkeypatch):
    monkeypatch.setattr(checks, "is_present", lambda module: module != "mlflow")
    assert found(train(rows, tracker=TrackerConfig(mlflow=True, wandb=True))) == {
        "tracker.mlflow": (
            "tracker=mlflow needs the package 'mlflow', which is not installed",
            install_line("mlflow"),
        )
    }


EXPORT = {
    "nothing": (ExportConfig(), "export", "no export is named", "export=[gguf_q4_k_m]"),
    "same name": (
        ExportConfig(gguf={"a": GgufTarget()}, merged={"a": MergedTarget()}),
        "export",
        "two exports are named a; each gets a folder of its own",
        "",
    ),
    "a name that eval has": (
        ExportConfig(gguf={"adapter": GgufTarget()}),
        "export",
        "an export cannot be named adapter: that is what eval calls the trained model",
        "",
    ),
    "a type that needs a matrix": (
        ExportConfig(gguf={"a": GgufTarget(mix=GgufMix.IQ2_XS, imatrix=False)}),
        "export.gguf.a.imatrix",
        "IQ2_XS files are garbage without an importance matrix",
        "export.gguf.a.imatrix=true",
    ),
    "GPTQ bits": (
        ExportConfig(gptq={"a": GptqTarget(bits=5)}),
        "export.gptq.a.bits",
        "GPTQ packs 2, 3, 4 or 8 bits, not 5",
        "export.gptq.a.bits=4",
    ),
    "AWQ bits": (
        ExportConfig(awq={"a": AwqTarget(bits=8)}),
        "export.awq.a.bits",
        "export.awq.a.bits must be at most 4, got 8",
        "export.awq.a.bits=4",
    ),
    "AWQ groups": (
        ExportConfig(awq={"a": AwqTarget(group_size=48)}),
        "export.awq.a.group_size",
        "readers of AWQ files (gemm) take groups of 16, 32, 64, 128, -1, not 48",
        "export.awq.a.group_size=128",
    ),
    "AWQ groups of the other layout": (
        ExportConfig(awq={"a": AwqTarget(group_size=32, layout=AwqLayout.gemv)}),
        "export.awq.a.group_size",
        "readers of AWQ files (gemv) take groups of 64, 128, not 32",
        "export.awq.a.group_size=128",
    ),
    "16-bit format": (
        ExportConfig(merged={"a": MergedTarget(dtype="float16")}),
        "export.merged.a.dtype",
        "export.merged.a.dtype=float16 is not written; only bfloat16 is",
        "export.merged.a.dtype=bfloat16",
    ),
}


@pytest.mark.parametrize("case", EXPORT)
def test_issues_of_an_export(case):
    config, path, what, fix = EXPORT[case]
    assert found(ExportRecipe(export=config)) == {path: (what, fix)}


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [
        (ExportConfig(gguf={"a": GgufTarget()}), "libgguf", "gguf"),
        (ExportConfig(gptq={"a": GptqTarget()}), "gptqmodel", "gptq"),
        (ExportConfig(awq={"a": AwqTarget()}), "gptqmodel", "gptq"),
        (ExportConfig(compressed={"a": CompressedTarget()}), "llmcompressor", "compressed"),
    ],
)
def test_an_export_whose_package_is_missing(monkeypatch, config, module, extra):
    monkeypatch.setattr(checks, "is_present", lambda name: name != module)
    what = f"this export needs the package '{module}', which is not installed"
    assert found(ExportRecipe(export=config)) == {"export": (what, install_line(extra))}


def test_an_evaluation_of_nothing():
    assert found(EvalRecipe(eval=EvalConfig(artifacts=[]))) == {
        "eval.artifacts": ("eval.artifacts is empty, so nothing would be scored", "eval.artifacts=[all]")
    }


def test_targets_that_the_base_does_not_have():
    (issue,) = check_targets(["q_proj", "w1", "mlp"], {"q_proj", "up_proj"})
    assert issue.what == (
        "lora.targets names w1, which is no linear module of this base; it has all_linear, attention, mlp, q_proj, "
        "up_proj"
    )
    assert dataclasses.astuple(issue)[::2] == ("lora.targets", "lora.targets=[all_linear]")
