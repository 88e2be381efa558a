"""Recipe group `lora`: the adapter that is trained."""

from dataclasses import dataclass
from enum import Enum

from qlora_kit.schema.field import Sealed, setting


class LoraInit(Enum):
    """Initial values of the adapter, by peft's names."""

    default = "default"
    gaussian = "gaussian"
    olora = "olora"
    pissa = "pissa"
    corda = "corda"
    orthogonal = "orthogonal"


# A name in `lora.targets` that stands for several modules, by the suffixes that families use.
TARGET_SETS: dict[str, tuple[str, ...]] = {
    "all_linear": (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
    ),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}


@dataclass
class LoraConfig(Sealed):
    """The low-rank adapter."""

    r: int = setting(16, "Rank of the update.", minimum=1)
    alpha: float = setting(
        32.0, "Scale of the update: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA.", above=0
    )
    dropout: float = setting(0.0, "Dropout on the adapter's input.", minimum=0, maximum=0.99)
    targets: list[str] = setting(["all_linear"], "all_linear, attention, mlp, or module names such as q_proj.")
    experts: bool = setting(True, "Adapt the experts of a mixture too, where targets mean its MLP.")
    rank_pattern: dict[str, int] = setting({}, "Rank by module name, where it differs from r.")
    alpha_pattern: dict[str, float] = setting({}, "Alpha by module name, where it differs from alpha.")
    use_rslora: bool = setting(False, "Rank-stabilized scale, alpha / sqrt(r).")
    use_dora: bool = setting(False, "Weight-decomposed LoRA: a trained magnitude per output row.")
    init: LoraInit = setting(LoraInit.default, "Initial values.")
    lora_bias: bool = setting(False, "Train a bias in B; such an adapter cannot be merged on a 4-bit base.")
    modules_to_save: list[str] = setting([], "Modules trained in full and saved beside the adapter.")

    @property
    def adapts_experts(self) -> bool:
        """Whether the experts of a mixture carry LoRA, where the base has such."""
        return self.experts and bool({"all_linear", "mlp"} & set(self.targets))
