"""Every family: what llama.cpp computes from the file equals what transformers computes from the folder."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.writer import write_gguf
from tests.tiny_models import FAMILIES, build_tiny_model
from tests.tiny_tokenizers import TRAINING_TEXT

# largest |difference of log-probability| over 200 positions x 640 tokens; 16-bit weights and cache
F16_TOLERANCE = 0.05  # measured 0.009 (qwen3, gemma3) to 0.018 (smollm3)
F16_KL = 2e-5  # measured 8e-7 to 5e-6 nats
Q4_K_M_KL = 0.4  # measured 0.03 (gemma3) to 0.18 (smollm3) nats; random weights are the hardest to quantize

TEXTS = [
    "Hello world",
    "Größe naïve façade",
    "Привет, мир!",
    "你好，世界",  # noqa: RUF001
    "🚀🦙 😶‍🌫️ ✅",
    "def f(x):\n    return x+1\n\n\n",
    "a\r\nb\r\n\r\nc",
    "12345 3.14 1 22 333",
    "  two   spaces\t\ttabs ",
    "I'LL we've DON'T",
    "\n\n\n",
    " ",
    "",
    "<|im_start|>user\nhi<|im_end|>",
    "<|user|> hi <|end|>\nx",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<s>[INST] hi [/INST] ok</s>",
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<think>a</think>",
    *TRAINING_TEXT,
]

MESSAGES = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Bye 🚀 123"},
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(family: str) -> Path:
        return build_tiny_model(family, tmp_path_factory.mktemp(family) / family)

    return build


def reference(folder: Path, ids: list[int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


def token_ids(folder: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)("".join(TRAINING_TEXT)).input_ids
    return ids[:200]


def scored(file: Path, ids: list[int]) -> Any:
    with LlamaCppModel(file) as model:
        return model.log_probabilities(ids, range(len(ids))).astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(family)
    ids = token_ids(folder)
    expected = reference(folder, ids)
    bounds = {"F16": F16_KL, "Q4_K_M": Q4_K_M_KL}
    for mix, bound in bounds.items():
        write_gguf(folder, tmp_path / f"{mix}.gguf", mix)
        found = scored(tmp_path / f"{mix}.gguf", ids)
        if mix == "F16":
            assert np.abs(found - expected).max() < F16_TOLERANCE
        assert (np.exp(expected) * (expected - found)).sum(-1).mean() < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_and_chat_prompt_equal_those_of_transformers(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    with LlamaCppModel(tmp_path / "model.gguf") as model:
        for text in TEXTS:
            for special in (True, False):
                ids = tokenizer(text, add_special_tokens=special).input_ids
                assert model.tokenize(text, add_special=special, parse_special=True) == ids, (text, special)
        prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        rendered = model.apply_template(MESSAGES)
        # llama.cpp drops the template's own BOS where the file makes it add one: exactly one is left
        assert model.tokenize(rendered, add_special=True, parse_special=True) == ids
        bos = tokenizer.bos_token or ""
        assert rendered in (prompt, prompt.removeprefix(bos))


def test_biases_are_reordered_with_the_rows_they_belong_to(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "biased", attention_bias=True, mlp_bias=True)
    ids = token_ids(folder)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert np.abs(scored(tmp_path / "model.gguf", ids) - reference(folder, ids)).max() < F16_TOLERANCE


def test_bfloat16_weights_are_widened_exactly(tmp_path: Path) -> None:
    folder = build_tiny_model("qwen3", tmp_path / "bf16", dtype=torch.bfloat16)
    ids = token_ids(folder)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert np.abs(scored(tmp_path / "model.gguf", ids) - reference(folder, ids)).max() < F16_TOLERANCE


def test_long_context_factors_of_phi_are_used(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(32)],
        "long_factor": [2.0 + 0.05 * i for i in range(32)],
        "original_max_position_embeddings": 512,
    }
    folder = build_tiny_model(
        "phi3",
        tmp_path / "long",
        max_position_embeddings=2048,
        original_max_position_embeddings=512,
        rope_parameters=rope,
    )
    ids = token_ids(folder)
    write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert np.abs(scored(tmp_path / "model.gguf", ids) - reference(folder, ids)).max() < F16_TOLERANCE
