"""Attention with sinks by flash kernels is attention with sinks, forward and backward."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MiMoV2FlashConfig

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.sinks import (
    WITH_SINKS,
    attend_with_sinks,
    enable_sink_attention,
    has_flash_sinks,
)

WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS |= {"vocab_size": 640, "num_hidden_layers": 2, "head_dim": 16}
WINDOW = 8


def gpt_oss(**more):
    return GptOssConfig(**(WIDTHS | more), num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)


def mimo():
    """Heads of values are narrower, and sinks are in layers with a window alone."""
    own = {"v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8, "swa_num_attention_heads": 4}
    own |= {"swa_num_key_value_heads": 2, "sliding_window": WINDOW, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return MiMoV2FlashConfig(**WIDTHS, **own)


def model_of(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith("sinks"):
                one.normal_()
            elif one.ndim > 1:
                one.normal_(std=0.2)
    return model


def by_hand(query, key, value, sinks, window, scale):
    """[rows, T, heads, width], with every score in a matrix."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    tokens = query.shape[2]
    sees = torch.ones(tokens, tokens).tril().bool()
    if window is not None:
        sees &= ~torch.ones(tokens, tokens).tril(-window).bool()
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, float("-inf"))
    if sinks is None:
        return (scores.softmax(-1) @ value).transpose(1, 2)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return (shares @ value).transpose(1, 2)


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (2, 16), (2, 8)])
def test_results_and_gradients_are_those_of_a_matrix_of_scores(heads, width, window, has_sinks):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 37, 16, requires_grad=True)
    key = torch.randn(2, heads, 37, 16, requires_grad=True)
    value = torch.randn(2, heads, 37, width, requires_grad=True)
    sinks = torch.randn(4) if has_sinks else None
    found, _ = attend_with_sinks(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, s_aux=sinks
    )
    wanted = by_hand(query, key, value, sinks, window, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(wanted)
    parts = (query, key, value)
    torch.testing.assert_close(
        torch.autograd.grad(found, parts, grad), torch.autograd.grad(wanted, parts, grad), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("config", [gpt_oss(), mimo()], ids=["gpt_oss", "mimo"])
def test_a_model_with_sinks_gives_what_it_gave(config):
    model = model_of(config)
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        undo = enable_sink_attention(model)
        assert undo is not None and model.config._attn_implementation == WITH_SINKS
        found = model(input_ids=ids, use_cache=False).logits.float()
        assert ((found - wanted).norm() / wanted.norm()).item() < 0.05  # 0.015 and 0.018 as measured
        undo()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits.float(), wanted)


def test_attention_that_gives_other_numbers_is_left(monkeypatch, capsys):
    model = model_of(gpt_oss())
    with torch.no_grad():
        for layer in model.model.layers:  # asks for a window and computes without
            monkeypatch.setattr(layer.self_attn, "sliding_window", 2)
    assert enable_sink_attention(model) is None
    assert model.config._attn_implementation == "eager"
    assert "the flash kernel gives other numbers" in "".join(capsys.readouterr())


def test_sinks_that_are_trained_are_left_to_code_that_gives_them_gradients(capsys):
    model = model_of(gpt_oss())
    model.model.layers[0].self_attn.sinks.requires_grad_()
    assert enable_sink_attention(model) is None
    assert "with a matrix of scores: sinks are trained" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "model",
    [
        model_of(LlamaConfig(**WIDTHS)),
        model_of(gpt_oss(), torch.float32),
        model_of(gpt_oss(attention_dropout=0.1)),
        model_of(gpt_oss(head_dim=20)),
    ],
    ids=["no sinks", "32 bit", "dropout", "width"],
)
def test_other_models_are_left(model):
    assert not has_flash_sinks(model)
    assert enable_sink_attention(model) is None


@pytest.mark.parametrize(
    ("more", "what"), [({"softcap": 30.0}, "softcap"), ({"dropout": 0.1}, "dropout")], ids=["softcap", "dropout"]
)
def test_what_is_not_known_is_refused(more, what):
    one = torch.randn(1, 2, 5, 16)
    with pytest.raises(RunError, match=f"Module asks for {what}"):
        attend_with_sinks(torch.nn.Module(), one, one, one, None, **more)


def test_a_cache_is_refused():
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16)
    with pytest.raises(RunError, match="a cache"):
        attend_with_sinks(torch.nn.Module(), query, key, key, None)
