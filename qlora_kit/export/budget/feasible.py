"""Budgets of bits that no choice of formats meets, told from a model's shape before a weight is loaded."""

from collections.abc import Mapping

from qlora_kit.core.errors import Problem
from qlora_kit.export.budget.allocate import out_of_reach
from qlora_kit.export.budget.choose import Formats
from qlora_kit.schema.budget import Budget


def infeasible(budget: Budget, formats: Formats, shapes: Mapping[str, tuple[int, int]]) -> Problem | None:
    """What is wrong with a budget for a model of these layers; None where some choice of formats meets it.

    Args:
        formats: what the budget's target leaves open.
        shapes: (out_features, in_features) of each layer.
    """
    bits = [
        (shapes[name][0] * shapes[name][1], formats.bits(name).values()) for names in formats.groups() for name in names
    ]
    total = sum(weights for weights, _ in bits)
    smallest = sum(weights * min(each) for weights, each in bits) / total
    largest = sum(weights * max(each) for weights, each in bits) / total
    return out_of_reach(budget.bits, smallest, largest, budget.path, budget.target_path)
