"""What a library's folder changed, told from what it only wrote in another dtype."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.core.errors import RunError
from qlora_kit.export.changed import changed_tensors

SOURCE = {
    "block.k.bias": torch.ones(2, dtype=torch.bfloat16),
    "block.k.weight": torch.full((2, 4), 1.5, dtype=torch.bfloat16),
    "block.norm.weight": torch.full((4,), 0.5, dtype=torch.bfloat16),
    "head.weight": torch.full((3, 4), 0.25, dtype=torch.bfloat16),
}
WIDENED = {name: tensor.float() for name, tensor in SOURCE.items()}


def changed(
    tmp_path: Path, made: dict[str, torch.Tensor], *marks: str, source: dict[str, torch.Tensor] = SOURCE
) -> dict[str, dict[str, torch.Tensor]]:
    for name, tensors in (("source", source), ("made", made)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return changed_tensors(tmp_path / "source", tmp_path / "made", marks)


def test_a_packed_layer_gives_its_weight_up_and_keeps_its_bias(tmp_path: Path) -> None:
    made = WIDENED | {"block.k.weight_packed": torch.ones(2, 1), "block.k.weight_scale": torch.ones(2, 1)}
    del made["block.k.weight"]
    found = changed(tmp_path, made, "weight_scale")
    assert {source: set(new) for source, new in found.items()} == {
        "block.k.weight": {"block.k.weight_packed", "block.k.weight_scale"}
    }


def test_a_weight_that_keeps_its_name_takes_its_scales_along(tmp_path: Path) -> None:
    made = WIDENED | {"block.k.weight": torch.ones(2, 4, dtype=torch.int8), "block.k.weight.absmax": torch.ones(2)}
    found = changed(tmp_path, made, "weight.absmax")
    assert set(found) == {"block.k.weight"}
    assert found["block.k.weight"]["block.k.weight"].dtype == torch.int8
    assert set(found["block.k.weight"]) == {"block.k.weight", "block.k.weight.absmax"}


def test_a_new_value_comes_in_the_source_dtype(tmp_path: Path) -> None:
    made = WIDENED | {"block.k.weight_scale": torch.ones(2, 1), "block.norm.weight": torch.full((4,), 0.7)}
    found = changed(tmp_path, made, "weight_scale")
    assert set(found) == {"block.k.weight", "block.norm.weight"}
    norm = found["block.norm.weight"]["block.norm.weight"]
    assert norm.dtype == torch.bfloat16
    assert norm[0] == torch.tensor(0.7).bfloat16()


def test_what_a_library_only_narrowed_keeps_the_bytes_of_the_source(tmp_path: Path) -> None:
    decays = {"block.decay": torch.tensor([0.1, 2.3])}
    made = SOURCE | {"block.decay": decays["block.decay"].bfloat16(), "block.k.weight_scale": torch.ones(2, 1)}
    assert set(changed(tmp_path, made, "weight_scale", source=SOURCE | decays)) == {"block.k.weight"}


def test_a_scale_of_no_layer_goes_with_its_block(tmp_path: Path) -> None:
    made = WIDENED | {"block.k.weight_scale": torch.ones(2, 1), "block.v_scale": torch.ones(1)}
    found = changed(tmp_path, made, "weight_scale")
    assert set(found) == {"block.k.weight", "block.k.bias"}
    assert set(found["block.k.bias"]) == {"block.k.bias", "block.v_scale"}
    assert torch.equal(found["block.k.bias"]["block.k.bias"], SOURCE["block.k.bias"])


def test_a_tensor_of_no_block_is_an_error(tmp_path: Path) -> None:
    made = WIDENED | {"block.k.weight_scale": torch.ones(2, 1), "elsewhere.scale": torch.ones(1)}
    with pytest.raises(RunError, match=r"elsewhere\.scale, which has no place in the source"):
        changed(tmp_path, made, "weight_scale")


def test_a_folder_with_no_quantized_layer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no layer of source was quantized"):
        changed(tmp_path, WIDENED, "weight_scale")
