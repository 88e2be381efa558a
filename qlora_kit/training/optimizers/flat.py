"""bitsandbytes' optimizers over one buffer, where they would be called once for each of hundreds of small tensors.

bitsandbytes 0.50 launches a kernel for every trained tensor and waits for the device after each: 40 to 59 ms a step
for the 448 LoRA tensors of an 8B model on an H100. Here the tensors become views of one buffer, and the same optimizer
updates the buffer in one call. The numbers stay the same: 8-bit state is quantized in blocks of 256 values, every
tensor begins at a multiple of 256, and the zeros between tensors change no block's scale.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.optim import AdEMAMix, GlobalOptimManager
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_kit.core.errors import RunError

BLOCK = 256  # values that share one scale in bitsandbytes' 8-bit state
LONE = 1 << 24  # weights from which a tensor keeps its own memory: its kernel is long, and a second copy would be large
LIMIT = 1 << 30  # weights in a buffer; bitsandbytes counts them in 32 bits
TABLES = ("qmap1", "qmap2")  # of the state, but the same in every run
OTHER_RECIPE = "resume with the recipe and the version that wrote the checkpoint, or start a new run"


def flat(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over flat buffers if it is one of bitsandbytes, or else itself.

    LAMB and LARS stay as they are: they scale each tensor's update by the tensor's norm. So does AdEMAMix, which keeps
    two averages in one state: on a GPU a tensor whose size is no multiple of 256 came out otherwise over flat buffers.
    """
    if not isinstance(optimizer, Optimizer8bit) or isinstance(optimizer, AdEMAMix) or optimizer.args.max_unorm:
        return optimizer
    return FlatOptimizer(optimizer, model.named_parameters())


@dataclass(frozen=True)
class _Kind:
    """What the tensors of one buffer have in common."""

    group: int
    bits: int
    device: torch.device
    dtype: torch.dtype


