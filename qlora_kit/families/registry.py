"""The families and chat formats that the kit knows."""

from collections.abc import Mapping

from qlora_kit.families.apertus import APERTUS
from qlora_kit.families.arcee import ARCEE
from qlora_kit.families.chatml import CHATML
from qlora_kit.families.cohere import COHERE, COHERE2
from qlora_kit.families.cwm import CWM
from qlora_kit.families.ernie import ERNIE4_5
from qlora_kit.families.exaone import EXAONE4
from qlora_kit.families.family import ChatFormat, Family
from qlora_kit.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA4, GEMMA_CHAT
from qlora_kit.families.glm import GLM, GLM4
from qlora_kit.families.granite import GRANITE, GRANITE_HYBRID
from qlora_kit.families.helium import HELIUM
from qlora_kit.families.hunyuan import HUNYUAN
from qlora_kit.families.liquid import LFM2
from qlora_kit.families.llama import LLAMA, LLAMA3_CHAT
from qlora_kit.families.mistral import MINISTRAL3, MISTRAL, MISTRAL_CHAT
from qlora_kit.families.nemotron import NEMOTRON
from qlora_kit.families.olmo import OLMO, OLMO2, OLMO3
from qlora_kit.families.phi import PHI3, PHI_CHAT
from qlora_kit.families.qwen import QWEN2, QWEN3, QWEN3_5, QWEN3_MOE
from qlora_kit.families.seed import SEED_OSS
from qlora_kit.families.smollm import SMOLLM3, SMOLLM3_CHAT
from qlora_kit.families.starcoder import STARCODER2

_FAMILIES = (
    *(LLAMA, MISTRAL, MINISTRAL3, SMOLLM3, QWEN2, QWEN3, QWEN3_5, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3, GEMMA4, PHI3),
    *(OLMO, OLMO2, OLMO3, GRANITE, GRANITE_HYBRID, GLM, GLM4, LFM2, EXAONE4, SEED_OSS, HUNYUAN, ERNIE4_5, HELIUM, CWM),
    *(COHERE, COHERE2, ARCEE, NEMOTRON, STARCODER2, APERTUS),
)
# In the order in which they are compared with a model's own template.
CHAT_FORMATS: tuple[ChatFormat, ...] = (CHATML, LLAMA3_CHAT, GEMMA_CHAT, PHI_CHAT, MISTRAL_CHAT, SMOLLM3_CHAT)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}
# Those whose GGUF rules are known here.
ARCHITECTURES: Mapping[str, Family] = {family.architecture: family for family in _FAMILIES if family.gguf is not None}
# Chat templates of the kit, and the tokens that they write.
CHAT_TEMPLATES: Mapping[str, tuple[str, ...]] = {one.name: one.tokens for one in CHAT_FORMATS if one.tokens is not None}
SERVED_TEMPLATES: Mapping[str, str] = {name: text for one in CHAT_FORMATS for name, text in one.served.items()}
