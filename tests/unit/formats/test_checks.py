"""What a recipe exports is held against a model's form before a weight is loaded, and every fix passes in turn."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, OPTConfig, Qwen3MoeConfig

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.extras import is_present
from qlora_kit.export.checks.fault import ELSEWHERE
from qlora_kit.export.checks.form import ModelForm, model_form
from qlora_kit.formats.checks import Checked, check_exports, check_form, refuse_unfit
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.export import ExportConfig
from tests.tiny_models import FAMILIES, build_tiny_model

pytestmark = [
    pytest.mark.skipif(not is_present("llmcompressor"), reason="composing its formats needs llmcompressor"),
    pytest.mark.slow,
]

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ODD = {"hidden_size": 200, "intermediate_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2}


def form_of(folder: Path, config: object) -> ModelForm:
    """The form of a folder that holds a config.json and nothing else."""
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    form = model_form(folder)
    assert form is not None
    return form


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelForm]:
    folder = tmp_path_factory.mktemp("forms")
    made = {name: make(**IDS) for name, (make, _) in FAMILIES.items()}
    for config in made.values():
        config.architectures = [
            {"Gemma3TextConfig": "Gemma3ForCausalLM"}.get(
                type(config).__name__, type(config).__name__.replace("Config", "ForCausalLM")
            )
        ]
    made["odd"] = FAMILIES["llama"][0](**ODD, **IDS, architectures=["LlamaForCausalLM"])
    made["k100"] = FAMILIES["llama"][0](head_dim=50, **IDS, architectures=["LlamaForCausalLM"])
    made["gpt2"] = GPT2Config(n_embd=256, n_layer=2, n_head=8, vocab_size=640, **IDS, architectures=["GPT2LMHeadModel"])
    widths = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512, "num_attention_heads": 8}
    made["opt"] = OPTConfig(**widths, num_hidden_layers=2, **IDS, architectures=["OPTForCausalLM"])
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    made["moe"] = Qwen3MoeConfig(hidden_size=256, vocab_size=640, **IDS, **moe, architectures=["Qwen3MoeForCausalLM"])
    made["moe that norms"] = Qwen3MoeConfig(**made["moe"].to_dict() | {"norm_topk_prob": True})
    return {name: form_of(folder / name, config) for name, config in made.items()}


def export_of(words: list[str]) -> ExportConfig:
    """The recipe group of a command line."""
    recipe = compose_recipe("export", ["run=latest", *words]).recipe
    return recipe.export


def fit(form: ModelForm, *words: str) -> Checked:
    return check_form(form, export_of(list(words)))


def mended_line(words: list[str], problems: list[Problem]) -> list[str]:
    """The words with every fix in place: a new choice of exports takes the place of all settings of the old one."""
    for problem in problems:
        if problem.fix == ELSEWHERE:
            return [ELSEWHERE]
    return [*words, *(word for problem in problems for word in shlex.split(problem.fix))]


CASES = {
    "gptq group": (
        "llama",
        ["export=gptq_4bit", "export.gptq.gptq_4bit.group_size=96"],
        "group_size=96 does not divide",
    ),
    "gptq group of an odd width": ("odd", ["export=gptq_4bit"], "group_size=128 does not divide in_features=200"),
    "gptq whole rows of an odd width": (
        "odd",
        ["export=gptq_3bit", "export.gptq.gptq_3bit.group_size=-1"],
        "14 layers do not fill the packed layout, which holds multiples of 32",
    ),
    "gptq odd keys": ("k100", ["export=gptq_4bit_g64"], "does not divide in_features=200"),
    "desc_act of rounding": (
        "llama",
        ["export=gptq_4bit_rounding", "export.gptq.gptq_4bit_rounding.desc_act=true"],
        "desc_act orders columns by activation size",
    ),
    "gptq pattern": (
        "llama",
        ["export=gptq_4bit", "export.gptq.gptq_4bit.overrides={*.dwn_proj: {bits: 8}}"],
        r"the pattern '*.dwn_proj' matches no linear layer",
    ),
    "gptq of Conv1D": ("gpt2", ["export=gptq_4bit"], "this family has no GPTQ file"),
    "awq group": ("odd", ["export=awq_4bit"], "group_size=128 does not divide in_features=200"),
    "awq of Conv1D": ("gpt2", ["export=awq_4bit"], "this family has no AWQ file"),
    "awq gemv": ("k100", ["export=awq_4bit_gemv"], "does not divide in_features=200"),
    "w4a16 group": ("odd", ["export=w4a16"], "group_size=128 does not divide in_features=200"),
    "w4a16 group that no reader takes": (
        "llama",
        ["export=w4a16", "export.compressed.w4a16.group_size=16"],
        "readers of W4A16 files take groups of 32, 64, 128, -1, not 16",
    ),
    "nvfp4 width": ("odd", ["export=nvfp4"], "NVFP4 has groups of 16 weights, which do not divide in_features=200"),
    "mxfp4 width": ("odd", ["export=mxfp4"], "MXFP4 has groups of 32 weights"),
    "smoothing": ("gpt2", ["export=w8a8"], "this family has no compressed-tensors file"),
    "bnb of Conv1D": ("gpt2", ["export=bnb_nf4"], "this family has no bitsandbytes file"),
    "gguf family": ("opt", ["export=gguf_q4_k_m"], "no GGUF export for the architecture OPTForCausalLM"),
    "gguf setting": ("moe", ["export=gguf_q4_k_m"], "llama.cpp has no key for this model's norm_topk_prob"),
    "converted gguf type": (
        "gpt2",
        ["export=gguf_q4_k_m", "export.gguf.gguf_q4_k_m.overrides={blk.*.ffn_down.weight: Q9}"],
        "unknown GGUF tensor type 'Q9'",
    ),
    "budget of a converted gguf with experts": (
        "moe that norms",
        ["export=gguf_q4_k_m", "export.gguf.gguf_q4_k_m.bits_budget=5"],
        "this family has no budget of bits: its experts or layers lie in its files under other names than in the model",
    ),
    "gguf pattern": (
        "llama",
        ["export=gguf_q4_k_m", "export.gguf.gguf_q4_k_m.overrides={blk.*.ffn_dwn.weight: Q8_0}"],
        "'blk.*.ffn_dwn.weight' matches no tensor that can be quantized (names here: blk.*.attn_k.weight",
    ),
    "gguf type": (
        "llama",
        ["export=gguf_q4_k_m", "export.gguf.gguf_q4_k_m.overrides={blk.*.ffn_down.weight: Q9}"],
        "unknown GGUF tensor type 'Q9'",
    ),
    "gguf type that needs a matrix": (
        "llama",
        ["export=gguf_q4_k_m_plain", "export.gguf.gguf_q4_k_m_plain.overrides={blk.*.ffn_down.weight: IQ2_XS}"],
        "IQ2_XS without an importance matrix gives garbage",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told_and_every_fix_passes(forms: dict[str, ModelForm], case: str) -> None:
    family, words, what = CASES[case]
    problems = fit(forms[family], *words).problems
    assert any(what in problem.what for problem in problems)
    for _ in range(3):
        if not problems or not all(problem.fix for problem in problems):
            break
        words = mended_line(words, problems)
        problems = fit(forms[family], *words).problems
        assert not problems, words


def test_all_is_told_at_once(forms: dict[str, ModelForm]) -> None:
    found = fit(forms["odd"], "export=[gptq_4bit,awq_4bit,w4a16,nvfp4]").problems
    assert [problem.where for problem in found] == [
        "export.gptq.gptq_4bit.group_size",
        "export.awq.awq_4bit.group_size",
        "export.compressed.w4a16.group_size",
        "export.compressed.nvfp4.scheme",
    ]


EXPORTS = sorted(path.stem for path in Path("recipes/export").glob("*.yaml"))


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "smollm3"])
def test_every_export_of_plain_families_fits(forms: dict[str, ModelForm], family: str) -> None:
    words = [f"export=[{','.join(name for name in EXPORTS if 'bits' not in name)}]"]
    found = fit(forms[family], *words)
    assert found.problems == [] and found.unquantized == {}


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_other_dense_families_have_every_export(forms: dict[str, ModelForm], family: str) -> None:
    assert fit(forms[family], f"export=[{','.join(name for name in EXPORTS if 'bits' not in name)}]").problems == []


def test_layers_that_stay_in_16_bit_are_counted_and_named(forms: dict[str, ModelForm]) -> None:
    words = ("export=awq_4bit", "export.awq.awq_4bit.group_size=-1")
    odd = fit(forms["odd"], *words).unquantized["awq_4bit"]
    assert str(odd) == (
        "4 of 14 linear layers stay in 16 bit (k_proj, v_proj): AWQ's gemm layout takes 8 outputs at once"
    )
    assert len(odd.record()["layers"]) == 4  # type: ignore[arg-type]
    gguf = fit(forms["odd"], "export=gguf_q4_k_m").unquantized["gguf_q4_k_m"]
    assert "no block of weights divides their rows" in str(gguf)


@pytest.mark.parametrize("export", ["awq_4bit", "gptq_4bit", "gptq_4bit_rounding", "w4a16", "w8a16", "fp8_dynamic"])
def test_experts_are_linear_layers_like_others(forms: dict[str, ModelForm], export: str) -> None:
    assert len(forms["moe"].blocks) == 2 * (4 + 4 * 3)
    assert fit(forms["moe"], f"export={export}") == Checked()


@pytest.mark.parametrize(
    ("export", "why"),
    [
        (
            "bnb_nf4",
            "so this family's experts would stay in 16 bit; gptq_4bit, awq_4bit, w4a16 and w8a16 hold them one by one",
        ),
        ("nvfp4", "NVFP4 cannot be written: llmcompressor would leave this family's experts in 16 bit"),
        ("fp8_kv", "with an FP8 key-value cache cannot be written"),
    ],
)
def test_experts_that_would_stay_in_16_bit_are_refused(forms: dict[str, ModelForm], export: str, why: str) -> None:
    words = [f"export={export}"]
    problems = fit(forms["moe"], *words).problems
    assert [why in one.what for one in problems] == [True]
    assert fit(forms["moe"], *mended_line(words, problems)).problems == []


def test_an_adapter_that_llama_cpp_has_no_place_for(forms: dict[str, ModelForm]) -> None:
    export = export_of(["export=[adapter_gguf,adapter_peft]"])
    found = check_form(forms["llama"], export, {"use_dora": True, "modules_to_save": ["lm_head"]})
    assert [problem.what.partition(" for ")[2] for problem in found.problems] == [
        "DoRA's magnitudes",
        "modules trained in full (lm_head)",
    ]
    assert len(check_form(forms["llama"], export, {"init_lora_weights": "olora"}).problems) == 2
    (problem,) = check_form(forms["moe that norms"], export, {"r": 4}).problems
    assert "no GGUF rules for the architecture Qwen3MoeForCausalLM, of which a whole model is converted" in problem.what


def test_a_base_whose_files_have_other_names_is_told_so(tmp_path: Path) -> None:
    base = build_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    assert check_exports(base, export_of(["export=gptq_4bit"])) == Checked()
    file = base / "model.safetensors"
    moved = {name.replace("model.layers", "model.text.layers"): value for name, value in load_file(file).items()}
    save_file(moved, file)
    found = check_exports(base, export_of(["export=[gptq_4bit,awq_4bit,fp8_dynamic,bnb_nf4,merged_16bit]"])).problems
    assert [problem.what.partition(":")[0] for problem in found] == [
        f"this family has no {kind} export" for kind in ("gptq", "awq", "compressed", "bnb")
    ]
    assert {problem.fix for problem in found} == {ELSEWHERE}


@pytest.mark.parametrize(("export", "named"), [("gptq_4bit", "GPTQ"), ("awq_4bit", "AWQ")])
def test_experts_that_cannot_be_taken_apart_are_refused(forms: dict[str, ModelForm], export: str, named: str) -> None:
    owner = forms["moe"].experts[0].rpartition(".")[0]
    found = fit(replace(forms["moe"], otherwise=(owner,)), f"export={export}").problems
    assert [one.what for one in found] == [
        f"this family has no {named} file: its experts ('{owner}') are kept in a way that cannot be taken apart"
    ]
    assert found[0].fix == ELSEWHERE


def test_a_base_that_is_stored_in_4_bit_is_judged_by_what_is_made_of_it(tmp_path: Path) -> None:
    base = build_tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    assert check_exports(base, export_of(["export=[gguf_q4_k_m,gptq_4bit,awq_4bit]"])) == Checked()


def test_a_kind_that_transformers_does_not_build_is_left_to_its_own_refusal(tmp_path: Path) -> None:
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    assert check_exports(tmp_path, export_of(["export=gptq_4bit"])) == Checked()


def test_files_that_a_family_has_in_no_form_keep_the_others_from_nothing(tmp_path: Path) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    form_of(tmp_path, Qwen3MoeConfig(hidden_size=256, vocab_size=640, **IDS, **moe))
    asked = export_of(["export=[merged_16bit,bnb_nf4,awq_4bit_g64]"])
    found = refuse_unfit(tmp_path, asked)
    assert [one.name for one in found.export.targets()] == ["awq_4bit_g64", "merged_16bit"]
    assert list(found.impossible) == ["bnb_nf4"] and "experts would stay in 16 bit" in found.impossible["bnb_nf4"]
    # alone it is refused, and what another setting would mend is refused beside others too
    with pytest.raises(RecipeError, match="experts would stay in 16 bit"):
        refuse_unfit(tmp_path, export_of(["export=bnb_nf4"]))
    with pytest.raises(RecipeError, match="group_size") as raised:
        refuse_unfit(tmp_path, export_of(["export=[merged_16bit,awq_4bit]", "export.awq.awq_4bit.group_size=96"]))
    assert all(problem.fix != ELSEWHERE for problem in raised.value.problems)


def test_a_group_size_of_an_impossible_file_is_no_reason_to_refuse_anything(tmp_path: Path) -> None:
    base = build_tiny_model("llama", tmp_path / "base", hidden_size=320, dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match="group_size=128 does not divide"):
        refuse_unfit(base, export_of(["export=[merged_16bit,awq_4bit]"]))
    file = base / "model.safetensors"
    moved = {name.replace("model.layers", "model.text.layers"): value for name, value in load_file(file).items()}
    save_file(moved, file)
    assert list(refuse_unfit(base, export_of(["export=[merged_16bit,awq_4bit]"])).impossible) == ["awq_4bit"]
    alone = ["export=awq_4bit", "export.awq.awq_4bit.group_size=64"]
    with pytest.raises(RecipeError, match="this family has no awq export"):
        refuse_unfit(base, export_of(alone))
