"""An AWQ folder of either layout, read by transformers on a GPU, computes what its packed weights say."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_kit.formats.awq.layout import KINDS, unpacked_weight
from qlora_kit.formats.awq.load import load_awq
from qlora_kit.formats.awq.write import write_awq
from qlora_kit.schema.export import AwqLayout, AwqTarget
from tests.tiny_models import build_tiny_model

pytest.importorskip("gptqmodel")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]
TOKENS = [1, 40]  # kernels of their own for a few tokens and for many
GROUP = 64


@torch.no_grad()
def expected_model(source, out, layout):
    """The source model in float32, with the weights that the packed tensors stand for."""
    tensors = load_file(out / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    unpacked = []
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            unpacked.append(module)
            packed = {kind: tensors[f"{module}.{kind}"] for kind in KINDS}
            parameter.copy_(unpacked_weight(packed, GROUP, layout))
        elif name in tensors:
            parameter.copy_(tensors[name])
    assert unpacked
    return model


@pytest.mark.parametrize("layout", list(AwqLayout))
@torch.no_grad()
def test_a_folder_computes_what_it_says(tmp_path, layout):
    source, out = build_tiny_model("llama", tmp_path / "llama", dtype=torch.bfloat16), tmp_path / "out"
    out.mkdir()
    write_awq(source, out, AwqTarget(group_size=GROUP, layout=layout), ROWS)
    model, expected = load_awq(out), expected_model(source, out, layout)
    assert "Awq" in type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__
    for count in TOKENS:
        sample = torch.tensor([[(31 * step + 5) % 600 for step in range(count)]])
        found, wanted = model(sample.cuda()).logits.float().cpu(), expected(sample).logits
        error = ((found - wanted).norm() / wanted.norm()).item()
        assert error < 0.01, f"{count} tokens: {error}"  # the kernels multiply in float16
