"""A bitsandbytes folder: its numbers decoded by hand, loaded without quantizing again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RunError
from qlora_kit.export.delta_retention import retained_fraction
from qlora_kit.formats.bnb.load import load_bnb
from qlora_kit.formats.bnb.write import write_bnb
from qlora_kit.model.load import load_base
from qlora_kit.schema.export import BnbKind, BnbTarget
from qlora_kit.schema.quant import QuantConfig, QuantKind
from tests.dequantized import dequantized_weights
from tests.tiny_models import build_tiny_model

SAMPLE = torch.tensor([[(31 * step + 5) % 600 for step in range(40)]])
NAME = "model.layers.1.mlp.down_proj"
# The sixteen values of NF4: Dettmers et al. 2023, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama3", tmp_path_factory.mktemp("bnb") / "source", dtype=torch.bfloat16)


def write(source: Path, out: Path, target: BnbTarget) -> Path:
    out.mkdir()
    write_bnb(source, out, target)
    return out


def nf4_weight(tensors: Tensors, module: str, shape: torch.Size) -> Tensor:
    """Two codes in each byte, the upper half first; one scale for 64 weights, itself stored in 8 bits if doubled."""
    packed = tensors[f"{module}.weight"].long().flatten()
    values = NF4[torch.stack([packed >> 4, packed & 15], -1).flatten()]
    scales = tensors[f"{module}.weight.absmax"]
    if scales.dtype == torch.uint8:
        settings = json.loads(bytes(tensors[f"{module}.weight.quant_state.bitsandbytes__nf4"].tolist()))
        coarse = tensors[f"{module}.weight.nested_absmax"].repeat_interleave(256)[: len(scales)]
        scales = tensors[f"{module}.weight.nested_quant_map"][scales.long()] * coarse + settings["nested_offset"]
    return (values * scales.repeat_interleave(64)).reshape(shape)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    logits: Tensor = model(SAMPLE).logits
    return logits


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def logits_by_hand(source: Path, out: Path) -> Tensor:
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if f"{name}.weight.absmax" in tensors:
            # What is multiplied is in the dtype of the model that was packed.
            module.weight.copy_(nf4_weight(tensors, name, module.weight.shape).bfloat16())
    return logits_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_reader_computes_what_the_file_says(double_quant: bool, source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", BnbTarget(BnbKind.nf4, double_quant=double_quant))
    tensors = load_file(out / "model.safetensors")
    assert (f"{NAME}.weight.nested_absmax" in tensors) is double_quant
    wanted = logits_by_hand(source, out)
    model = load_bnb(out)
    assert apart(logits_of(model), wanted) < 0.01
    # A second look finds the same weights: nothing was repacked by the first.
    assert apart(logits_of(model), wanted) < 0.01
    original = logits_of(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert 0.05 < apart(wanted, original) < 0.6


@pytest.mark.slow
def test_int8_rows_have_a_scale_each(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = write(source, tmp_path / "out", BnbTarget(BnbKind.int8))
    tensors, old = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    weight = tensors[f"{NAME}.weight"].float() * tensors[f"{NAME}.SCB"][:, None] / 127
    assert tensors[f"{NAME}.weight"].dtype == torch.int8
    assert apart(weight, old[f"{NAME}.weight"].float()) < 0.01
    original = logits_of(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert 0.005 < apart(logits_of(load_bnb(out)), original) < 0.1
    assert "MatMul8bitLt" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", BnbKind)
def test_only_what_was_quantized_differs_and_nothing_is_local(kind: BnbKind, source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", BnbTarget(kind))
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    same = {name for name in old if new[name].dtype == old[name].dtype}
    assert set(old) - same == {name for name in old if name.endswith("proj.weight")}
    assert "lm_head.weight" in same
    assert all(torch.equal(new[name], old[name]) for name in same)
    text = (out / "config.json").read_text()
    config = json.loads(text)
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["llm_int8_skip_modules"] == ["lm_head"]
    assert (quantization["load_in_4bit"], quantization["load_in_8bit"]) == (kind is BnbKind.nf4, kind is BnbKind.int8)
    assert quantization.get("bnb_4bit_quant_type") == ("nf4" if kind is BnbKind.nf4 else None)
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_a_further_run_can_start_from_it(source: Path, tmp_path: Path) -> None:
    out = write(source, tmp_path / "out", BnbTarget())
    model = load_base(out, QuantConfig(kind=QuantKind.nf4), compute_dtype=torch.float32)
    inputs = model.get_input_embeddings()(SAMPLE).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="its weights are not quantized"):
        load_bnb(tmp_path)
    config.write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(RunError, match="it names 'gptq'"):
        load_bnb(tmp_path)


@pytest.mark.parametrize("target", [BnbTarget(), BnbTarget(double_quant=False)])
def test_the_weights_that_a_folder_stands_for_are_read_back(source: Path, tmp_path: Path, target: BnbTarget) -> None:
    folder = write(source, tmp_path / "bnb", target)
    read, stored = dequantized_weights(folder, source), load_file(folder / "model.safetensors")
    weight = read(f"{NAME}.weight")
    assert weight is not None and weight.dtype == torch.float32
    # It is multiplied in the dtype of the model that was packed.
    assert apart(weight, nf4_weight(stored, NAME, weight.shape)) < 2**-8
    kept = read("model.norm.weight")
    assert kept is not None and torch.equal(kept, load_file(source / "model.safetensors")["model.norm.weight"])


def test_int8_is_read_back_too(source: Path, tmp_path: Path) -> None:
    weight = dequantized_weights(write(source, tmp_path / "bnb", BnbTarget(kind=BnbKind.int8)), source)(
        f"{NAME}.weight"
    )
    was = load_file(source / "model.safetensors")[f"{NAME}.weight"].float()
    assert weight is not None and weight.shape == was.shape
    assert float((weight - was).abs().max()) <= float(was.abs().max()) / 127


def test_an_update_of_a_base_that_nf4_rounded_falls_back_to_it_in_a_second_rounding(
    source: Path, tmp_path: Path
) -> None:
    once = dequantized_weights(write(source, tmp_path / "once", BnbTarget()), source)(f"{NAME}.weight")
    assert once is not None
    draw = torch.Generator().manual_seed(0)
    update = torch.randn(once.shape, generator=draw) * once.std() * 0.01
    kept = {}
    for name, base in (("dequantized", once), ("original", load_file(source / "model.safetensors")[f"{NAME}.weight"])):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{NAME}.weight"] = (base.float() + update).to(torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        read = dequantized_weights(write(folder, tmp_path / f"{name}_bnb", BnbTarget()), folder)(f"{NAME}.weight")
        assert read is not None
        kept[name] = retained_fraction(base.float() + update, base.float(), read)
    assert kept["dequantized"] < 0.3 and kept["original"] == pytest.approx(1, abs=0.3)
