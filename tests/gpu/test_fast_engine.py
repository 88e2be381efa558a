"""On a GPU the fast engine's gradients are as near to exact ones as peft's, for every family and policy."""

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.model.load import load_base
from qlora_kit.objectives.sft.collate import Collator, feature
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from tests.drawn_rows import drawn_rows
from tests.tiny_models import FAMILIES, WIRED, build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FAST = EngineConfig(mode=EngineMode.fast)


@pytest.fixture(scope="module", params=[*FAMILIES, *WIRED])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param) / "base"
    return build_tiny_model(request.param, place, spread=0.05, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    rows = drawn_rows(tmp_path_factory.mktemp("rows") / "store", [93, 41, 70, 12], seed=3)
    parts = Collator(0)([feature(rows, [index]) for index in range(4)])
    return {name: part.to("cuda") for name, part in parts.items()}


def load(folder, dtype):
    model = attach_lora(load_base(folder, QuantConfig(compute_dtype=dtype)), LoraConfig(r=16, alpha=16)).train()
    train_in_fp32(model)
    generator = torch.Generator().manual_seed(1)
    for name, part in model.named_parameters():
        if part.requires_grad:
            spread = 0.05 if "lora_B" in name else 1 / part.shape[-1] ** 0.5
            part.data = (spread * torch.randn(part.shape, generator=generator)).to(part.device)
    return model


def gradients(model, batch, dtype):
    model.zero_grad()
    batch = dict(batch)
    labels = batch.pop("labels")
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is ComputeDtype.bfloat16):
        logits = model(**batch, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return torch.cat([part.grad.float().flatten() for part in model.parameters() if part.requires_grad])


def error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_gradients_are_as_near_to_exact_ones_as_plain_ones(folder, batch):
    exact = gradients(load(folder, ComputeDtype.float32), batch, ComputeDtype.float32)
    model = load(folder, ComputeDtype.bfloat16)
    plain = gradients(model, batch, ComputeDtype.bfloat16)
    engine = patch_model(model, FAST)
    assert engine.fast_layers == len(engine.layers) > 0
    fast = gradients(model, batch, ComputeDtype.bfloat16)
    print(f"\n{folder.parent.name}: plain {error(plain, exact):.5f}, fast {error(fast, exact):.5f} from fp32")
    assert error(fast, exact) < 1.05 * error(plain, exact)
    for policy in (1, 2, 3, 4):
        engine.set_policies([policy] * len(engine.layers))
        assert error(gradients(model, batch, ComputeDtype.bfloat16), fast) < 1e-3
    engine.undo()
    torch.testing.assert_close(gradients(model, batch, ComputeDtype.bfloat16), plain)


@pytest.mark.parametrize(("compute", "most"), [(Compute.fp8_backward, 0.1), (Compute.fp8, 0.2)])
def test_fp8_moves_gradients_by_rounding_only(tmp_path, batch, compute, most):
    folder = build_tiny_model("llama", tmp_path / "base", spread=0.05, dtype=torch.bfloat16)
    model = load(folder, ComputeDtype.bfloat16)
    plain = gradients(model, batch, ComputeDtype.bfloat16)
    patch_model(model, EngineConfig(mode=EngineMode.fast, compute=compute))
    found = error(gradients(model, batch, ComputeDtype.bfloat16), plain)
    print(f"\n{compute.name}: {found:.4f} from bf16")
    assert 0.01 < found < most
