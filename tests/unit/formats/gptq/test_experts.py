"""GPTQ of a family of which gptqmodel leaves some layers in 16 bit: the file says which, so that readers find all."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.formats.gptqmodel_folders import load_quantized
from qlora_kit.schema.export import GptqTarget
from tests.tiny_models import qwen_tokenizer

ROWS = [[(7 * row + 3 * place) % 600 for place in range(24)] for row in range(6)]


@pytest.mark.slow
def test_what_the_library_leaves_out_is_told_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    widths = {"hidden_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64, "vocab_size": 640}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**ids, **experts, **heads, **widths)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        expected = model(torch.tensor(ROWS[:1])).logits.log_softmax(-1)
    model.save_pretrained(source)
    qwen_tokenizer().save_pretrained(source)
    write_gptq(source, out, GptqTarget(bits=8, group_size=32), ROWS)
    assert "stay in 16 bit (shared_expert_gate): gptqmodel does not quantize them" in capsys.readouterr().err
    with torch.no_grad():
        found = load_quantized(out)(torch.tensor(ROWS[:1])).logits.log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert 0 <= kl < 0.01
