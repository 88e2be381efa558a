"""Flat buffers under accelerate, peft and DDP, which hold the tensors too."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model

from qlora_kit.training.optimizers.flat import flat
from tests.trained_weights import OPTIMIZERS, Weights, assert_equal, flat_pair, give, gradients, groups, train


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_schedules_and_accelerates_wrapper_reach_the_buffers(accelerator):
    """The wrapper loads the state that it has just read, and the schedule writes only the outer groups."""
    expected = Weights()
    plain = OPTIMIZERS["AdamW8bit"](groups(expected), lr=1e-2)
    found, optimizer = flat_pair()
    wrapped = accelerator.prepare(optimizer)
    for weights, used, target in ((expected, plain, plain), (found, wrapped, optimizer)):
        schedule = torch.optim.lr_scheduler.LambdaLR(target, lambda step: 1 / (1 + step))
        for step in range(6):
            used.zero_grad()
            give(weights, step)
            used.step()
            schedule.step()
    assert_equal(found, expected)


def test_an_adapter_of_views_is_saved_and_loaded_whole(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    settings = LoraConfig(r=64, target_modules=["0", "1"])
    model = get_peft_model(copy.deepcopy(base), settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = flat(OPTIMIZERS["AdamW8bit"](trained, lr=1e-2), model)
    model(torch.ones(3, 64)).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal(loaded, model)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.2 * 4 * sum(
        parameter.numel() for parameter in trained
    )

    model.load_adapter(tmp_path, "default")  # as a resumed run does
    assert len({parameter.untyped_storage().data_ptr() for parameter in trained}) == 1


@pytest.mark.parametrize("bucket_views", [False, True])
def test_ddp_keeps_its_own_gradients(bucket_views, tmp_path):
    expected = Weights()
    plain = OPTIMIZERS["AdamW8bit"](groups(expected), lr=1e-2)
    train(expected, plain, range(4), plain.zero_grad)

    found, optimizer = flat_pair()
    found.forward = lambda step: sum((found.get_parameter(name) * part).sum() for name, part in gradients(step).items())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(found, gradient_as_bucket_view=bucket_views)
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            wrapped.zero_grad()
            wrapped(step).backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(found, expected)
