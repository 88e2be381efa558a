"""Tokens a second that runs came to on this device, kept in the user's cache: what a plan says of time was measured."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path

from qlora_kit.core.cache import cache_folder, made_in_cache
from qlora_kit.core.device import has_nvidia_gpu
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.tracking.rates import WARM_STEPS

CACHE = "rates"
LAYOUT = 1  # raised when a rate stands for something else


def known_rate(recipe: TrainRecipe, shape: ModelShape) -> float | None:
    """What the last run like this one came to on this device; None where there was none.

    Args:
        recipe: with the engine that it has here.
        shape: of its base.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        rate = float(read_json(cache_folder() / _place(recipe, shape))["tokens_per_second"])
        return rate if rate > 0 else None
    return None


def note_rate(recipe: TrainRecipe, shape: ModelShape, tokens_per_second: float, steps: int) -> None:
    """Keep the rate of a run that is done; not that of a few steps, in which kernels are compiled.

    Args:
        recipe: see `known_rate`.
        steps: that it took.
    """
    if steps <= WARM_STEPS or tokens_per_second <= 0:
        return
    with suppress(OSError, RecipeError):  # the next plan says nothing of time
        made_in_cache(CACHE)
        write_json(cache_folder() / _place(recipe, shape), {"tokens_per_second": tokens_per_second, "steps": steps})


def _place(recipe: TrainRecipe, shape: ModelShape) -> Path:
    """Runs are alike that compute the same with batches of as many rows, however long they last."""
    engine, data, trainer = recipe.engine, recipe.data, recipe.trainer
    alike = {
        "layout": LAYOUT,
        "device": _device(),
        "shape": asdict(shape),
        "quant": recipe.quant.kind.name,
        "engine": asdict(engine),
        "lora": asdict(recipe.lora),
        "batches": [data.batching.name, data.max_tokens, trainer.batch_size, trainer.gradient_accumulation],
        "checkpointing": trainer.gradient_checkpointing,
    }
    name = sha256(json.dumps(alike, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return Path(CACHE) / f"{name}.json"


@cache
def _device() -> str:
    if not has_nvidia_gpu():
        return f"{platform.machine()}, {os.cpu_count()} cores"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
