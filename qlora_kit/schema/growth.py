"""References of a recipe to its own fields, followed before they are resolved: none in a circle, none that doubles."""

import re
from typing import Any

from omegaconf import OmegaConf

from qlora_kit.core.errors import RecipeError

MOST_CHARACTERS = 100_000  # of all values together, references written out

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def refuse_growth(tree: Any) -> None:
    """Refuse a composed recipe whose references are circular or write out to more than a recipe holds.

    Raises:
        RecipeError: naming the reference.
    """
    plain = OmegaConf.to_container(tree, resolve=False)
    if isinstance(plain, dict):
        plain.pop("hydra", None)
    sizes: dict[str, int] = {}
    if _size(plain, plain, (), sizes) > MOST_CHARACTERS:
        raise RecipeError(f"the recipe's references write out to more than {MOST_CHARACTERS:,} characters")


def _size(value: Any, root: Any, above: tuple[str, ...], sizes: dict[str, int]) -> int:
    if isinstance(value, dict):
        return sum(len(str(key)) + _size(part, root, above, sizes) for key, part in value.items())
    if isinstance(value, list):
        return sum(_size(part, root, above, sizes) for part in value)
    text = str(value)
    return len(text) + sum(_target_size(path, root, above, sizes) for path in _REFERENCE.findall(text))


def _target_size(path: str, root: Any, above: tuple[str, ...], sizes: dict[str, int]) -> int:
    if path in above:
        raise RecipeError(f"the reference ${{{path}}} leads back to itself, by {' and '.join(above)}")
    if path not in sizes:
        target = root
        for name in path.split("."):
            target = target.get(name) if isinstance(target, dict) else None
        sizes[path] = _size(target, root, (*above, path), sizes)
    return sizes[path]
