"""Every kind of model trains with all that was promised adapted, or is refused with a sentence before it is loaded."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora_kit.adapter.attach import adapted_names, attach_lora
from qlora_kit.core.errors import EXIT_BAD_RECIPE, RecipeError, RunError
from qlora_kit.model.load import load_base, rounded_names, try_forward
from qlora_kit.model.skeleton import skeleton, told_plainly
from qlora_kit.model.structure import not_adapted
from qlora_kit.pipelines.plan import known_base, plan
from qlora_kit.schema.compose import compose_recipe
from qlora_kit.schema.data import Batching
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig, LoraInit
from qlora_kit.schema.model import Attention, ModelConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.failures import first_step_told
from qlora_kit.training.finite import NotFiniteError
from qlora_kit.training.forecast import forecast
from qlora_kit.training.preflight import check_train
from qlora_kit.training.reach import check_reached, reach_of
from tests.families import KINDS, build
from tests.tiny_models import build_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.libraries]

EXPERTS = ("qwen3_moe", "qwen2_moe", "glm4_moe")
DENSE = ("llama", "gemma3_text", "phi3", "biogpt", "opt", "gpt2")
HYBRID = ("qwen3_5_text", "mamba2", "falcon_h1", "lfm2")
TRAINED = (*DENSE, *HYBRID, "gemma3", "qwen3_vl", "gpt_oss", *EXPERTS)
STACKS = ("gate_up_proj", "down_proj")
REFUSED = {"t5": "is an encoder with a decoder", "zamba2": "layers of this base share their weights: "}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a kind's checkpoint, made once."""
    place, made = tmp_path_factory.mktemp("kinds"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = build(kind, place / kind)
        return made[kind]

    return folder


def recipe_for(folder, *, targets=("all_linear",), keep=(), attention=Attention.sdpa, quant=QuantKind.nf4, **lora):
    return TrainRecipe(
        model=ModelConfig(source=str(folder), attention=attention),
        lora=LoraConfig(targets=list(targets), **lora),
        quant=QuantConfig(kind=quant, keep_16bit=list(keep)),
    )


def loaded(recipe, folder):
    base = load_base(folder, recipe.quant)
    return attach_lora(base, recipe.lora, not_adapted(base))


def one_step(model):
    """Gradients of B of every adapted module after a step on a few tokens."""
    tokens = torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}


def refusal(recipe, folder):
    with pytest.raises(RecipeError) as raised:
        reach_of(recipe, folder)
    assert raised.value.exit_code == EXIT_BAD_RECIPE
    return str(raised.value)


def test_every_kind_is_either_trained_or_refused():
    assert set(TRAINED) | set(REFUSED) == set(KINDS)


