"""Recipe group `model`: which base, from where, and how its attention is computed."""

import math
from dataclasses import dataclass
from enum import Enum

from qlora_kit.families.demo import NAME
from qlora_kit.families.registry import CHAT_TEMPLATES
from qlora_kit.schema.field import MISSING, Sealed, setting

MOST_WEIGHTS = 10**13


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
    num_experts: int = setting(0, "Experts of a layer; 0 without a mixture.", minimum=0)
    experts_per_token: int = setting(0, "Experts that a token goes through.", minimum=0)
    expert_size: int = setting(0, "Width of an expert's MLP.", minimum=0)
    shared_size: int = setting(0, "Width of the MLP beside the experts, which every token goes through.", minimum=0)
    dense_layers: int = setting(0, "Layers of a mixture that have a dense MLP and no experts.", minimum=0)
    linear_weights: int = setting(
        0,
        "Weights of the layers' linear maps and experts in all, where the sizes above do not give them.",
        minimum=0,
        maximum=MOST_WEIGHTS,
    )
    other_weights: int = setting(
        0, "With linear_weights: all other weights, which stay in 16 bit.", minimum=0, maximum=MOST_WEIGHTS
    )

    @property
    def expert_layers(self) -> int:
        """Layers that have experts."""
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @property
    def routing_bytes(self) -> int:
        """Bytes that a layer keeps of a token's routing.

        The scores of all experts twice in float32; for each choice four int64, its expert as chosen, its token, and its
        places in both orders, and its expert as sorted in int16; see `model/expert_mlp.py`.
        """
        return 8 * self.num_experts + 34 * self.experts_per_token

    def experts_made(self, tokens: int, whole: float = math.inf) -> int:
        """Numbers that a layer's experts make in their backward pass, at the most at once, weights included.

        For each choice of a token: while gate and up are unpacked, the gradients on both of their sides; while down is,
        those on both of its sides beside gate and up; while the activation goes back, nine of the expert's own width;
        at the end two rows of the hidden width. See `model/expert_mlp.py`.

        Args:
            whole: of a stack with more numbers one half is unpacked at a time.
        """
        hidden, own, choices = self.hidden_size, self.expert_size, tokens * self.experts_per_token
        of_down = self.num_experts * hidden * own
        down, both = (size / 2 if size > whole else size for size in (of_down, 2 * of_down))
        while_unpacked = max(both + choices * (hidden + 2 * own), down + choices * (hidden + 3 * own))
        return int(max(while_unpacked, choices * 9 * own, choices * 2 * hidden))


@dataclass
class ModelConfig(Sealed):
    """The base model."""

    source: str = setting(MISSING, f"A local folder, a hub id, or `demo` ({NAME} from a PyPI wheel).")
    revision: str | None = setting(
        None, "Commit or tag of a hub id; its newest commit unless set, which the run keeps."
    )
    chat_template: str | None = setting(
        None, f"Replaces the model's own: a Jinja file, or {', '.join(sorted(CHAT_TEMPLATES))}."
    )
    attention: Attention = setting(Attention.sdpa, "Attention implementation.")
    part: Part = setting(
        Part.language_model,
        "What is trained of a checkpoint that takes images or sound too; its towers go unchanged into merged files.",
    )
    shape: ModelShape | None = setting(None, "Sizes for `plan` when the base's config.json is not at hand.")
