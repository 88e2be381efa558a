"""Memory by part, against sums done by hand and against what autograd really keeps."""

import math

import pytest

from qlora_kit.memory.estimate import estimate, layer_bytes_per_token, state_bytes_per_weight
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.trainer import TrainerConfig

LLAMA_8B = ModelShape(4096, 14336, 32, 32, 8, 128, 128256, False)
LINEAR_WEIGHTS_8B = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # 6.98 B
REST_8B = 2 * 128256 * 4096 + 65 * 4096  # embedding, head, 65 norms


def of_8b(
    quant: QuantConfig | None = None,
    lora: LoraConfig | None = None,
    optim: OptimConfig | None = None,
    trainer: TrainerConfig | None = None,
):
    parts = (quant or QuantConfig(), lora or LoraConfig(), optim or OptimConfig(), trainer or TrainerConfig())
    return estimate(LLAMA_8B, *parts, tokens=4 * 2048)


def test_4bit_state_is_the_papers_half_bit_and_eighth_of_a_bit():
    assert state_bytes_per_weight(double_quant=False) * 8 == 0.5
    assert round(state_bytes_per_weight(double_quant=True) * 8, 3) == 0.127


def test_nf4_weights_of_an_8b_model():
    memory = of_8b()
    assert memory.frozen == 8_030_261_248  # the published number of parameters
    assert memory.frozen_linears == LINEAR_WEIGHTS_8B / 2
    assert memory.quant_state == pytest.approx(LINEAR_WEIGHTS_8B * (1 / 64 + 4 / 16384))
    assert memory.frozen_rest == 2 * REST_8B
    assert memory.weights == memory.frozen_linears + memory.quant_state + memory.frozen_rest


def test_without_double_quantization_the_scales_take_four_times_as_much():
    assert of_8b(QuantConfig(double_quant=False)).quant_state == LINEAR_WEIGHTS_8B / 16


def test_int8_takes_a_byte_and_a_scale_for_each_row():
    memory = of_8b(QuantConfig(kind=QuantKind.int8))
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert memory.frozen_linears == LINEAR_WEIGHTS_8B
    assert memory.quant_state == 4 * rows
    assert memory.workspace == 0


def test_unquantized_weights_take_two_bytes_and_four_in_float32():
    memory = of_8b(QuantConfig(kind=QuantKind.none))
    assert (memory.frozen_linears, memory.quant_state, memory.weights) == (0, 0, 2 * 8_030_261_248)
    wide = of_8b(QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32))
    assert wide.weights == 4 * 8_030_261_248


def test_a_module_kept_in_16_bit_moves_from_the_linears_to_the_rest():
    kept = of_8b(QuantConfig(keep_16bit=["down_proj"]))
    moved = 32 * 4096 * 14336
    assert kept.frozen_linears == (LINEAR_WEIGHTS_8B - moved) / 2
    assert kept.frozen_rest == 2 * (REST_8B + moved)


def test_an_adapter_of_rank_16_on_every_linear_of_an_8b_model():
    memory = of_8b()
    assert memory.trainable == 41_943_040
    assert memory.adapter == memory.gradients == 4 * 41_943_040


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OptimizerName)
def test_an_optimizer_has_the_state_that_its_library_makes(name):
    """Counted after a real step, in the optimizer that transformers builds by that name."""
    memory = of_8b(optim=OptimConfig(name=name))
    assert memory.optimizer / memory.trainable == pytest.approx(_state_made(name.value.built_as))


def _state_made(built_as: str) -> float:
    """Bytes for each weight; a paged optimizer without a GPU has the state of its twin that is not paged."""
    import torch
    from transformers import Trainer, TrainingArguments

    weight = torch.nn.Linear(256, 256, bias=False)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=built_as))
    optimizer = kind(weight.parameters(), **settings)
    weight(torch.ones(256)).sum().backward()
    optimizer.step()
    # the scales of 8-bit state, tables and a step counter, 1.6% or less, are left out
    state = (made for made in optimizer.state[weight.weight].values() if isinstance(made, torch.Tensor))
    return sum(tensor.nbytes for tensor in state if tensor.numel() >= weight.weight.numel()) / weight.weight.numel()


def test_checkpointing_keeps_one_hidden_state_a_layer_and_one_whole_layer():
    tokens = 4 * 2048
    layer = layer_bytes_per_token(LLAMA_8B, LoraConfig())
    assert of_8b().activations == 32 * 2 * 4096 * tokens + layer * tokens
    assert of_8b(trainer=TrainerConfig(gradient_checkpointing=False)).activations == 32 * layer * tokens


def test_total_is_the_sum_of_its_parts():
    memory = of_8b()
    parts = [memory.frozen_linears, memory.quant_state, memory.frozen_rest, memory.adapter, memory.gradients]
    parts += [memory.optimizer, memory.activations, memory.loss, memory.workspace]
    assert math.isclose(memory.total, sum(parts))


@pytest.mark.parametrize("targets", [["all_linear"], ["q_proj", "v_proj"]])
def test_a_layer_keeps_what_autograd_keeps(targets):
    """Counted on a real step: transformers' Llama, peft's LoRA in fp32, bf16 autocast, no checkpointing."""
    shape = ModelShape(256, 896, 2, 4, 2, 64, 320, False)
    # what two further layers keep for 256 further tokens: copies of weights, which do not grow with tokens, drop out
    counted = _layers_keep(shape, targets, 512) - _layers_keep(shape, targets, 256)
    assert layer_bytes_per_token(shape, LoraConfig(targets=targets)) == pytest.approx(counted / 2 / 256, rel=0.04)


def _layers_keep(shape: ModelShape, targets: list[str], tokens: int) -> int:
    return _saved_bytes(shape, 3, targets, tokens) - _saved_bytes(shape, 1, targets, tokens)


def _saved_bytes(shape: ModelShape, layers: int, targets: list[str], tokens: int) -> int:
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    modules = "all-linear" if targets == ["all_linear"] else targets
    # the smallest rank, so that the products of A and B hardly count
    model = get_peft_model(base, PeftLora(r=1, target_modules=modules, task_type="CAUSAL_LM"))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    row = torch.randint(0, shape.vocab_size, (1, tokens))
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16):
        model.base_model.model.model(row, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
