"""The Modelfile beside a GGUF file."""

import json
from pathlib import Path

import pytest

from qlora_kit.data.template.ollama import Modelfile
from qlora_kit.formats.gguf.modelfile import write_modelfile
from qlora_kit.formats.registry import FORMATS
from tests.chat_templates import FAMILIES as TEMPLATES
from tests.served_artifact import Made

EXPECTED = '''# tiny_q4: made by qlora-kit from Tiny-1B
# TEMPLATE: chatml; it wrote 20 trial conversations as the trained template does.
FROM ./tiny.Q4_K_M.gguf
TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature 0.6
PARAMETER top_k 20
PARAMETER top_p 0.95
'''


def test_the_whole_file(facts: Made, tmp_path: Path) -> None:
    assert write_modelfile(tmp_path, facts()) == "Modelfile"
    assert (tmp_path / "Modelfile").read_text("utf-8") == EXPECTED


def test_the_system_text_that_the_template_adds(facts: Made, tmp_path: Path) -> None:
    made = facts()
    made.tokenizer.chat_template = TEMPLATES["default_system"].template.source
    write_modelfile(tmp_path, made)
    assert Modelfile.read((tmp_path / "Modelfile").read_text("utf-8")).system == ("You answer questions about places")


def test_an_unknown_template_is_left_out_and_the_file_says_so(facts: Made, tmp_path: Path) -> None:
    made = facts()
    made.tokenizer.chat_template = made.tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    write_modelfile(tmp_path, made)
    text = (tmp_path / "Modelfile").read_text("utf-8")
    assert Modelfile.read(text).template is None
    assert "# No TEMPLATE: the chat template is none of those" in text
    assert "# Ollama does not read the Jinja template inside the GGUF file." in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"do_sample": False, "temperature": 0.6}, [("temperature", "0")]),
        ({"repetition_penalty": 1.1, "min_p": 0.05}, [("min_p", "0.05"), ("repeat_penalty", "1.1")]),
        ({"top_k": None, "temperature": "x"}, []),
    ],
)
def test_sampling_is_the_bases_own(
    facts: Made, tmp_path: Path, base: Path, settings: dict[str, object], expected: list[tuple[str, str]]
) -> None:
    (base / "generation_config.json").write_text(json.dumps(settings))
    write_modelfile(tmp_path, facts())
    read = Modelfile.read((tmp_path / "Modelfile").read_text("utf-8"))
    assert [parameter for parameter in read.parameters if parameter[0] != "stop"] == expected


def test_an_adapter_stands_on_its_base(facts: Made, tmp_path: Path) -> None:
    FORMATS["adapter_gguf"].write_server_files(tmp_path, facts(format="adapter_gguf", file="adapter.gguf"))
    text = (tmp_path / "Modelfile").read_text("utf-8")
    read = Modelfile.read(text)
    assert (read.source, read.adapter) == ("./base.gguf", "./adapter.gguf")
    assert "put it beside this file" in text
