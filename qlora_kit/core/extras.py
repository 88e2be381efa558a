"""Optional dependencies: imported when needed, and named with the pip line when missing."""

import importlib
import importlib.util
from types import ModuleType

from qlora_kit.core.errors import RecipeError

# module -> extra of this distribution that installs it
EXTRA_OF_MODULE = {
    "gguf": "gguf",
    "libgguf": "gguf",
    "xllamacpp": "gguf",
    "gptqmodel": "gptq",
    "optimum": "gptq",
    "llmcompressor": "compressed",
    "lm_eval": "harness",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def is_present(module: str) -> bool:
    """Whether the module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing_extra(module: str, needed_for: str) -> RecipeError:
    """The error for an absent optional module, with the pip line that installs it."""
    return RecipeError(
        f"{needed_for} needs the package '{module}', which is not installed",
        fix=f"pip install 'qlora-kit[{EXTRA_OF_MODULE[module]}]'",
    )


def require(module: str, needed_for: str) -> ModuleType:
    """Import an optional module.

    Raises:
        RecipeError: it is not installed; the message holds the pip line.
    """
    if not is_present(module):
        raise missing_extra(module, needed_for)
    return importlib.import_module(module)
