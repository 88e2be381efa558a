"""What a training recipe wants its run to become is held against its base before a weight is loaded."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, OPTConfig, Qwen3MoeConfig

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.extras import is_present
from qlora_kit.formats.registry import FORMATS, requested
from qlora_kit.formats.wished import outlook, refuse_wishes, settings_to_come, usual_options
from qlora_kit.schema.check_wished import UNCHECKED
from qlora_kit.schema.compose import compose_recipe, compose_unchecked
from qlora_kit.schema.data import DataConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import ExportRecipe, TrainRecipe
from tests.tiny_models import FAMILIES

PACKAGES = ("llmcompressor", "gptqmodel", "gguf")
pytestmark = [
    pytest.mark.skipif(not all(map(is_present, PACKAGES)), reason="composing needs every format's package"),
    pytest.mark.slow,
]

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 2}
NARROW = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 3}


def config_of(name: str) -> Any:
    """A config.json's worth of a base."""
    if name == "moe":
        sizes = {"hidden_size": 256, "vocab_size": 640, "norm_topk_prob": True}
        return Qwen3MoeConfig(**sizes, **IDS, **MOE, architectures=["Qwen3MoeForCausalLM"])
    if name == "opt":
        widths = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512, "num_attention_heads": 8}
        return OPTConfig(**widths, num_hidden_layers=2, **IDS, architectures=["OPTForCausalLM"])
    if name == "gpt2":
        return GPT2Config(n_embd=256, n_layer=2, n_head=8, vocab_size=640, **IDS, architectures=["GPT2LMHeadModel"])
    sizes = NARROW if name == "narrow" else {}
    return FAMILIES["llama"][0](**sizes, **IDS, architectures=["LlamaForCausalLM"])


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder that holds a config.json and nothing else."""
    config_of(request.param).save_pretrained(tmp_path)
    return tmp_path


def recipe(*exports: str, folder: Path = Path("base"), **lora: Any) -> TrainRecipe:
    data = DataConfig(train_file="rows.jsonl", max_tokens=64)
    source = ModelConfig(source=str(folder))
    return TrainRecipe(model=source, data=data, exports=list(exports), lora=LoraConfig(**lora))


def refusal(wished: TrainRecipe, folder: Path) -> RecipeError:
    with pytest.raises(RecipeError) as found:
        outlook(wished, folder, "command line: exports=[..]")
    return found.value


def mended(wished: TrainRecipe, error: RecipeError) -> TrainRecipe:
    """The recipe with the line in place that the error says to paste."""
    fix = error.problems[0].fix
    line = ["model.source=x", "data=rows", "data.train_file=x", "data.max_tokens=64", *shlex.split(fix)]
    pasted = compose_unchecked("train", line)
    assert isinstance(pasted, TrainRecipe)
    return replace(wished, exports=pasted.exports)


CASES = [
    ("opt", ["gguf_q8_0", "gptq_4bit"], "gguf_q8_0", "no GGUF export for the architecture OPT", ["gptq_4bit"]),
    ("moe", ["bnb_nf4"], "bnb_nf4", "so this family's experts would stay in 16 bit", ["merged_16bit"]),
    ("moe", ["fp8_block", "w8a16"], "fp8_block", "which do not fill", ["w8a16"]),
    ("narrow", ["gptq_4bit"], "gptq_4bit", "group_size=128 does not divide in_features=192", ["gptq_4bit_g64"]),
]


@pytest.mark.parametrize(("base", "wished", "name", "why", "instead"), CASES, indirect=["base"])
def test_an_impossible_wish_is_refused_with_a_line_that_works(
    base: Path, wished: list[str], name: str, why: str, instead: list[str]
) -> None:
    asked = recipe(*wished)
    error = refusal(asked, base)
    (problem,) = error.problems
    assert problem.what.startswith(f"the exports of this run name {name}, which cannot be written: ")
    assert why in problem.what
    assert problem.where == "command line: exports=[..]"
    pasted = mended(asked, error)
    assert pasted.exports == instead
    outlook(pasted, base)
    can = problem.what.partition("\n  instead  ")[2].split(", ")
    assert set(instead) - set(wished) <= set(can)
    assert "merged_16bit" in can
    outlook(replace(asked, exports=can), base)


@pytest.mark.parametrize("base", ["moe"], indirect=True)
def test_every_impossible_wish_is_told_at_once(base: Path) -> None:
    error = refusal(recipe("bnb_nf4", "w8a16", "mxfp4"), base)
    assert [problem.what.split()[6].rstrip(",") for problem in error.problems] == ["bnb_nf4", "mxfp4"]
    assert {problem.fix for problem in error.problems} == {"'exports=[w8a16]'"}


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_wishes_that_cannot_stand_beside_each_other_are_refused_with_those_that_can(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    (base / "recipes" / "export").mkdir(parents=True)
    (base / "recipes" / "export" / "mine.yaml").write_text("# @package export.awq.gguf_q4_k_m\nbits: 4\n", "utf-8")
    asked = recipe("gguf_q4_k_m", "mine", "w8a16")
    error = refusal(asked, base)
    (problem,) = error.problems
    assert "cannot be written together: two exports are named gguf_q4_k_m" in problem.what
    pasted = mended(asked, error)
    assert pasted.exports == ["gguf_q4_k_m", "w8a16"]
    outlook(pasted, base)


@pytest.mark.parametrize("base", ["narrow"], indirect=True)
def test_the_setting_that_export_would_take_is_named(base: Path) -> None:
    what = refusal(recipe("gptq_4bit"), base).problems[0].what
    assert "(export takes it with export.gptq.gptq_4bit.group_size=64)" in what


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_adapter_that_is_to_be_trained_is_held_against_the_wish(base: Path) -> None:
    outlook(recipe("adapter_gguf"), base)
    for lora, held in (
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "trained in full"),
    ):
        asked = recipe("adapter_gguf", **lora)
        error = refusal(asked, base)
        assert held in error.problems[0].what
        outlook(mended(asked, error), base)


@pytest.mark.parametrize("base", ["moe"], indirect=True)
def test_the_adapter_of_experts_is_foreseen(base: Path) -> None:
    assert settings_to_come(base, LoraConfig())["target_parameters"] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    ]
    assert settings_to_come(base, LoraConfig(experts=False))["target_parameters"] == []


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_package_that_is_missing_is_installed_by_the_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.schema.check.is_present", lambda module: module != "gptqmodel")
    (problem,) = refusal(recipe("gptq_4bit", "w8a16"), base).problems
    assert problem.fix.startswith("pip install")
    assert "the package 'gptqmodel', which is not installed" in problem.what


@pytest.mark.parametrize(
    ("base", "impossible"),
    [
        ("llama", {}),
        ("narrow", {}),  # a setting mends what does not fit
        ("opt", {"gguf_q4_k_m": "llama.cpp's converter does not know it"}),
        ("moe", {"bnb_nf4": "this family's experts would stay in 16 bit"}),
        ("gpt2", dict.fromkeys(["gptq_4bit", "awq_4bit", "w8a16", "bnb_nf4"], "no linear layers (Conv1D)")),
    ],
    indirect=["base"],
)
def test_without_a_wish_the_usual_files_that_no_setting_makes_are_told_in_one_line(
    base: Path, impossible: dict[str, str]
) -> None:
    found = outlook(recipe(), base)
    assert found.lines == ()
    names = found.warning
    while (without := re.sub(r"\([^()]*\)", "", names)) != names:  # reasons may name what can be written instead
        names = without
    assert {name for name in usual_options() if name in names} == set(impossible)
    assert all(why in found.warning for why in impossible.values())
    assert len(found.warning.splitlines()) == bool(impossible)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_layers_that_a_wished_file_keeps_in_16_bit_are_told(base: Path) -> None:
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 60}
    FAMILIES["llama"][0](**IDS, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(base)
    (line,) = outlook(recipe("awq_4bit_g64"), base).lines
    assert line.startswith("awq_4bit_g64: 4 of 14 linear layers stay in 16 bit (k_proj, v_proj): ")


@pytest.mark.parametrize("base", ["opt"], indirect=True)
def test_what_is_at_hand_is_checked_and_nothing_is_fetched(base: Path) -> None:
    with pytest.raises(RecipeError, match="gguf_q8_0, which cannot be written"):
        refuse_wishes(recipe("gguf_q8_0", folder=base))
    assert refuse_wishes(recipe("gguf_q8_0", folder=base / "nothing")) == UNCHECKED
    assert refuse_wishes(replace(recipe("gguf_q8_0"), model=ModelConfig(source="owner/name"))) == UNCHECKED
    assert not refuse_wishes(recipe(folder=base / "nothing"))


def test_usual_options_are_one_of_each_format_that_has_one() -> None:
    names = usual_options()
    export = compose_recipe("export", ["run=latest", f"export=[{','.join(names)}]"]).recipe
    assert isinstance(export, ExportRecipe)
    assert {one.name: one.format.name for one in requested(export.export)} == {
        one.usual: one.name for one in FORMATS.values() if one.usual
    }
    assert {one.name for one in FORMATS.values() if not one.usual} == {"awq_gemv", "fp8_block", "adapter_gguf"}