@pytest.mark.parametrize("kind", TRAINED)
def test_every_linear_module_of_the_layers_is_adapted_and_learns(kind, folder_of):
    folder = folder_of(kind)
    recipe = recipe_for(folder)
    reach = reach_of(recipe, folder)
    model = loaded(recipe, folder)

    check_reached(model, reach)
    layers = adapted_names(model)
    stacks = {f"{part.name}.{stack}" for part in reach.weights if part.kind == "experts" for stack in STACKS}
    assert layers == reach.adapted == {part.name for part in reach.linears if part.name not in reach.spared} | stacks
    gradients = one_step(model)
    assert len(gradients) == len(layers)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    is_all = {part.name for part in reach.linears} <= layers
    assert is_all is any("100.0% of their weights" in line for line in reach.lines())
    assert is_all is not any("reads its weight itself, past LoRA" in line for line in reach.lines())
    assert reach.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_said_to_be_quantized_is(kind, folder_of):
    folder = folder_of(kind)
    reach = reach_of(recipe_for(folder), folder)
    model = load_base(folder, QuantConfig())
    four = {name.rpartition(".")[0] for name, weight in model.named_parameters() if isinstance(weight, Params4bit)}
    assert four == reach.rounded
    others = sum(weight.numel() for weight in model.parameters() if not isinstance(weight, Params4bit))
    assert sum(reach.in_16_bit.values()) == others


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_before_a_weight_is_loaded(kind, folder_of, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(folder_of(kind), folder)
    message = refusal(recipe_for(folder), folder)
    assert REFUSED[kind] in message
    assert "Traceback" not in message and len(message.splitlines()[0]) < 500


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_stay_whole_and_untrained_where_the_recipe_says_so(kind, folder_of):
    folder = folder_of(kind)
    recipe = recipe_for(folder, keep=["experts"], experts=False)
    reach = reach_of(recipe, folder)
    model = loaded(recipe, folder)
    check_reached(model, reach)
    assert not [name for name in reach.adapted if ".experts." in name]
    assert all(gradient is not None for gradient in one_step(model).values())
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert reach.in_16_bit["experts"] == experts > 0
    first, second = reach.lines()
    assert "none on the experts" in first
    assert second.startswith("warning: ") and "are not quantized" in second


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_int8_leaves_whole_are_refused(kind, folder_of):
    folder = folder_of(kind)
    message = refusal(recipe_for(folder, quant=QuantKind.int8), folder)
    assert "which int8 does not quantize" in message and "fix      quant=nf4_double" in message
    assert "quant.keep_16bit=[experts]" in message
    assert reach_of(recipe_for(folder, quant=QuantKind.int8, keep=["experts"]), folder).adapted


@pytest.mark.parametrize(
    ("key", "lora"),
    [
        ("use_dora", {"use_dora": True}),
        ("dropout", {"dropout": 0.1}),
        ("init", {"init": LoraInit.pissa}),
        ("lora_bias", {"lora_bias": True}),
    ],
)
def test_what_an_adapter_of_experts_cannot_have_is_refused(key, lora, folder_of):
    folder = folder_of("qwen3_moe")
    message = refusal(recipe_for(folder, **lora), folder)
    assert f"an adapter of experts has no lora.{key}" in message and "fix      lora.experts=false" in message
    assert reach_of(recipe_for(folder, experts=False, **lora), folder).adapted


@pytest.mark.parametrize("kind", EXPERTS)
def test_what_chooses_experts_is_neither_quantized_nor_adapted(kind, folder_of):
    model = skeleton(folder_of(kind))
    rounded = rounded_names(model, QuantConfig())
    assert rounded and not [name for name in rounded if "gate" in name.rpartition(".")[2].removesuffix("gate_proj")]
    base = load_base(folder_of(kind), QuantConfig())
    adapted = adapted_names(attach_lora(base, LoraConfig(targets=["attention"]), not_adapted(base)))
    assert not [name for name in adapted if name.endswith("gate")]


def test_shared_experts_that_peft_would_leave_out_are_adapted(folder_of):
    folder = folder_of("glm4_moe")
    recipe = recipe_for(folder, targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
    adapted = reach_of(recipe, folder).adapted
    assert "model.layers.0.mlp.gate_proj" in adapted
    assert "model.layers.1.mlp.shared_experts.down_proj" in adapted
    assert not [name for name in adapted if ".experts." in name]


def test_attention_is_what_lies_in_a_module_of_that_name(folder_of):
    opt = reach_of(recipe_for(folder_of("opt"), targets=["attention"]), folder_of("opt"))
    assert "model.decoder.layers.0.self_attn.out_proj" in opt.adapted
    hybrid = reach_of(recipe_for(folder_of("qwen3_5_text"), targets=["attention"]), folder_of("qwen3_5_text"))
    assert {int(name.split(".")[2]) for name in hybrid.adapted} == {0, 1, 2, 3}
    assert "left out: gate_proj, up_proj, down_proj" in hybrid.lines()[0]


def test_a_kind_of_module_that_only_some_layers_have_is_said(folder_of):
    folder = folder_of("qwen3_5_text")
    (first, *_) = reach_of(recipe_for(folder, targets=["q_proj"]), folder).lines()
    assert "q_proj in 1 of 4 layers; left out:" in first


def test_gpt_oss_is_trained_with_the_attention_that_it_has(folder_of):
    folder = folder_of("gpt_oss")
    reach = reach_of(recipe_for(folder), folder)
    assert reach.attention is Attention.eager
    assert any(line.startswith("model.attention=sdpa is computed as eager") for line in reach.lines())
    flash = recipe_for(folder_of("mamba2"), attention=Attention.flash_attention_2)
    assert "fix      model.attention=eager" in refusal(flash, folder_of("mamba2"))
    recipe = recipe_for(folder, attention=Attention.eager)
    assert not any("is computed as" in line for line in reach_of(recipe, folder).lines())
    check_reached(loaded(recipe, folder), reach_of(recipe, folder))
    assert load_base(folder, QuantConfig()).config._attn_implementation == "eager"


def test_attention_with_sinks_is_left_to_flash_kernels_by_the_fast_engine(folder_of):
    folder = folder_of("gpt_oss")
    recipe = replace(recipe_for(folder), engine=EngineConfig(mode=EngineMode.fast))
    reach = reach_of(recipe, folder)
    assert reach.attention is Attention.eager and reach.has_flash
    assert "attention has sinks: flash kernels compute it while it trains, by engine.mode=fast" in reach.lines()
    assert not reach_of(recipe_for(folder), folder).has_flash


def in_one_row(folder, **changes):
    recipe = replace(recipe_for(folder), engine=EngineConfig(mode=EngineMode.fast), **changes)
    return reach_of(recipe, folder).takes_one_row


def test_rows_of_a_batch_lie_one_after_another_where_one_kernel_keeps_them_apart(folder_of, tmp_path):
    llama = build_tiny_model("llama", tmp_path / "llama")
    assert in_one_row(llama)
    assert not reach_of(recipe_for(llama), llama).takes_one_row  # with engine=plain
    assert not in_one_row(llama, quant=QuantConfig(compute_dtype=ComputeDtype.float32))
    assert not in_one_row(folder_of("qwen3_5_text"))  # a state goes from token to token
    assert not in_one_row(build_tiny_model("gemma2", tmp_path / "gemma2"))  # scores are capped
    wide = build_tiny_model("llama", tmp_path / "wide", head_dim=320)
    assert not in_one_row(wide)
    assert not in_one_row(folder_of("gpt_oss"))  # of no family that the engine knows


def test_scores_that_are_capped_keep_their_cap(tmp_path):
    folder = build_tiny_model("gemma2", tmp_path / "base")
    recipe = recipe_for(folder)
    reach = reach_of(recipe, folder)
    assert reach.attention is Attention.eager
    assert any(line.startswith("model.attention=sdpa is computed as eager") for line in reach.lines())
    message = refusal(replace(recipe, data=replace(recipe.data, batching=Batching.packed)), folder)
    assert "computes this model right with eager alone" in message and "data.batching=padded" in message


def test_of_a_base_that_cannot_be_trained_no_setting_is_told_that_would_not_help(folder_of):
    folder = folder_of("t5")
    message = refusal(recipe_for(folder, attention=Attention.flex_attention), folder)
    assert "is an encoder with a decoder" in message
    assert "model.attention" not in message and "fix " not in message


def test_all_settings_that_are_wrong_for_a_base_are_told_at_once(folder_of):
    recipe = recipe_for(folder_of("mamba2"), keep=["router"], attention=Attention.flash_attention_2)
    message = refusal(recipe, folder_of("mamba2"))
    assert "fix      model.attention=eager" in message
    assert "quant.keep_16bit names router" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keep": ["router"]}, "quant.keep_16bit names router"),
        ({"modules_to_save": ["score"]}, "lora.modules_to_save names score"),
        ({"modules_to_save": ["q_proj"]}, "fix      'quant.keep_16bit=[q_proj]'"),
        ({"modules_to_save": ["q_proj"]}, "lora.modules_to_save names q_proj, which lora.targets adapts too"),
        ({"rank_pattern": {"wqkv": 8}}, "lora.rank_pattern names wqkv"),
        ({"alpha_pattern": {"k_proj(": 8.0}}, "lora.alpha_pattern names k_proj(, which is no pattern"),
        ({"rank_pattern": {r"(\w+\.?)+!": 8}}, "which takes over 2 s to match 14 names"),
    ],
)
def test_a_name_that_means_no_module_is_refused(changes, told, folder_of):
    assert told in refusal(recipe_for(folder_of("llama"), **changes), folder_of("llama"))


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"], ["norm"]], ids=" ".join)
def test_modules_that_are_trained_in_full_are_counted_and_trained(saved, folder_of):
    recipe = recipe_for(folder_of("llama"), modules_to_save=saved)
    reach = reach_of(recipe, folder_of("llama"))
    model = loaded(recipe, folder_of("llama"))
    assert reach.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert reach.trained > reach_of(recipe_for(folder_of("llama")), folder_of("llama")).trained


