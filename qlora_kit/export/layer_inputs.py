"""What flows through a model's layers: the inputs of the first, then layer by layer the statistics of every linear."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_kit.model.structure import layers_of
from qlora_kit.model.unfused_experts import UnfusedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Arguments(NamedTuple):
    """What a layer is given beside hidden states, by place and by name."""

    places: tuple[object, ...]
    names: dict[str, object]


Answer = Callable[[Tensor, Arguments], Tensor]


@dataclass
class Call:
    """One calibration row on its way.

    Attributes:
        hidden: float32 [1, tokens, width].
        arguments: what each layer is given beside it.
        in_tuple: whether the model takes apart what a layer gives it.
    """

    hidden: Tensor
    arguments: list[Arguments] = field(default_factory=list)
    in_tuple: bool = False


_MATRIX_AXES = 2


@dataclass
class ActivationStats:
    """What linear layers that share an input saw: their names, who made it, and its statistics.

    `magnitude` is the mean absolute value, [width]; `moment` is X^T X / tokens, [width, width]; both float32. `others`
    are modules that read this input too and are no linear layers: routers, and mixtures whose experts read rows of it.
    """

    linears: list[str]
    norm: str | None
    magnitude: Tensor
    moment: Tensor
    tokens: int = 0
    others: list[str] = field(default_factory=list)

    def add(self, rows: Tensor) -> None:
        """Count rows of inputs in."""
        self.magnitude += rows.abs().sum(0)
        self.moment += rows.T @ rows
        self.tokens += len(rows)

    def finish(self) -> None:
        """Turn the sums into means; nothing is added after it."""
        self.magnitude /= max(1, self.tokens)
        self.moment /= max(1, self.tokens)


class _StandIn(nn.Module):
    """Stands in a layer's place: hands on what `answer` makes of the hidden states and the other arguments."""

    def __init__(self, layer: nn.Module, answer: Answer, in_tuple: bool) -> None:
        super().__init__()
        # A tuple hides the layer from nn.Module, so that moving the model does not move it.
        self.stands_for = (layer,)
        self.answer = answer
        self.in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"][0], name)

    def forward(self, hidden_states: Tensor, *places: object, **names: object) -> Tensor | tuple[Tensor, None]:
        hidden = self.answer(hidden_states, Arguments(places, names))
        return (hidden, None) if self.in_tuple else hidden


def decoder_layers(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of a language model's layers and its dotted name.

    Raises:
        ValueError: the model has none.
    """
    decoder = model.get_decoder()
    inner, count = layers_of(decoder)
    layers = decoder.get_submodule(inner)
    if not count or not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return next((name, layers) for name, module in model.named_modules() if module is layers)


@contextmanager
def layers_answered(layers: nn.ModuleList, answer: Answer, *, in_tuple: bool) -> Iterator[None]:
    """Have a function answer in place of every layer: of the hidden states it is given and the other arguments.

    Args:
        in_tuple: whether the model expects a second value, such as weights of the attention, which is none then.
    """
    real = list(layers)
    for index, layer in enumerate(real):
        layers[index] = _StandIn(layer, answer, in_tuple)
    try:
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer


def first_inputs(model: "PreTrainedModel", rows: Sequence[Sequence[int]], device: torch.device) -> list[Call]:
    """Run embeddings, masks and positions for token-id rows, without computing a layer."""
    try:
        return _first_inputs(model, rows, device, in_tuple=False)
    except (ValueError, TypeError):  # a tensor cannot be taken for two values, or its row was taken for the first
        return _first_inputs(model, rows, device, in_tuple=True)


def _first_inputs(
    model: "PreTrainedModel", rows: Sequence[Sequence[int]], device: torch.device, *, in_tuple: bool
) -> list[Call]:
    calls: list[Call] = []
    _, layers = decoder_layers(model)

    def keep(hidden: Tensor, arguments: Arguments) -> Tensor:
        if not calls[-1].arguments:
            calls[-1].hidden = hidden
        elif hidden.ndim < calls[-1].hidden.ndim:
            raise TypeError("the model takes the first of what a layer gives it")
        calls[-1].arguments.append(arguments)
        return hidden

    with layers_answered(layers, keep, in_tuple=in_tuple):
        base = model.get_decoder().to(device=device, dtype=torch.float32)
        for row in rows:
            calls.append(Call(torch.empty(0), in_tuple=in_tuple))
            base(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
    return calls


def run_layer(layer: nn.Module, call: Call, index: int) -> Tensor:
    """A layer's output hidden states for one row."""
    places, names = call.arguments[index]
    made = layer(call.hidden, *places, **names)
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


def _memory(tensor: Tensor) -> tuple[int, int, int]:
    """Where a tensor's values lie: the same for one seen in another shape, as mixtures of experts see theirs."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


class _Watch:
    """Hooks that tell which linear layers read the same tensor, and which norm made it."""

    def __init__(self, readings: dict[str, ActivationStats]) -> None:
        self.readings = readings
        self.start_row()

    def start_row(self) -> None:
        # Tensors are held so that their memory is not used again within a row.
        self.made: dict[tuple[int, int, int], tuple[str, Tensor]] = {}
        self.read: dict[tuple[int, int, int], tuple[str, Tensor]] = {}

    def attach(self, layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._reader_hook(name, is_linear=True)))
            elif "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
                handles.append(module.register_forward_hook(self._norm_hook(name)))
            elif isinstance(module, UnfusedExperts) or _is_matrix(module):
                handles.append(module.register_forward_pre_hook(self._reader_hook(name, is_linear=False)))
        return handles

    def _norm_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if len(inputs) == 1:  # a norm that reads a gate too is no gain alone
                self.made[_memory(output)] = (name, output)

        return hook

    def _reader_hook(self, name: str, *, is_linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given = inputs[0]
            leader = self.read.setdefault(_memory(given), (name, given))[0]
            if leader not in self.readings:
                width = given.shape[-1]
                norm = self.made.get(_memory(given), (None, given))[0]
                self.readings[leader] = ActivationStats([], norm, given.new_zeros(width), given.new_zeros(width, width))
            reading = self.readings[leader]
            readers = reading.linears if is_linear else reading.others
            if name not in readers:
                readers.append(name)
            if leader == name:
                reading.add(given.detach().reshape(-1, given.shape[-1]).float())

        return hook


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a matrix of its own, as routers do."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == _MATRIX_AXES and not isinstance(module, nn.Embedding)
