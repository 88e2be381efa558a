"""An adapter is loaded whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.adapter.attach import attach_lora, load_adapter
from qlora_kit.core.errors import RunError
from qlora_kit.model.load import load_base
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from tests.tiny_models import build_tiny_model

PLAIN = QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("load") / "base")


def test_what_was_saved_is_loaded(base, tmp_path):
    lora = LoraConfig(r=4, modules_to_save=["embed_tokens"])
    model = attach_lora(load_base(base, PLAIN), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = load_adapter(load_base(base, PLAIN), tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_base_that_lies_elsewhere_by_now_is_no_warning(base, tmp_path, recwarn):
    attach_lora(load_base(base, PLAIN), LoraConfig(r=4)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "owner/name"}))
    load_adapter(load_base(base, PLAIN), tmp_path)
    assert not [str(one.message) for one in recwarn if "renamed" in str(one.message)]


@pytest.mark.parametrize("other", ["base_model.model.language_model", "base_model.model.other"])
def test_an_adapter_under_other_names_is_refused(base, tmp_path, other):
    attach_lora(load_base(base, PLAIN), LoraConfig(r=4)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.model", other): value for name, value in load_file(file).items()}, file)
    with pytest.raises(RunError, match="28 modules of the adapter and of this base do not match, such as base_model"):
        load_adapter(load_base(base, PLAIN), tmp_path)


def test_an_adapter_that_lacks_a_module_is_refused(base, tmp_path):
    attach_lora(load_base(base, PLAIN), LoraConfig(r=4)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.1.mlp.up_proj" not in name}, file)
    with pytest.raises(RunError, match=r"1 module of the adapter and of this base does not match, such as .*up_proj"):
        load_adapter(load_base(base, PLAIN), tmp_path)
