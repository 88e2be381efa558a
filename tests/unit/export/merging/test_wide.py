"""What a base holds in fp32 beside weights in 16 bit is merged as it is: bf16 cannot tell such values apart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.audit import audit_folder
from qlora_kit.export.sixteen_bit import copy_base
from qlora_kit.model.stored_names import stored_names
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.weights.headers import read_headers
from tests.families import build
from tests.unit.export.merging.trained import Pair, draw_adapter, merge_pair, rewrite, shard, tensors_of

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
Tensors = dict[str, torch.Tensor]


def narrow(found: Tensors, *, but: tuple[str, ...] = ()) -> Tensors:
    return {name: tensor if name.endswith(but) else tensor.bfloat16() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base wholly in fp32, whose router adds to its scores what differs by less than a step of bf16."""
    base = build("glm4_moe", tmp_path_factory.mktemp("routed") / "base")
    close = torch.tensor([10.0, 10.011, 10.023, 9.99])
    assert len(close.bfloat16().unique()) == 1
    rewrite(shard(base), lambda found: {**found, BIAS: close})
    return base


def test_what_the_class_computes_with_in_fp32_stays_in_fp32(routed: Path, tmp_path: Path) -> None:
    pair = Pair(routed, draw_adapter(routed, tmp_path / "adapter", LoraConfig(r=4)))
    merge_pair(pair, tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert {name for name, tensor in merged.items() if tensor.dtype == torch.float32} == {BIAS}
    assert torch.equal(merged[BIAS], tensors_of(routed)[BIAS])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.get_buffer(BIAS), merged[BIAS])


def test_a_copy_of_a_base_keeps_them_too(routed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_base(routed, AutoTokenizer.from_pretrained(routed), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[BIAS], tensors_of(routed)[BIAS])


def test_decays_in_fp32_beside_narrow_weights_stay_in_fp32(tmp_path: Path) -> None:
    base = build("qwen3_5_text", tmp_path / "base")
    before = tensors_of(base)
    kept = {name for name in before if name.endswith(("A_log", "linear_attn.norm.weight"))}
    assert kept
    pair = Pair(base, draw_adapter(base, tmp_path / "adapter", LoraConfig(r=4)))
    merge_pair(pair, tmp_path / "of_wide")
    assert not _wide(tmp_path / "of_wide")  # all was fp32, so none was meant
    rewrite(shard(base), lambda found: narrow(found, but=("A_log", "linear_attn.norm.weight")))
    merge_pair(pair, tmp_path / "of_mixed")
    assert _wide(tmp_path / "of_mixed") == kept
    after = tensors_of(tmp_path / "of_mixed")
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_what_the_adapter_changes_is_in_16_bit_and_so_are_tables(pair: Pair, tmp_path: Path) -> None:
    wide = ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight", "model.norm.weight")
    rewrite(shard(pair.base), lambda found: {n: t.float() if n.endswith(wide) else t for n, t in found.items()})
    merge_pair(pair, tmp_path / "out")
    assert _wide(tmp_path / "out") == {"model.norm.weight"}


def test_planted_narrow_tensor(routed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy_base(routed, AutoTokenizer.from_pretrained(routed), tmp_path / "out")
    file = shard(tmp_path / "out")
    assert load_file(file)[BIAS].dtype == torch.float32
    rewrite(file, narrow)
    names = read_headers(routed)
    with pytest.raises(RunError, match=f"1 tensor is not float32: {BIAS}"):
        audit_folder(tmp_path / "out", routed, names, stored_names(routed, names), wide={BIAS})


def _wide(folder: Path) -> set[str]:
    return {name for name, tensor in read_headers(folder).items() if tensor.dtype == "F32"}
