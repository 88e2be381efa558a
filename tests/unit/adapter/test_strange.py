"""An adapter that the kit could not have trained is refused by what its files say, and never reaches peft."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.adapter import strange as strange_adapter
from qlora_kit.adapter.strange import refuse_strange_adapter
from qlora_kit.adapter.updates import read_adapter
from qlora_kit.core.errors import EXIT_BAD_RECIPE, DamagedFileError

NAMES = ("q_proj", "v_proj")
HONEST = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "loftq_config": {},
    "target_modules": ["q_proj", "v_proj"],
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "alpha_pattern": {"v_proj": 4},
    "modules_to_save": ["lm_head"],
    "layer_replication": None,
}


@pytest.fixture
def folders(tmp_path):
    tensors = {"base_model.model.lm_head.weight": torch.ones(8, 8)}
    for name in NAMES:
        module = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors |= {f"{module}.lora_A.weight": torch.ones(4, 8), f"{module}.lora_B.weight": torch.ones(8, 4)}
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    save_file({"model.layers.0.mlp.gate_up.weight": torch.ones(1)}, base / "model.safetensors")

    def written(**changes):
        (adapter / "adapter_config.json").write_text(json.dumps({**HONEST, **changes}))
        return adapter, base

    return written


def test_what_the_kit_writes_passes_and_is_read(folders):
    adapter, base = folders()
    refuse_strange_adapter(adapter, base)
    scalings = {module.rpartition(".")[2]: part.scaling for module, part in read_adapter(adapter).updates.items()}
    assert scalings == {"q_proj": 8 / 4, "v_proj": 4 / 4}  # alpha over rank; v_proj has an alpha of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_modules": "(.*)*q_proj$"}, "has target_modules=(.*)*q_proj$, which is no list of names"),
        ({"exclude_modules": "(.*)*zz"}, "has exclude_modules=(.*)*zz, which is no list of names"),
        ({"modules_to_save": ["(.*)*zz"]}, "has modules_to_save=['(.*)*zz'], which is no list of names"),
        ({"modules_to_save": ["embed_tokens"]}, "names embed_tokens under modules_to_save, and adapter_model.safetens"),
        ({"layers_pattern": "(.*)*zz"}, "has layers_pattern=(.*)*zz, which no adapter of the kit has"),
        ({"alpha_pattern": {"(a*)*(.*)*zz": 3}}, "(a*)*(.*)*zz under alpha_pattern, which takes over 2 s to match"),
        # Quick on the names of the adapter, slow on another one of the base.
        ({"rank_pattern": {"(.*)*_proj": 4}}, "(.*)*_proj under rank_pattern, which takes over 2 s"),
        ({"rank_pattern": {"q_proj": 2}}, "gives model.layers.0.self_attn.q_proj rank 2, its factors have 4"),
        ({"rank_pattern": {"(": 2}}, "names ( under rank_pattern, which is no pattern"),
        ({"rank_pattern": [1]}, "its rank_pattern does not give numbers to names"),
        ({"peft_type": "IA3"}, "is of an adapter of the kind IA3"),
        ({"use_dora": True}, "use_dora does not fit what it holds"),
        ({"use_dora": "yes"}, "has use_dora=yes, which is neither true nor false"),
        ({"trainable_token_indices": [1, 2]}, "has trainable_token_indices=[1, 2], which no adapter of the kit has"),
        ({"use_bdlora": {"a": 1}}, "has use_bdlora={'a': 1}, which"),
        ({"megatron_config": {"a": 1}}, "has megatron_config={'a': 1}, which"),
        ({"layers_to_transform": [0]}, "has layers_to_transform=[0], which"),
        ({"lora_bias": True}, "has lora_bias=True, which"),
        ({"bias": "all"}, "has bias=all, which"),
        ({"of_tomorrow": "x" * 1000}, "has of_tomorrow=" + "x" * 80 + "..., which no adapter"),
    ],
)
def test_what_it_never_writes_is_refused_by_name(folders, changes, told):
    with pytest.raises(DamagedFileError) as caught:
        refuse_strange_adapter(*folders(**changes))
    assert told in str(caught.value)
    assert caught.value.problems[0].where.startswith(str(folders()[0]))
    assert caught.value.exit_code == EXIT_BAD_RECIPE


def test_all_strange_settings_are_told_at_once(folders):
    with pytest.raises(DamagedFileError) as caught:
        refuse_strange_adapter(*folders(use_qalora=True, lora_bias=True, target_parameters=["a*b"]))
    assert len(caught.value.problems) == 3


def test_stacks_of_experts_without_factors_are_told(folders):
    with pytest.raises(DamagedFileError, match=r"under target_parameters, and adapter_model.safetensors holds no fac"):
        refuse_strange_adapter(*folders(target_parameters=["mlp.experts.down_proj"]))


@pytest.mark.parametrize("damage", ["[", "[1]"])
def test_settings_that_cannot_be_read_are_told(folders, damage):
    adapter, base = folders()
    (adapter / "adapter_config.json").write_text(damage)
    with pytest.raises(DamagedFileError, match=r"adapter_config\.json"):
        refuse_strange_adapter(adapter, base)


def test_what_a_release_of_peft_adds_is_no_fault_while_nobody_set_it(monkeypatch):
    monkeypatch.setattr(strange_adapter, "_defaults", lambda: {"a_new_switch": True})
    assert list(strange_adapter._settings({"peft_type": "LORA", "a_new_switch": True})) == []
    (fault,) = strange_adapter._settings({"peft_type": "LORA", "a_new_switch": 7})
    assert fault == "has a_new_switch=7, which no adapter of the kit has"
