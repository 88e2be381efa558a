"""Which weights learn at a rate of their own: a rule for each name that a row of `schema/optimizers.py` may give."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import SGD

from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName

Groups = list[dict[str, Any]]  # as torch's optimizers take them


def groups_of(optimizer: OptimizerName, optim: OptimConfig) -> Callable[[PeftModel], Groups] | None:
    """The groups of an optimizer's weights, for a model; None where transformers' own do, which have one rate."""
    if not optimizer.value.groups:
        return None
    rule = RULES[optimizer.value.groups]
    return lambda model: rule(model, optim)


def loraplus_groups(model: PeftModel, optim: OptimConfig) -> Groups:
    """LoRA+ (Hayou et al., 2024): B of each adapter learns `optim.loraplus_ratio` times as fast as A.

    peft tells them apart. Whatever else is trained learns at A's rate, but adapters of an embedding at 1e-6.
    """
    grouped = create_loraplus_optimizer(
        model,
        SGD,  # only to hold the groups
        lr=optim.learning_rate,
        loraplus_lr_ratio=optim.loraplus_ratio,
        loraplus_weight_decay=optim.weight_decay,
    )
    kept = ("params", "lr", "weight_decay")
    return [{name: group[name] for name in kept} for group in grouped.param_groups if group["params"]]


RULES: dict[str, Callable[[PeftModel, OptimConfig], Groups]] = {"loraplus": loraplus_groups}
