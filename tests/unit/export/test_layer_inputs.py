"""Where float32 products may use a GPU's tensor cores while a model is observed."""

import pytest
import torch

from qlora_kit.export.layer_inputs import tensor_cores


@pytest.mark.parametrize(("device", "within"), [("cpu", "highest"), ("cuda", "high")])
def test_products_are_less_fine_on_a_gpu_only_and_only_within(device: str, within: str) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), tensor_cores(torch.device(device)):
        assert torch.get_float32_matmul_precision() == within
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
