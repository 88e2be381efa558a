"""A tiny base with an adapter, for tests to spoil."""

import shutil
from pathlib import Path

import pytest
import torch

from qlora_kit.export.merging.carry import PROCESSORS
from qlora_kit.schema.lora import LoraConfig
from tests.tiny_models import build_tiny_model
from tests.unit.export.merging.trained import Pair, draw_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("planted")
    base = build_tiny_model("llama", place / "base", dtype=torch.bfloat16)
    (base / "LICENSE.txt").write_text("terms")
    (base / "NOTICE").write_text("thanks")
    (base / "USE_POLICY.md").write_text("be kind")
    for name in PROCESSORS:
        (base / name).write_text('{"of": "an image"}')
    return Pair(base, draw_adapter(base, place / "adapter", LoraConfig(r=4)))


@pytest.fixture
def pair(made: Pair, tmp_path: Path) -> Pair:
    """Copies that a test may spoil."""
    return Pair(shutil.copytree(made.base, tmp_path / "base"), shutil.copytree(made.adapter, tmp_path / "adapter"))