def test_a_checkpoint_that_its_config_does_not_describe_is_refused(folder_of, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(folder_of("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks 9 weights of the model that its config.json describes" in refusal(recipe_for(folder), folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    assert "is [128, 64], and config.json says [192, 64]" in refusal(recipe_for(folder), folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    assert "model_type llama" in refusal(recipe_for(folder), folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    assert "num_hidden_layers=1000000000, which no model has" in refusal(recipe_for(folder), folder)
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 2**40}))
    assert f"head_dim={2**40}, which no model has" in refusal(recipe_for(folder), folder)


def test_weights_that_are_not_there_are_not_made_up(folder_of, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(folder_of("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks 1 weight of its model: model\.layers\.1\.post") as raised:
        load_base(folder, QuantConfig())
    assert raised.value.exit_code == EXIT_BAD_RECIPE


def test_another_set_of_adapted_modules_than_promised_is_an_error(folder_of):
    folder = folder_of("llama")
    reach = reach_of(recipe_for(folder), folder)
    model = loaded(recipe_for(folder, targets=["attention"]), folder)
    with pytest.raises(RunError, match="LoRA is on 8 modules, not on the 14 promised"):
        check_reached(model, reach)


def test_a_librarys_error_is_told_with_model_and_library(folder_of):
    folder = folder_of("llama")
    told = r"cannot run this model \(model_type llama.*TypeError: no␛s more;"
    with pytest.raises(RecipeError, match=told), told_plainly(folder, {"model_type": "llama"}, "run"):
        raise TypeError("no\x1bs\nmore")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space"), MemoryError()]
)
def test_what_the_machine_lacks_is_not_blamed_on_the_model(error, folder_of):
    with pytest.raises(type(error)), told_plainly(folder_of("llama"), {"model_type": "llama"}, "run"):
        raise error


@pytest.mark.parametrize(
    ("step", "raised", "seen"),
    [
        (0, AttributeError("'tuple' object has no attribute 'dtype'"), RecipeError),
        (1, AttributeError("later"), AttributeError),
        (0, NotFiniteError("the loss became nan", 1), NotFiniteError),
        (0, RunError("ours"), RunError),
    ],
    ids=["first step", "later", "not finite", "ours"],
)
def test_what_ends_the_first_step_is_told_as_a_refusal_of_the_model(step, raised, seen, folder_of):
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=step))
    with pytest.raises(seen), first_step_told(trainer, folder_of("llama"), goes_on=False):
        raise raised


def test_trying_a_forward_pass_draws_nothing(folder_of):
    model = loaded(recipe_for(folder_of("llama"), dropout=0.1), folder_of("llama")).train()
    before = torch.random.get_rng_state()
    try_forward(model)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3_5_text", "qwen3_moe"])
def test_a_plan_counts_every_weight(kind, folder_of):
    folder = folder_of(kind)
    recipe = recipe_for(folder)
    base = known_base(recipe)
    planned = forecast(recipe, base, 64).memory
    model = skeleton(folder)
    names = rounded_names(model, recipe.quant)
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if weight.ndim > 1}
    rounded = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in names)
    whole = sum(weight.numel() for weight in model.parameters()) - rounded
    assert planned.frozen_linears == 0.5 * rounded
    assert planned.frozen_rest == 2 * whole
    adapted = loaded(recipe, folder)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert (planned.trainable, planned.adapter) == (trained, 4 * trained)
    told, lines = reach_of(recipe, folder).lines(), plan(recipe, base).splitlines()
    start = lines.index(told[0])
    assert lines[start : start + len(told)] == told


