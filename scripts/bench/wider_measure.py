"""How far a merged folder is from the model that was trained, and how far bf16 alone would take it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qlora_kit.adapter.expert_lora import ExpertLora
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Scores, gather_scores, kl_divergence, predicted_positions
from qlora_kit.model.stacked_experts import StackedExperts, experts_of
from qlora_kit.model.unfused_experts import fused_experts, unfuse_experts

TOP = 256
JUMP = 0.1  # of a token's shares
_BLOCK, _MOST = 32, 127  # of Q8_0
_STAY = ("router", "gate.weight", "conv1d")  # what llama.cpp leaves in 16 or 32 bit
Choices = tuple[Tensor, Tensor]  # experts of each token, and their shares; both [tokens, choices]
Routes = list[list[Choices]]  # by row, by layer


@dataclass(frozen=True)
class Said:
    """What a model says on rows, and which experts it chooses."""

    logprobs: list[Tensor]
    routes: Routes


@dataclass(frozen=True)
class Distance:
    """From the trained model.

    Attributes:
        flipped: choices of an expert that the trained model does not make.
        jumped: choices that both make, with shares that differ by more than a tenth of the token's.
        choices: of both models.
    """

    mean_kl: float
    max_kl: float
    positions: int
    flipped: int
    jumped: int
    choices: int


@torch.no_grad()
def say(model: Any, rows: Sequence[TokenRow], forced: Routes | None = None) -> Said:
    """Run each row alone.

    Args:
        forced: choices to take instead of the model's own.
    """
    logprobs, routes = [], []
    ours: list[nn.Module] = [module for module in model.modules() if isinstance(module, StackedExperts)]
    holders = ours or list(experts_of(model).values())
    for number, row in enumerate(rows):
        found: list[Choices] = []
        with ExitStack() as hooks:
            for layer, holder in enumerate(holders):
                given = forced[number][layer] if forced else None
                hooks.enter_context(_noted(holder, found, given))
            logits = model(input_ids=torch.tensor([list(row.input_ids)]), use_cache=False).logits[0]
        before = [position - 1 for position in predicted_positions(row)]
        logprobs.append(torch.log_softmax(logits[before].float(), -1))
        routes.append(found)
    return Said(logprobs, routes)


@contextmanager
def _noted(holder: nn.Module, found: list[Choices], given: Choices | None) -> Iterator[None]:
    def note(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *chosen = arguments
        experts, shares = given or chosen
        found.append((experts.clone(), shares.float().clone()))
        return hidden, experts, shares

    hook = holder.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def distance(rows: Sequence[TokenRow], trained: Said, other: Said) -> Distance:
    """Of another model, or the same with other weights, on the same rows."""
    reference = _scores(rows, trained, None)
    kl = kl_divergence(reference, _scores(rows, other, reference.ids))
    flipped = jumped = choices = 0
    for row, other_row in zip(trained.routes, other.routes, strict=True):
        for (experts, shares), (others, their_shares) in zip(row, other_row, strict=True):
            same = experts[:, :, None] == others[:, None, :]
            apart = (shares[:, :, None] - their_shares[:, None, :]).abs() > JUMP * shares.sum(-1)[:, None, None]
            flipped += int((~same.any(-1)).sum())
            jumped += int((same & apart).sum())
            choices += experts.numel()
    return Distance(float(kl.mean()), float(kl.max()), len(kl), flipped, jumped, choices)


def _scores(rows: Sequence[TokenRow], said: Said, ids: Tensor | None) -> Scores:
    return gather_scores(zip(rows, said.logprobs, strict=True), ids, TOP)


@torch.no_grad()
def weights_as_trained(trained: Any) -> dict[str, Tensor]:
    """Every weight of the trained model in fp32, with its update, by the name in transformers' own class."""
    model = trained.get_base_model()
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            continue
        holder, _, leaf = name.rpartition(".")
        below = model.get_submodule(holder)
        is_stack = isinstance(below, StackedExperts) and leaf in below.stacks
        found[_plain(name)] = (below.stack(leaf).unpack(torch.float32) if is_stack else weight).detach().float().clone()
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertLora):
            a, b, scaling = layer.update("default")
            update = scaling * (b.float() @ a.float())
            below = layer
            while isinstance(below, ExpertLora):
                below = below.base_layer
            place = f"{_plain(name)}.{layer.parameter_name}"
            found[place] += update.transpose(1, 2) if below.transposed else update
        elif isinstance(layer, LoraLayer):
            found[f"{_plain(name)}.weight"] += layer.get_delta_weight("default").float()
    return found


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def near_bf16(weight: Tensor, seed: int) -> Tensor:
    """A weight with noise as large as its rounding to bf16 makes; unchanged where bf16 holds it."""
    step = torch.exp2(torch.floor(torch.log2(weight.abs().clamp_min(1e-30))) - 7)
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    exact = weight.to(torch.bfloat16).float()
    return weight if torch.equal(exact, weight) else weight + noise * step


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> None:
    """Give a model changed weights, in place."""
    for name, weight in model.named_parameters():
        weight.copy_(change(weights[name]))


@torch.no_grad()
def as_q8_0(model: Any) -> None:
    """Round a model's matrices to Q8_0 and the inputs of its linear maps likewise, as llama.cpp multiplies on a CPU."""
    splits = {f".{name}": form.is_gated for name, _, form in fused_experts(model)}
    unfuse_experts(model, "", splits)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and not any(part in name for part in _STAY):
            weight.copy_(q8_0(weight))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in f"{name}.weight" for part in _STAY):
            module.register_forward_pre_hook(lambda _, arguments: (q8_0(arguments[0]), *arguments[1:]))


def q8_0(values: Tensor) -> Tensor:
    """The nearest values with 8 bits and a half-precision scale for 32; as they are where 32 does not divide a row."""
    if values.shape[-1] % _BLOCK:
        return values
    blocks = values.float().reshape(*values.shape[:-1], -1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / _MOST
    codes = (blocks / scale.clamp_min(1e-30)).round()
    return (codes * scale.half().float()).reshape(values.shape)
