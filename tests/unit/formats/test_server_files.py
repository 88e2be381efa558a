"""What servers require, checked without them: good artifacts pass, each planted error is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.formats.registry import find_format

CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 640}
QUANTIZED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "ignore": ["lm_head"],
    },
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}

Make = Callable[..., Path]


def static_problems(format_name: str, server: str, folder: Path, file: str) -> list[str]:
    """What a server would refuse."""
    return list(find_format(format_name).server_problems(server, folder, file))


@pytest.fixture
def model(tmp_path: Path) -> Make:
    def made(quantization: dict[str, Any] | None = None, **config: Any) -> Path:
        extra = {} if quantization is None else {"quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **extra, **config}))
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "tokenizer.json").touch()
        return tmp_path

    return made


@pytest.mark.parametrize("format_name", [*QUANTIZED, "merged"])
def test_good_folders_pass(model: Make, format_name: str) -> None:
    assert static_problems(format_name, "vLLM", model(QUANTIZED.get(format_name)), ".") == []


@pytest.mark.parametrize(
    ("format_name", "change", "words"),
    [
        ("gptq", {"quant_method": "awq"}, "quant_method is awq, which may be gptq"),
        ("gptq", {"bits": 5}, "bits is 5, which may be 2, 3, 4, 8"),
        ("gptq", {"desc_act": None}, "desc_act is None"),
        ("awq", {"bits": 8}, "bits is 8, which may be 4"),
        ("awq", {"zero_point": "yes"}, "zero_point is yes"),
        ("compressed", {"format": "dense"}, "format is dense"),
        ("compressed", {"config_groups": {}}, "config_groups is empty"),
        ("compressed", {"config_groups": {"g": {"weights": {"num_bits": 4}}}}, "g has no targets"),
        ("compressed", {"config_groups": {"g": {"targets": ["x"], "weights": {"num_bits": 3}}}}, "weights of 3 bits"),
        ("bnb", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ("bnb", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is int4"),
    ],
)
def test_each_wrong_value_is_named(model: Make, format_name: str, change: dict[str, Any], words: str) -> None:
    problems = static_problems(format_name, "vLLM", model({**QUANTIZED[format_name], **change}), ".")
    assert len(problems) == 1
    assert words in problems[0]


@pytest.mark.parametrize(
    ("format_name", "key", "words"),
    [
        ("gptq", "group_size", "quantization_config has no group_size"),
        ("awq", "group_size", "has no group_size or q_group_size"),
        ("compressed", "ignore", "has no ignore"),
    ],
)
def test_each_missing_key_is_named(model: Make, format_name: str, key: str, words: str) -> None:
    settings = {name: value for name, value in QUANTIZED[format_name].items() if name != key}
    problems = static_problems(format_name, "vLLM", model(settings), ".")
    assert len(problems) == 1
    assert words in problems[0]


def test_missing_files_are_named(model: Make, tmp_path: Path) -> None:
    assert static_problems("merged", "vLLM", tmp_path, ".") == ["there is no config.json"]
    folder = model()
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    first, second = static_problems("merged", "vLLM", folder, ".")
    assert (first, second[:21]) == ("there is no *.safetensors", "there is no tokenizer")
    (folder / "tokenizer.json").touch()
    (folder / "model-1.safetensors").touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert static_problems("merged", "vLLM", folder, ".") == [
        "weight files named by model.safetensors.index.json are missing: model-2.safetensors"
    ]


def test_quantized_or_not_must_fit_the_format(model: Make) -> None:
    assert "the weights are 16-bit" in static_problems("merged", "vLLM", model(QUANTIZED["awq"]), ".")[0]
    assert "no quantization_config" in static_problems("awq", "vLLM", model(), ".")[0]


def test_sizes_may_stand_in_the_language_part(model: Make) -> None:
    folder = model(vocab_size=None)
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    (folder / "config.json").write_text(json.dumps({**whole, "text_config": {"vocab_size": 9}}))
    assert static_problems("merged", "vLLM", folder, ".") == []
    (folder / "config.json").write_text(json.dumps(whole))
    assert static_problems("merged", "vLLM", folder, ".") == ["config.json has no vocab_size"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is all, which may be none"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
    ],
)
def test_adapters_that_servers_refuse(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert static_problems("adapter", "vLLM", tmp_path, ".") == []
    (tmp_path / "adapter_config.json").write_text(json.dumps({**ADAPTER, **change}))
    problems = static_problems("adapter", "vLLM", tmp_path, ".")
    assert len(problems) == 1
    assert words in problems[0]


def test_an_incomplete_adapter(tmp_path: Path) -> None:
    assert static_problems("adapter", "vLLM", tmp_path, ".") == ["there is no adapter_config.json"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert static_problems("adapter", "vLLM", tmp_path, ".") == ["there is no adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("content", "modelfile", "words"),
    [
        (None, "FROM ./m.gguf\n", "there is no m.gguf"),
        (b"PK\x03\x04", "FROM ./m.gguf\n", "m.gguf is not a GGUF file"),
        (b"GGUF", None, "there is no Modelfile"),
        (b"GGUF", "FROM ./other.gguf\n", "FROM names ./other.gguf, not ./m.gguf"),
        (b"GGUF", "SYSTEM x\n", "no FROM line"),
        (b"GGUF", "FROM ./m.gguf\n", ""),
    ],
)
def test_gguf_for_ollama(tmp_path: Path, content: bytes | None, modelfile: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "m.gguf").write_bytes(content)
    if modelfile is not None:
        (tmp_path / "Modelfile").write_text(modelfile)
    problems = static_problems("gguf", "Ollama", tmp_path, "m.gguf")
    assert len(problems) == bool(words)
    assert words in "".join(problems)
