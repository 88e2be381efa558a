"""Budgets of bits that no choice of formats meets, told from a model's shape before a weight is loaded."""

from collections.abc import Mapping
from pathlib import Path

from qlora_kit.core.errors import Problem
from qlora_kit.core.files import read_json
from qlora_kit.export.budget.allocate import out_of_reach
from qlora_kit.export.linear_shapes import linear_shapes
from qlora_kit.formats.gguf.budget import GgufFormats
from qlora_kit.formats.gptq.budget import GptqFormats
from qlora_kit.schema.budget import Budget, budgets
from qlora_kit.schema.export import ExportConfig, GptqTarget


def unreachable_budgets(base_folder: Path, config: ExportConfig) -> list[Problem]:
    """What is wrong with the budgets of an export of this base.

    Raises:
        RecipeError: patterns of a target's overrides do not fit the model.
    """
    wanted = budgets(config)
    if not wanted:
        return []
    shapes = linear_shapes(base_folder)
    found = (_problem(base_folder, budget, shapes) for budget in wanted)
    return [problem for problem in found if problem]


def gguf_names_of(model_dir: Path, names: Mapping[str, object]) -> dict[str, str]:
    """GGUF name of the weight of each linear layer.

    Raises:
        RecipeError: an architecture without GGUF export.
    """
    from qlora_kit.formats.gguf.architectures import find_architecture
    from qlora_kit.formats.gguf.tensors import gguf_names

    config = read_json(model_dir / "config.json")
    weights = gguf_names((f"{name}.weight" for name in names), find_architecture(config), config["num_hidden_layers"])
    return {name.removesuffix(".weight"): found for name, found in weights.items()}


def _problem(base_folder: Path, budget: Budget, shapes: Mapping[str, tuple[int, int]]) -> Problem | None:
    formats = (
        GptqFormats.of(budget.target, shapes)
        if isinstance(budget.target, GptqTarget)
        else GgufFormats(budget.target, {}, shapes, {})
    )
    bits = [
        (shapes[name][0] * shapes[name][1], formats.bits(name).values()) for names in formats.groups() for name in names
    ]
    total = sum(weights for weights, _ in bits)
    smallest = sum(weights * min(each) for weights, each in bits) / total
    largest = sum(weights * max(each) for weights, each in bits) / total
    return out_of_reach(budget.bits, smallest, largest, budget.path, budget.target_path)
