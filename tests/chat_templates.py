"""The chat templates of every family, verbatim, with the special tokens that they write and what they can say."""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_kit.data.template.chat_template import ChatTemplate

ASSETS = Path(__file__).parent / "assets" / "templates"


@dataclass(frozen=True)
class Family:
    """A published chat template.

    Attributes:
        source: file in `assets/templates`, or in trl's folder where the licence asks for more than a copy.
        system, tools: whether it takes a system turn, and tool calls with their results.
        tools_once: whether it takes tools only in conversations with a single user turn.
    """

    source: str
    bos: str | None
    eos: str
    system: bool = True
    tools: bool = False
    tools_once: bool = False

    @functools.cached_property
    def template(self) -> ChatTemplate:
        folder, _, name = self.source.rpartition("/")
        path = (trl_templates() if folder == "trl" else ASSETS) / name
        named = {"bos_token": self.bos, "eos_token": self.eos}
        return ChatTemplate(path.read_text("utf-8"), {key: token for key, token in named.items() if token})


def trl_templates() -> Path:
    """trl's folder of templates, found without importing trl."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


BEGIN, EOT = "<|begin_of_text|>", "<|eot_id|>"
FAMILIES = {
    "llama3": Family("trl/llama3.jinja", BEGIN, EOT),
    "llama3_1": Family("trl/llama3_1.jinja", BEGIN, EOT, tools=True),
    "llama3_2": Family("trl/llama3_2.jinja", BEGIN, EOT, tools=True),
    "gemma2": Family("trl/gemma.jinja", "<bos>", "<eos>", system=False),
    "gemma3": Family("trl/gemma3.jinja", "<bos>", "<eos>"),
    "qwen2_5": Family("qwen2_5.jinja", None, "<|im_end|>", tools=True),
    "qwen3": Family("qwen3.jinja", None, "<|im_end|>", tools=True),
    "qwen3_5": Family("qwen3_5.jinja", None, "<|im_end|>", tools=True),
    "mistral_v1": Family("mistral_v1.jinja", "<s>", "</s>"),
    "mistral_nemo": Family("mistral_nemo.jinja", "<s>", "</s>", system=False, tools=True, tools_once=True),
    "mistral_small": Family("mistral_small.jinja", "<s>", "</s>", tools=True, tools_once=True),
    "phi3": Family("phi3.jinja", "<s>", "<|endoftext|>"),
    "phi4": Family("phi4.jinja", "<|endoftext|>", "<|im_end|>"),
    "smollm2": Family("smollm2.jinja", "<|im_start|>", "<|im_end|>"),
    "smollm3": Family("smollm3.jinja", None, "<|im_end|>"),
    "deepseek_r1": Family("deepseek_r1.jinja", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "gpt_oss": Family("gpt_oss.jinja", "<|startoftext|>", "<|return|>", tools=True),
    "chatml": Family("chatml.jinja", None, "<|im_end|>"),
}
