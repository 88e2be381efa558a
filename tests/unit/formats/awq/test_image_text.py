"""AWQ of an image-text checkpoint: every reader leaves its tower as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T  # noqa: N812
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_kit.core.files import read_json
from qlora_kit.formats.awq.write import write_awq
from qlora_kit.schema.export import AwqTarget
from tests.tiny_models import build_tiny_image_text_model


@pytest.mark.slow
def test_towers_are_left_by_the_begin_of_their_names_and_in_the_midst(tmp_path: Path) -> None:
    folder, out = build_tiny_image_text_model(tmp_path / "base"), tmp_path / "awq"
    out.mkdir()
    write_awq(folder, out, AwqTarget(group_size=32), [list(range(5, 40))])
    left: list[str] = read_json(out / "config.json")["quantization_config"]["modules_to_not_convert"]
    config: Any = T.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = T.AutoModelForImageTextToText.from_config(config)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linears if ".layers." in name and "vision" not in name]
    outside = [name for name in linears if "vision" in name or "projector" in name]
    assert inside and outside
    assert all(should_convert_module(name, left) for name in inside)  # transformers
    assert not any(should_convert_module(name, left) for name in outside)
    assert all(any(part in name for part in left) for name in outside)  # vLLM, SGLang
    assert not any(part in name for name in inside for part in left)
