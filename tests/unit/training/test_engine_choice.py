"""What engine.mode=auto comes to, and that it says why."""

import re
from dataclasses import replace

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.engine.ops.limits import AMPERE
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.engine_choice import with_engine

AUTO = TrainRecipe(engine=EngineConfig(mode=EngineMode.auto))


@pytest.mark.parametrize("gpu", [AMPERE, (8, 9), (9, 0), (12, 0)])
def test_it_is_fast_on_a_gpu_that_has_the_kernels(gpu):
    recipe, line = with_engine(AUTO, gpu)
    assert recipe == replace(AUTO, engine=EngineConfig(mode=EngineMode.fast)) and not line


@pytest.mark.parametrize(
    ("gpu", "changed", "why"),
    [
        (None, {}, "there is no GPU"),
        ((7, 5), {}, "the GPU's compute capability is 7.5, and fast kernels need 8.0"),
        (AMPERE, {"lora": LoraConfig(dropout=0.05)}, "lora.dropout=0.05 is drawn by peft's own layers"),
        (AMPERE, {"quant": QuantConfig(compute_dtype=ComputeDtype.float32)}, "fast kernels work in 16 bit"),
    ],
)
def test_it_is_plain_elsewhere_and_says_why(gpu, changed, why):
    recipe, line = with_engine(replace(AUTO, **changed), gpu)
    assert recipe.engine.mode is EngineMode.plain and recipe == replace(AUTO, **changed, engine=recipe.engine)
    assert line.startswith("engine: plain, by engine.mode=auto: ") and why in line
    asked = replace(AUTO, **changed, engine=EngineConfig(mode=EngineMode.auto, compute=Compute.fp8))
    with pytest.raises(RecipeError, match=re.escape(f"engine.mode=auto is plain: {line.rpartition('auto: ')[2]}")):
        with_engine(asked, gpu)


@pytest.mark.parametrize("mode", [EngineMode.plain, EngineMode.fast])
@pytest.mark.parametrize("gpu", [None, (9, 0)])
def test_an_engine_that_is_named_stays(mode, gpu):
    recipe = TrainRecipe(engine=EngineConfig(mode=mode))
    assert with_engine(recipe, gpu) == (recipe, "")