class _Buffer:
    """Trained tensors in a row, their gradients in another, and the optimizer of the row."""

    def __init__(self, kind: _Kind, names: list[str], parameters: list[torch.nn.Parameter]) -> None:
        self.kind = kind
        self.names = names
        self.parameters = parameters
        self.optimizer: Any = None
        self.lone = parameters[0].numel() >= LONE
        if self.lone:
            self.flat = parameters[0]
            return
        size = sum(map(_padded, parameters))
        self.flat = torch.nn.Parameter(torch.zeros(size, dtype=kind.dtype, device=kind.device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.places = list(self._views(self.flat.data))
        self.slots = list(self._views(self.flat.grad))
        self.take_weights()
        for parameter, slot in zip(parameters, self.slots, strict=True):
            if parameter.grad is not None:
                slot.copy_(parameter.grad)
            parameter.grad = slot

    def _views(self, row: torch.Tensor) -> Iterator[torch.Tensor]:
        start = 0
        for parameter in self.parameters:
            yield row[start : start + parameter.numel()].view(parameter.shape)
            start += _padded(parameter)

    def take_weights(self) -> None:
        """Make every tensor a view again, with the values that it has now."""
        if self.lone:
            return
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.data)
                parameter.data = place

    def take_gradients(self) -> bool:
        """Bring gradients that autograd or DDP made elsewhere into the row; False where there is none at all."""
        if self.lone:
            return self.flat.grad is not None
        gradients = [parameter.grad for parameter in self.parameters]
        if all(gradient is None for gradient in gradients):
            return False
        found = list(zip(self.slots, gradients, strict=True))
        elsewhere = [(slot, gradient) for slot, gradient in found if gradient is not None and gradient is not slot]
        if elsewhere:
            torch._foreach_copy_([slot for slot, _ in elsewhere], [gradient for _, gradient in elsewhere])
        absent = [slot for slot, gradient in found if gradient is None]
        if absent:
            torch._foreach_zero_(absent)
        return True

    def zero_gradients(self) -> None:
        """Zero the row in place, and let backward add to it."""
        if self.lone:
            self.flat.grad = None
            return
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        for parameter, slot in zip(self.parameters, self.slots, strict=True):
            parameter.grad = slot

    def layout(self) -> dict[str, Any]:
        """What the state of this buffer is of, in plain values."""
        sizes = [list(parameter.shape) for parameter in self.parameters]
        return {"bits": self.kind.bits, "names": self.names, "shapes": sizes}

    def state(self) -> dict[str, Any]:
        """The optimizer's state by name; empty before the first step."""
        held = self.optimizer.state.get(self.flat, {})
        return {name: value for name, value in held.items() if name not in TABLES}

    def load(self, state: dict[str, Any]) -> None:
        """Take a saved state into memory of the optimizer's own kind, which may be paged."""
        self.optimizer.state.pop(self.flat, None)
        if not state:
            return
        self.optimizer.init_state(self.optimizer.param_groups[0], self.flat, 0, 0)
        if self.flat.is_cuda:
            torch.cuda.synchronize(self.flat.device)  # paged state is filled by the device and written by the host
        held = self.optimizer.state[self.flat]
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                held[name].copy_(value)
            else:
                held[name] = value


class FlatOptimizer(torch.optim.Optimizer):
    """A bitsandbytes optimizer that updates its tensors as one.

    Weights and gradients equal those of the optimizer it is made from, bit for bit: a tensor that bitsandbytes would
    hold in 32 bits (fewer than 4,096 weights, or an embedding) goes to a buffer of 32-bit state. One thing differs: a
    tensor without a gradient, among others that have one, counts as one whose gradient is zero.

    Gradients are views of one row, and `zero_grad` keeps them so; after `model.zero_grad()` call `lay_gradients`.
    Gradients made elsewhere, as by DDP, are copied into the row at each step.

    Attributes:
        is_paged: whether the state may move to ordinary memory.
        optim_bits: of the state, for tensors that are large enough.
    """

    def __init__(self, optimizer: Any, named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Take the tensors over from an optimizer that has not stepped.

        Args:
            optimizer: of bitsandbytes.
            named: every trained tensor with its name, which the saved state is told apart by.
        Raises:
            ValueError: the optimizer has stepped, or a tensor has no name.
        """
        if optimizer.state:
            raise ValueError("the optimizer has stepped; its state would be lost")
        names = {id(parameter): name for name, parameter in named}
        if any(id(parameter) not in names for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("a trained tensor has no name")
        self._buffers: list[_Buffer] = []
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.is_paged: bool = optimizer.is_paged
        self.optim_bits: int = optimizer.args.optim_bits
        with torch.no_grad():
            self._buffers = _buffers(optimizer, names)
        for buffer in self._buffers:
            buffer.optimizer = _like(optimizer, buffer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of construction; refused later.

        Raises:
            ValueError: the buffers are made, so the group would not be trained.
        """
        if self._buffers:
            raise ValueError("no group can be added to a flat optimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Update every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for buffer in self._buffers:
            buffer.take_weights()
            if buffer.take_gradients():
                self._set_rates(buffer)
                buffer.optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's interface
        """Zero the gradients in place; the argument is there for callers that know other optimizers."""
        for buffer in self._buffers:
            buffer.zero_gradients()

    def lay_gradients(self) -> None:
        """Have backward add to the rows again after `model.zero_grad()`, which leaves parameters without gradients.

        Gradients made elsewhere take as much memory once more, and layers that are recorded would keep theirs beside.
        """
        for buffer in self._buffers:
            if not buffer.lone and all(parameter.grad is None for parameter in buffer.parameters):
                buffer.zero_gradients()

    def state_dict(self) -> dict[str, Any]:
        """State by buffer, with the names and shapes that it belongs to."""
        return {
            "layout": [buffer.layout() for buffer in self._buffers],
            "state": [buffer.state() for buffer in self._buffers],
            "param_groups": [_settings(group) for group in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            RunError: it belongs to other tensors, or to an optimizer that was not flat.
        """
        _check_layout(state_dict.get("layout"), [buffer.layout() for buffer in self._buffers])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        for buffer, state in zip(self._buffers, state_dict["state"], strict=True):
            self._set_rates(buffer)
            buffer.load(state)

    def _set_rates(self, buffer: _Buffer) -> None:
        buffer.optimizer.param_groups[0].update(_settings(self.param_groups[buffer.kind.group]))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _padded(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // BLOCK) * BLOCK


def _buffers(optimizer: Any, names: dict[int, str]) -> list[_Buffer]:
    """The fewest buffers that keep unlike tensors apart, in the order of the tensors."""
    rows: dict[_Kind, list[list[torch.nn.Parameter]]] = {}
    exact = _kept_in_32_bits()
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            small = parameter.numel() < optimizer.args.min_8bit_size or id(parameter) in exact
            bits = 32 if small else optimizer.args.optim_bits
            of_kind = rows.setdefault(_Kind(index, bits, parameter.device, parameter.dtype), [])
            if not of_kind or parameter.numel() >= LONE or _is_full(of_kind[-1], parameter):
                of_kind.append([])
            of_kind[-1].append(parameter)
    return [
        _Buffer(kind, [names[id(parameter)] for parameter in row], row)
        for kind, of_kind in rows.items()
        for row in of_kind
    ]


def _is_full(row: list[torch.nn.Parameter], parameter: torch.nn.Parameter) -> bool:
    return row[0].numel() >= LONE or sum(map(_padded, row)) + _padded(parameter) > LIMIT


def _kept_in_32_bits() -> set[int]:
    """Tensors that transformers told bitsandbytes to hold in 32 bits: those of embeddings."""
    triples = GlobalOptimManager.get_instance().module_weight_config_triple
    return {id(getattr(module, name)) for module, name, config in triples if config.get("optim_bits") == 32}


def _like(optimizer: Any, buffer: _Buffer) -> Any:
    """An optimizer of the same class and settings over the buffer."""
    made = type(optimizer)([{**_settings(optimizer.param_groups[buffer.kind.group]), "params": [buffer.flat]}])
    made.is_paged = optimizer.is_paged
    made.args = copy.copy(optimizer.args)
    made.args.optim_bits, made.args.min_8bit_size = buffer.kind.bits, 0
    return made


def _check_layout(saved: list[dict[str, Any]] | None, own: list[dict[str, Any]]) -> None:
    """Refuse a state of other tensors, naming the first that differs."""
    if saved is None:
        raise RunError("the checkpoint's optimizer was not flat, so its state cannot be taken over", fix=OTHER_RECIPE)
    was, now = _lines(saved), _lines(own)
    if was == now:
        return
    for before, after in zip(was, now, strict=False):
        if before != after:
            raise RunError(f"the checkpoint's optimizer has {before} where this run has {after}", fix=OTHER_RECIPE)
    longer, who = (was, "the checkpoint's optimizer") if len(was) > len(now) else (now, "this run")
    raise RunError(f"only {who} has {longer[min(len(was), len(now))]}", fix=OTHER_RECIPE)


def _lines(layout: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name} {'x'.join(map(str, shape))} in {buffer['bits']} bits"
        for buffer in layout
        for name, shape in zip(buffer["names"], buffer["shapes"], strict=True)
    ]
