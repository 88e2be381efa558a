"""The families and chat formats that the kit knows."""

from collections.abc import Mapping

from qlora_kit.families.chatml import CHATML
from qlora_kit.families.family import ChatFormat, Family
from qlora_kit.families.gemma import GEMMA3, GEMMA_CHAT
from qlora_kit.families.glm import GLM, GLM4
from qlora_kit.families.granite import GRANITE
from qlora_kit.families.llama import LLAMA, LLAMA3_CHAT
from qlora_kit.families.mistral import MISTRAL, MISTRAL_CHAT
from qlora_kit.families.olmo import OLMO2
from qlora_kit.families.phi import PHI3, PHI_CHAT
from qlora_kit.families.qwen import QWEN2, QWEN3
from qlora_kit.families.smollm import SMOLLM3, SMOLLM3_CHAT

_FAMILIES = (LLAMA, MISTRAL, SMOLLM3, QWEN2, QWEN3, GEMMA3, PHI3, OLMO2, GRANITE, GLM, GLM4)
# In the order in which they are compared with a model's own template.
CHAT_FORMATS: tuple[ChatFormat, ...] = (CHATML, LLAMA3_CHAT, GEMMA_CHAT, PHI_CHAT, MISTRAL_CHAT, SMOLLM3_CHAT)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}
# Those whose GGUF rules are known here.
ARCHITECTURES: Mapping[str, Family] = {family.architecture: family for family in _FAMILIES if family.gguf is not None}
# Chat templates of the kit, and the tokens that they write.
CHAT_TEMPLATES: Mapping[str, tuple[str, ...]] = {one.name: one.tokens for one in CHAT_FORMATS if one.tokens is not None}
SERVED_TEMPLATES: Mapping[str, str] = {name: text for one in CHAT_FORMATS for name, text in one.served.items()}
