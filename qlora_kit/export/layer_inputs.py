"""What flows through a model's layers: the inputs of the first, then layer by layer the statistics of every linear."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Call:
    """One calibration row on its way: hidden states float32 [1, tokens, width], and what each layer is also given."""

    hidden: Tensor
    arguments: list[dict[str, object]] = field(default_factory=list)


@dataclass
class ActivationStats:
    """What linear layers that share an input saw: their names, who made it, and its statistics.

    `magnitude` is the mean absolute value, [width]; `moment` is X^T X / tokens, [width, width]; both float32.
    """

    linears: list[str]
    norm: str | None
    magnitude: Tensor
    moment: Tensor
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Count rows of inputs in."""
        self.magnitude += rows.abs().sum(0)
        self.moment += rows.T @ rows
        self.tokens += len(rows)

    def finish(self) -> None:
        """Turn the sums into means; nothing is added after it."""
        self.magnitude /= self.tokens
        self.moment /= self.tokens


class _StandIn(nn.Module):
    """Stands in a layer's place: hands on what `answer` makes of the hidden states and the other arguments."""

    def __init__(self, layer: nn.Module, answer: Callable[[Tensor, dict[str, object]], Tensor]) -> None:
        super().__init__()
        # A tuple hides the layer from nn.Module, so that moving the model does not move it.
        self.stands_for = (layer,)
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"][0], name)

    def forward(self, hidden_states: Tensor, *_: object, **arguments: object) -> Tensor:
        return self.answer(hidden_states, arguments)


def decoder_layers(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of a model's layers and its dotted name."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


@contextmanager
def layers_answered(layers: nn.ModuleList, answer: Callable[[Tensor, dict[str, object]], Tensor]) -> Iterator[None]:
    """Have a function answer in place of every layer: of the hidden states it is given and the other arguments."""
    real = list(layers)
    for index, layer in enumerate(real):
        layers[index] = _StandIn(layer, answer)
    try:
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer


def first_inputs(model: "PreTrainedModel", rows: Sequence[Sequence[int]], device: torch.device) -> list[Call]:
    """Run embeddings, masks and positions for token-id rows, without computing a layer."""
    calls: list[Call] = []
    _, layers = decoder_layers(model)

    def keep(hidden: Tensor, arguments: dict[str, object]) -> Tensor:
        calls[-1].hidden = hidden
        calls[-1].arguments.append(arguments)
        return hidden

    with layers_answered(layers, keep):
        base = model.base_model.to(device=device, dtype=torch.float32)
        for row in rows:
            calls.append(Call(torch.empty(0)))
            base(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    return calls


def run_layer(layer: nn.Module, call: Call, index: int) -> Tensor:
    """A layer's output hidden states for one row."""
    made = layer(call.hidden, **call.arguments[index])
    hidden: Tensor = made[0] if isinstance(made, tuple) else made
    return hidden


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Let float32 products on a GPU round their factors to 10 bits, several times as fast; elsewhere nothing changes.

    Finer than the bfloat16 in which such a model is served, and the statistics are sums over thousands of tokens.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def layer_stats(layer: nn.Module, calls: Sequence[Call], index: int) -> tuple[list[ActivationStats], list[Tensor]]:
    """Run a layer over all rows.

    Returns:
        a reading for each distinct input of its linear layers, and the output hidden states of each row.
    """
    readings: dict[str, ActivationStats] = {}
    watch = _Watch(readings)
    handles = watch.attach(layer)
    try:
        outputs = []
        with tensor_cores(calls[0].hidden.device):
            for call in calls:
                watch.start_row()
                outputs.append(run_layer(layer, call, index))
    finally:
        for handle in handles:
            handle.remove()
    for reading in readings.values():
        reading.finish()
    return list(readings.values()), outputs


class _Watch:
    """Hooks that tell which linear layers read the same tensor, and which norm made it."""

    def __init__(self, readings: dict[str, ActivationStats]) -> None:
        self.readings = readings
        self.start_row()

    def start_row(self) -> None:
        # Tensors are held so that an id is not used again within a row.
        self.made: dict[int, tuple[str, Tensor]] = {}
        self.read: dict[int, tuple[str, Tensor]] = {}

    def attach(self, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._linear_hook(name)))
            elif "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
                handles.append(module.register_forward_hook(self._norm_hook(name)))
        return handles

    def _norm_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self.made[id(output)] = (name, output)

        return hook

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given = inputs[0]
            leader = self.read.setdefault(id(given), (name, given))[0]
            if leader != name:
                if name not in self.readings[leader].linears:
                    self.readings[leader].linears.append(name)
                return
            rows = given.detach().reshape(-1, given.shape[-1]).float()
            if name not in self.readings:
                width = rows.shape[1]
                norm = self.made.get(id(given), (None, given))[0]
                self.readings[name] = ActivationStats([name], norm, rows.new_zeros(width), rows.new_zeros(width, width))
            self.readings[name].add(rows)

        return hook
