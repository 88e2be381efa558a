"""The table of formats, servers and lines to paste."""

import ast

import pytest

from qlora_kit.export.serving.commands import Served
from qlora_kit.formats.registry import FORMATS


def lines(kind: str, served: Served) -> dict[str, tuple[str, ...]]:
    return {command.server: command.lines for command in FORMATS[kind].serve_commands(served)}


def test_a_folder_seen_from_outside_and_from_inside() -> None:
    outside = lines("awq", Served("m", "outputs/run/exports/m"))
    assert outside["vLLM"] == ("vllm serve ./outputs/run/exports/m --served-model-name m",)
    assert lines("awq", Served("m", "/abs/m"))["vLLM"] == ("vllm serve /abs/m --served-model-name m",)
    assert list(lines("awq_gemv", Served("m"))) == ["transformers"]  # the servers read the other layout
    inside = lines("merged", Served("m"))
    assert inside["SGLang"] == ("python -m sglang.launch_server --model-path . --served-model-name m --port 30000",)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed", "fp8_block"])
def test_transformers_is_left_out_where_it_reads_another_model(kind: str) -> None:
    assert list(lines(kind, Served("m"))) == ["transformers", "vLLM", "SGLang"]
    assert list(lines(kind, Served("m", is_unpacked=True))) == ["vLLM", "SGLang"]


def test_a_gguf_file() -> None:
    found = lines("gguf", Served("m", "exports/m", "m.Q4.gguf"))
    assert found == {
        "llama.cpp": ("llama-server -m ./exports/m/m.Q4.gguf --alias m --jinja --port 8080",),
        "Ollama": ("ollama create m -f exports/m/Modelfile", "ollama run m Hello"),
        "LM Studio": ("lms import --copy ./exports/m/m.Q4.gguf", "lms load"),
    }


def test_the_fp8_cache_is_asked_for_where_its_scales_are_stored() -> None:
    assert "--kv-cache-dtype fp8" in lines("compressed", Served("m", fp8_cache=True))["vLLM"][0]
    assert "--kv-cache-dtype" not in lines("compressed", Served("m"))["vLLM"][0]


@pytest.mark.parametrize(("rank", "allowed"), [(4, 8), (16, 16), (48, 64), (600, 600)])
def test_adapters_ask_for_a_rank_that_vllm_takes(rank: int, allowed: int) -> None:
    found = lines("adapter", Served("m", base="o/b", rank=rank))["vLLM"][0]
    assert found == f"vllm serve o/b --enable-lora --lora-modules m=. --max-lora-rank {allowed}"


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_servers_with_install_lines(kind: str) -> None:
    for command in FORMATS[kind].serve_commands(Served("m", "f", "a.gguf" if "gguf" in kind else ".")):
        assert command.install and command.lines
        if command.lines[0].startswith("python -"):
            body = command.lines[1:-1] if command.lines[-1] == "EOF" else ()
            ast.parse("\n".join(body))
