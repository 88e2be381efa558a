"""A tiny base with rows to train on, and the command line run as a user would."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import build_tiny_model
from tests.warm_line import warm_line

WORDS = ["lamp", "door", "fan", "clock", "radio", "oven", "shade", "bell"]


def write_rows(path: Path, count: int, seed: int, head: str) -> None:
    """JSONL rows whose answers follow from their questions."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            word = draw.choice(WORDS)
            messages = [
                {"role": "user", "content": f"{head} {number}: {word}"},
                {"role": "assistant", "content": json.dumps({"do": word})},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Rows that the runs tokenize stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QLORA_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with `base/`, `train.jsonl` and `held_out.jsonl`."""
    folder = tmp_path_factory.mktemp("workshop")
    build_tiny_model("llama", folder / "base")
    write_rows(folder / "train.jsonl", 32, 1, "turn on")
    write_rows(folder / "held_out.jsonl", 6, 2, "please start")
    return folder


def train_line(workshop: Path, *more: str) -> list[str]:
    """The words of a short training run."""
    return [
        "train",
        f"model.source={workshop / 'base'}",
        "data=messages",
        f"data.train_file={workshop / 'train.jsonl'}",
        f"data.eval_file={workshop / 'held_out.jsonl'}",
        "data.max_tokens=128",
        "data.task=json_exact_match",
        "quant.compute_dtype=float32",
        "optim.learning_rate=1e-2",
        "lora.dropout=0.1",
        "trainer.batch_size=4",
        "trainer.max_steps=8",
        "trainer.save_every_steps=2",
        "trainer.gradient_checkpointing=false",
        *more,
    ]


def environment() -> dict[str, str]:
    """One thread."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def kit(folder: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `qlora-kit` in a folder."""
    return warm_line().run(words, folder, timeout)


def cold_kit(folder: Path, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The same in an interpreter of its own, as a user starts it: for what is said while libraries are imported."""
    command = [sys.executable, "-m", "qlora_kit", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def only_run(folder: Path) -> Path:
    """The one run directory below a folder's outputs."""
    (recipe,) = folder.glob("outputs/*/*/recipe.yaml")
    return recipe.parent
