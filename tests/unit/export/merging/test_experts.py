"""Adapters of experts are merged into the tensors that the checkpoint holds, whatever form those have."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.adapter.expert_lora import ExpertLora
from qlora_kit.adapter.expert_updates import StackFactors
from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.export.merging.stacks import InStack, RoundedStacks, StackPartUpdate
from qlora_kit.model.device import this_device
from qlora_kit.model.expert_layout import StackLayout, StackPart, stack_layouts
from qlora_kit.model.load import load_base
from qlora_kit.model.skeleton import skeleton
from qlora_kit.model.stacked_experts import StackedExperts
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.weights.headers import read_headers
from tests.families import build
from tests.unit.export.merging.trained import (
    NF4,
    NOT_ROUNDED,
    Pair,
    draw_adapter,
    edit_json,
    merge_pair,
    rewrite,
    tensors_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.libraries]
KINDS = ("qwen3_moe", "glm4_moe", "gpt_oss")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A base and an adapter of each kind, for each way to store the base."""
    place, made = tmp_path_factory.mktemp("experts"), {}

    def pair(kind, quant):
        if (kind, quant.kind) not in made:
            base = place / kind if (place / kind).exists() else build(kind, place / kind)
            adapter = place / f"{kind}-{quant.kind.name}"
            made[kind, quant.kind] = Pair(base, draw_adapter(base, adapter, LoraConfig(r=4), quant))
        return made[kind, quant.kind]

    return pair


def trained_stacks(pair, quant):
    """Every stack with its update, float32, by its name in the model."""
    model = load_adapter(load_base(pair.base, quant), pair.adapter).get_base_model()
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertLora):
            below: torch.nn.Module = layer
            while isinstance(below, ExpertLora):
                below = below.base_layer
            assert isinstance(below, StackedExperts)
            a, b, scaling = layer.update("default")
            product = scaling * (b @ a)
            whole = below.stack(layer.parameter_name).unpack(torch.float32)
            stack = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            found[stack] = (whole + (product.transpose(1, 2) if below.transposed else product)).detach()
    return found


@pytest.mark.parametrize("quant", [NOT_ROUNDED, NF4], ids=["original", "as trained"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_experts_are_those_that_were_trained(kind, quant, pairs, tmp_path):
    pair = pairs(kind, quant)
    report = merge_pair(pair, tmp_path / "out", quant=quant)
    expected = trained_stacks(pair, quant)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert len(expected) == 2 * (1 if kind == "glm4_moe" else 2)
    for name, weight in expected.items():
        merged = model.get_parameter(name)
        assert (merged != weight.bfloat16()).float().mean() < 2e-3, name
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(pair.base))
    assert report.merged == report.adapted == len(load_adapter_modules(pair))


def load_adapter_modules(pair):
    header = [name for name in tensors_of(pair.adapter) if ".lora_A" in name]
    assert header
    return header


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_peft_reads_the_adapter_as_it_is(kind, pairs):
    pair = pairs(kind, NOT_ROUNDED)
    ids = torch.arange(20)[None]
    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.base, **load), pair.adapter)
    ours = load_adapter(load_base(pair.base, NOT_ROUNDED), pair.adapter)
    with torch.no_grad():
        theirs, found = plain.eval()(input_ids=ids).logits, ours.eval()(input_ids=ids).logits
        with plain.disable_adapter():
            without = plain(input_ids=ids).logits
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-3)
    assert (theirs - without).abs().max() > 0.1
    settings = json.loads((pair.adapter / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_an_expert_that_learned_nothing_stays_as_it_was_and_is_no_error(pairs, tmp_path):
    pair = pairs("qwen3_moe", NOT_ROUNDED)
    adapter = Path(shutil.copytree(pair.adapter, tmp_path / "adapter"))

    def unlearned(tensors):
        for name, value in tensors.items():
            if "experts" in name and "lora_B" in name:
                value[:, 1::4] = 0  # of expert 1 of four
        return tensors

    rewrite(adapter / "adapter_model.safetensors", unlearned)
    merge_pair(Pair(pair.base, adapter), tmp_path / "out")
    before, after = tensors_of(pair.base), tensors_of(tmp_path / "out")
    for part in ("gate_proj", "up_proj", "down_proj"):
        same, other = (f"model.layers.0.mlp.experts.{expert}.{part}.weight" for expert in (1, 2))
        assert torch.equal(after[same], before[same].bfloat16())
        assert not torch.equal(after[other], before[other].bfloat16())


def test_factors_of_another_number_of_experts_are_refused(pairs, tmp_path):
    pair = pairs("qwen3_moe", NOT_ROUNDED)
    adapter = Path(shutil.copytree(pair.adapter, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", r=3)
    with pytest.raises(RunError, match="rank 3, its factors have 4"):
        merge_pair(Pair(pair.base, adapter), tmp_path / "out")


def test_a_checkpoint_that_holds_experts_the_other_way_around(tmp_path):
    torch.manual_seed(0)
    experts, rows, columns, rank = 3, 64, 128, 4
    weight = torch.randn(experts, rows, columns).bfloat16()
    tensors = {"flipped": weight.transpose(1, 2).contiguous(), "first": weight[0, :16], "apart": weight[0].t()}
    a, b = torch.randn(rank * experts, columns), torch.randn(rows, rank * experts)
    save_file(
        {name: tensor.contiguous() for name, tensor in {**tensors, "a": a, "b": b}.items()}, tmp_path / "m.safetensors"
    )
    stored = read_headers(tmp_path)
    factors = StackFactors("x", stored["a"], stored["b"], lambda _name, _rank: 0.5)
    left = b.view(rows, rank, experts).permute(2, 0, 1)
    product = 0.5 * left @ a.view(experts, rank, columns)
    whole = StackLayout(
        "s", (experts, rows, columns), transposed=False, parts=(StackPart("flipped", None, 0, rows, flipped=True),)
    )
    for part, expected, start in (
        (StackPart("flipped", None, 0, rows, flipped=True), product.transpose(1, 2).flatten(1), 0),
        (StackPart("first", 0, 0, 16, flipped=False), product[0, :16], 0),
        (StackPart("apart", 0, 0, rows, flipped=True), product[0].t(), 0),
    ):
        update = StackPartUpdate(InStack(whole, part, stored), factors).load(this_device())
        found = torch.zeros(expected.shape)
        update.add(found, start)
        torch.testing.assert_close(found, expected)
    rounding = Rounding(QuantConfig(kind=QuantKind.nf4), this_device())
    exact = rounding.exact(weight.flatten(0, 1)).view(weight.shape)
    place = InStack(whole, whole.parts[0], stored)
    found = RoundedStacks(rounding).rows(place, 1, 3)
    assert torch.equal(found, exact[1:].transpose(1, 2).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_stack_is_found(kind, pairs):
    base = pairs(kind, NOT_ROUNDED).base
    layouts = stack_layouts(skeleton(base), read_headers(base))
    for layout in layouts.values():
        rows = sum(part.rows * (layout.shape[0] if part.expert is None else 1) for part in layout.parts)
        assert rows == layout.shape[0] * layout.shape[1]
    assert len(layouts) == (2 if kind == "glm4_moe" else 4)
