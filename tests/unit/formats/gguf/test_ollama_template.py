"""Ollama's templates beside the chat templates of every form, and never one that renders otherwise."""

from importlib import resources

import pytest

from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.ollama import Modelfile
from qlora_kit.data.template.probes import PROBES
from qlora_kit.formats.gguf.ollama_template import OllamaTemplate, default_system, ollama_template
from tests.chat_templates import FAMILIES as TEMPLATES
from tests.tiny_tokenizers import (
    gemma_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
    smollm_tokenizer,
)

PLACES = "You answer questions about places"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.mark.parametrize(
    ("published", "family", "system", "trims"),
    [
        ("chatml", "chatml", None, False),
        ("qwen2_5", "chatml", QWEN, False),
        ("qwen3", "chatml", None, False),
        ("default_system", "chatml", PLACES, False),
        ("two_modes", "smollm3", None, False),
        ("llama3", "llama3", None, True),
        ("llama3_1", "llama3.1", None, True),
        ("gemma2", "gemma", None, True),
        ("gemma3", "gemma", None, True),
        ("phi3", "phi3", None, False),
        ("parted_header", "phi4", None, False),
        ("inst_first", "mistral-v1", None, False),
        ("inst_last", "mistral-nemo", None, False),
    ],
)
def test_templates_of_known_forms_are_known(published: str, family: str, system: str | None, trims: bool) -> None:
    tokenizer = qwen_tokenizer()  # adds no beginning of text
    source = TEMPLATES[published]
    tokenizer.chat_template = source.template.source
    for name, token in source.template.special.items():
        setattr(tokenizer, name, token)
    found = ollama_template(tokenizer)
    assert isinstance(found, OllamaTemplate), found
    assert (found.family, found.system, found.trims) == (family, system, trims)
    modelfile = Modelfile("m", template=found.template, system=found.system)
    for probe in PROBES[4:7]:
        if source.system or probe.messages[0].role != "system":
            expected = source.template.render(probe.messages, answer_follows=True)
            assert modelfile.prompt(probe.messages) == expected


@pytest.mark.parametrize(
    ("name", "make", "family"),
    [
        ("chatml", smollm_tokenizer, "chatml"),
        ("gemma", gemma_tokenizer, "gemma"),
        ("llama3", llama3_tokenizer, "llama3"),
        ("mistral", mistral_tokenizer, "mistral"),
        ("phi3", phi3_tokenizer, "phi3"),
    ],
)
def test_the_kits_own_templates_are_known(name: str, make: object, family: str) -> None:
    assert callable(make)
    tokenizer = make()
    tokenizer.chat_template = (resources.files("qlora_kit.model") / "templates" / f"{name}.jinja").read_text("utf-8")
    found = ollama_template(tokenizer)
    assert isinstance(found, OllamaTemplate), found
    assert found.family == family


def test_the_beginning_of_text_is_written_only_where_the_tokenizer_does_not_add_it() -> None:
    adds = llama3_tokenizer()
    found = ollama_template(adds)
    assert isinstance(found, OllamaTemplate)
    assert "<|begin_of_text|>" not in found.template
    does_not = qwen_tokenizer()
    does_not.bos_token, does_not.chat_template = "<|begin_of_text|>", adds.chat_template
    found = ollama_template(does_not)
    assert isinstance(found, OllamaTemplate)
    assert found.template.startswith("<|begin_of_text|>{{ range")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("<|im_end|>\\n", "none of those that the kit knows"),
        ("<|im_start|>", "none of those that the kit knows"),
        ("", "today's date"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_differs_anywhere_gets_none(change: str | None, words: str) -> None:
    tokenizer = qwen_tokenizer()
    if change:
        tokenizer.chat_template = TEMPLATES["chatml"].template.source.replace("<|im_end|>", f"{change} ", 1)
    else:
        tokenizer.chat_template = None if change is None else tokenizer.chat_template + "{{ strftime_now('%Y') }}"
    found = ollama_template(tokenizer)
    assert isinstance(found, str)
    assert words in found


def test_a_template_that_refuses_most_conversations_gets_none() -> None:
    tokenizer = qwen_tokenizer()
    refusal = (
        "{% if messages | length > 1 or 'Hello' not in messages[0]['content'] %}{{ raise_exception('x') }}{% endif %}"
    )
    tokenizer.chat_template = refusal + tokenizer.chat_template
    assert isinstance(ollama_template(tokenizer), str)


def test_default_system_texts() -> None:
    assert default_system(TEMPLATES["default_system"].template) == PLACES
    assert default_system(TEMPLATES["llama3_1"].template) is None
    assert default_system(TEMPLATES["gemma3"].template) is None
    assert default_system(TEMPLATES["gemma2"].template) is None  # refuses system turns
    curly = "{% if messages[0]['role'] != 'system' %}S:{{ '{{ x }}' }}.{% endif %}"
    every = "{% for m in messages %}{{ m['role'][0] | upper }}:{{ m['content'] }}.{% endfor %}"
    assert default_system(ChatTemplate(curly + every, {})) is None  # Go would take it for an action
