"""Chat templates of every construct, with the special tokens that they write and what they can say.

What is published is read from the packages that are installed; the rest is written here, in the form of a family.
"""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_kit.data.template.chat_template import ChatTemplate

ASSETS = Path(__file__).parent / "assets" / "templates"
KIT = Path(__file__).parents[1] / "qlora_kit" / "model" / "templates"


@dataclass(frozen=True)
class Family:
    """A chat template.

    Attributes:
        source: `trl/<file>` or `kit/<file>` as these packages have it, else a file of ours in `assets/templates`.
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
        path = {"trl": trl_templates(), "kit": KIT}.get(folder, ASSETS) / name
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
    "qwen2_5": Family("trl/qwen2_5.jinja", None, "<|im_end|>", tools=True),
    "qwen3": Family("trl/qwen3.jinja", None, "<|im_end|>", tools=True),
    "qwen3_5": Family("trl/qwen3_5_think.jinja", None, "<|im_end|>", tools=True),
    "inst_first": Family("inst_first.jinja", "<s>", "</s>"),
    "inst_last": Family("inst_last.jinja", "<s>", "</s>", system=False, tools=True, tools_once=True),
    "dated": Family("dated.jinja", "<s>", "</s>", tools=True, tools_once=True),
    "phi3": Family("trl/phi3.jinja", "<s>", "<|endoftext|>"),
    "parted_header": Family("parted_header.jinja", "<|endoftext|>", "<|im_end|>"),
    "default_system": Family("default_system.jinja", "<|im_start|>", "<|im_end|>"),
    "two_modes": Family("two_modes.jinja", None, "<|im_end|>"),
    "deepseek_r1": Family("trl/deepseek_r1_distill.jinja", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "gpt_oss": Family("trl/gptoss.jinja", "<|startoftext|>", "<|return|>", tools=True),
    "chatml": Family("kit/chatml.jinja", None, "<|im_end|>"),
}
