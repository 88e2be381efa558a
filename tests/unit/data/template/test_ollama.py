"""Modelfiles are read back as they were written, and prompts are those that Ollama makes."""

import pytest

from qlora_kit.data.conversation import Message
from qlora_kit.data.template.go_template import GoTemplate
from qlora_kit.data.template.ollama import Modelfile, ollama_prompt
from qlora_kit.data.template.probes import PROBES, composed, stripped

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"


def test_a_modelfile_is_read_back_as_it_was_written() -> None:
    written = Modelfile(
        "./model.Q4_K_M.gguf",
        comments=("FROM ./elsewhere.gguf", "a remark"),
        template=CHATML + '{{ if eq .System "x" }}{{ end }} ',
        system='Be "brief".\nAlways. ',
        parameters=(("stop", "<|im_end|>"), ("stop", "a\nb"), ("temperature", "0.7")),
        adapter="./adapter.gguf",
    )
    read = Modelfile.read(written.text())
    assert (read.source, read.adapter) == ("./model.Q4_K_M.gguf", "./adapter.gguf")
    assert read.template == written.template
    assert read.system == written.system
    assert read.parameters == written.parameters
    assert read.stops == ("<|im_end|>", "a\nb")


def test_a_modelfile_written_by_hand_is_read() -> None:
    text = 'from llama3\r\n# system "no"\nSYSTEM """\nTwo\nlines"""\nPARAMETER stop <|x|>\nMESSAGE user hi\n'
    read = Modelfile.read(text.replace("\r\n", "\n"))
    assert (read.source, read.system, read.template) == ("llama3", "\nTwo\nlines", None)
    assert read.stops == ("<|x|>",)


def test_a_modelfile_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no FROM line"):
        Modelfile.read("SYSTEM x\n")


@pytest.mark.parametrize("text", ['a """ b', 'ends in "'])
def test_a_text_that_a_modelfile_cannot_say_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="three quotes"):
        Modelfile("m", system=text).text()


def test_the_system_line_is_for_conversations_without_one() -> None:
    modelfile = Modelfile("m", template="{{ range .Messages }}[{{ .Role }} {{ .Content }}]{{ end }}", system="S")
    assert modelfile.prompt([Message("user", "u")]) == "[system S][user u]"
    assert modelfile.prompt([Message("system", ""), Message("user", "u")]) == "[system ][user u]"


def test_a_prompt_needs_a_template() -> None:
    with pytest.raises(ValueError, match="no TEMPLATE"):
        Modelfile("m").prompt([Message("user", "u")])


def test_neighbors_of_one_role_are_joined_and_all_system_texts_too() -> None:
    template = GoTemplate("{{ .System }}|{{ range .Messages }}[{{ .Role }} {{ .Content }}]{{ end }}")
    messages = [Message("system", "a"), Message("user", "b"), Message("user", "c"), Message("system", "d")]
    assert ollama_prompt(template, messages) == "a\n\nd|[system a][user b\n\nc][system d]"


def test_the_probes_are_twenty_and_end_with_the_user() -> None:
    assert len(PROBES) == len({probe.name for probe in PROBES}) == 20
    assert all(probe.messages[-1].role == "user" for probe in PROBES)
    assert [probe.name for probe in PROBES if probe.has_outer_blanks] == ["blanks around texts"]
    assert [probe.name for probe in PROBES if composed(probe.messages) != probe.messages] == ["decomposed letters"]
    assert [message.content for message in stripped(PROBES[-1].messages)] == [
        "indented and trailing",
        "an answer",
        "next",
    ]