@pytest.mark.parametrize("is_estimated", [True, False])
def test_it_is_said_where_what_layers_need_is_no_more_than_an_estimate(is_estimated, folder_of, capsys, monkeypatch):
    def asks_for_values(*_):
        raise RuntimeError("a layer's code asked for a number")

    if is_estimated:
        monkeypatch.setattr("qlora_kit.training.reach.needs_of_layers", asks_for_values)
    reach = reach_of(recipe_for(folder_of("qwen3_moe")), folder_of("qwen3_moe"))
    assert (reach.needs is None) is is_estimated
    assert ("estimated from their sizes, as these do not run without values" in capsys.readouterr().err) is is_estimated


def test_the_magnitudes_of_dora_are_counted(folder_of):
    recipe = recipe_for(folder_of("llama"), use_dora=True)
    adapted = loaded(recipe, folder_of("llama"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert reach_of(recipe, folder_of("llama")).trained == trained


@pytest.mark.parametrize("kind", ["t5"])
def test_a_plan_refuses_what_training_refuses(kind, folder_of):
    with pytest.raises(RecipeError, match=re.escape(REFUSED[kind])):
        known_base(recipe_for(folder_of(kind)))


@pytest.mark.parametrize("name", ["gemma3_4b_chat_12gb", "gemma3_12b_chat_24gb", "gemma3_27b_chat_48gb"])
def test_a_shipped_image_text_recipe_passes_with_and_without_its_checkpoint(name, folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    line = [f"experiment={name}", "data.train_file=rows.jsonl"]
    for more in ([], [f"model.source={folder_of('gemma3_text')}"], [f"model.source={folder_of('gemma3')}"]):
        check_train(compose_recipe("train", [*line, *more]))
    (first, *_) = known_base(compose_recipe("train", [*line, f"model.source={folder_of('gemma3')}"]).recipe).notes
    assert first.startswith("the checkpoint takes more than text: its language model is trained; the other")


def test_experts_are_not_trained_in_full(folder_of):
    message = refusal(recipe_for(folder_of("qwen3_moe"), modules_to_save=["experts", "norm"]), folder_of("qwen3_moe"))
    assert "lora.modules_to_save names experts, which holds the experts of a mixture" in message
    assert "fix      'lora.modules_to_save=[norm]'" in message and "keep_16bit" not in message


def test_mlp_means_the_experts_where_there_is_no_other(folder_of):
    folder = folder_of("qwen3_moe")
    reach = reach_of(recipe_for(folder, targets=("q_proj", "mlp")), folder)
    assert {name.rpartition(".")[2] for name in reach.adapted} == {"q_proj", "gate_up_proj", "down_proj"}
    message = refusal(recipe_for(folder, targets=("mlp",)), folder)
    assert "which is the experts alone in this base" in message and "fix      lora.targets=[attention,mlp]" in message
    assert "is no linear module of this base" in refusal(recipe_for(folder, targets=("mlp",), experts=False), folder)


def test_experts_in_a_form_that_no_merge_could_go_back_to_are_refused(folder_of, monkeypatch):
    monkeypatch.setattr("qlora_kit.model.stored_names.stack_layouts", lambda *_: {})
    folder = folder_of("qwen3_moe")
    message = refusal(recipe_for(folder), folder)
    assert "in a form that an adapter could not be merged into" in message and "fix      lora.experts=false" in message


def test_packed_rows_are_refused_before_loading_where_nothing_keeps_samples_apart(folder_of):
    recipe = recipe_for(folder_of("gpt_oss"))
    recipe.data.batching = Batching.packed
    message = refusal(recipe, folder_of("gpt_oss"))
    assert "packed rows need an attention that keeps samples apart" in message
    assert "fix      data.batching=padded" in message
    recipe.model.source = str(folder_of("mamba2"))
    assert reach_of(recipe, folder_of("mamba2")).attention is Attention.eager


def test_what_cannot_be_merged_into_maps_that_lie_the_other_way_around_is_refused(folder_of):
    message = refusal(recipe_for(folder_of("gpt2"), init=LoraInit.pissa), folder_of("gpt2"))
    assert "holds its linear maps the other way around" in message and "lora.init" in message


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("biogpt", "packed samples came with a mask or a cache"),
        ("llama", ""),
        ("qwen3_moe", ""),
        ("qwen3_5_text", ""),
        ("gpt2", ""),
    ],
)
def test_rows_that_a_models_attention_cannot_pack_are_refused_before_a_weight_is_loaded(kind, why, folder_of):
    recipe = recipe_for(folder_of(kind))
    packed = replace(recipe, data=replace(recipe.data, batching=Batching.packed))
    if not why:
        assert reach_of(packed, folder_of(kind)).adapted
        return
    message = refusal(packed, folder_of(kind))
    assert f"samples cannot be packed with sdpa: {why}" in message
    assert "set in   data.batching=packed" in message and "fix      data.batching=padded" in message


def test_packed_rows_with_an_attention_of_the_models_own_are_refused(folder_of):
    recipe = recipe_for(folder_of("llama"), attention=Attention.eager)
    message = refusal(replace(recipe, data=replace(recipe.data, batching=Batching.packed)), folder_of("llama"))
    assert "samples cannot be packed with eager" in message
