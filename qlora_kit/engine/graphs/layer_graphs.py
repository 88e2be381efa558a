"""CUDA graphs of decoder layers: what a layer launches is recorded once, and from then on launched as a whole.

A layer of the fast engine is about 100 kernels in a training step. Started one by one they keep the host busy for 200
to 400 ms per step of a model with 32 layers, and a GPU that is done sooner waits. A recorded layer takes two starts.

A recording holds for one shape of batch, and for the memory that it was made with: everything that the layers keep for
the backward pass stays reserved while it exists. So there is one shape at a time, recorded when several batches in a
row have had it, and let go when another one comes.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.core.console.lines import log
from qlora_kit.core.units import counted, human_bytes
from qlora_kit.engine.graphs.captured_layer import CapturedLayer, GraphMemory, SetGradTargets
from qlora_kit.engine.graphs.host_passage import HostInput, HostPassage
from qlora_kit.engine.ops.limits import RECORDED_SPARE

REPEATS = 2  # batches in a row of one shape, the first of which compile and choose kernels, before it is recorded
MOST_MISFITS = 2  # passes in which a recorded layer could not be replayed, before recording is given up


class LayerForward(Protocol):
    """A layer: from hidden states `[rows, tokens, hidden]` and what the model hands to every layer to the next ones."""

    def __call__(self, hidden_states: Tensor, settings: Mapping[str, Any]) -> Tensor: ...  # noqa: D102  # said by the class


class CapturableLayer(NamedTuple):
    """A layer as it can be recorded.

    Attributes:
        parameters: that it trains.
        set_grad_targets: tells `compute` where to write gradients.
        has_plain_part: whether it holds what the engine does not know, which may not let itself be recorded.
        from_host: where its input lies on the host between its passes: the layer without that, which makes everything
            again from its input. The recording brings the input there and back.
    """

    compute: LayerForward
    parameters: Sequence[Tensor]
    set_grad_targets: SetGradTargets
    has_plain_part: bool = False
    from_host: LayerForward | None = None


class Beside(NamedTuple):
    """Bytes that a step takes beside recordings, which share their memory with nothing else.

    Attributes:
        head: of the output head.
        layer: of a layer that is started kernel by kernel, in full or in part.
    """

    head: float = 0.0
    layer: float = 0.0


class CaptureSchedule:
    """Decides when to record: counts how often one shape came in a row.

    A shape that did not stay makes the next wait twice as long, so that alternating shapes are soon left alone.
    """

    def __init__(self) -> None:
        self._needed = REPEATS
        self._shape: Hashable = None
        self._seen = 0

    def is_due(self, shape: Hashable) -> bool:
        """Whether this batch and those of its shape to come are worth a recording; None never is."""
        if shape is None or shape != self._shape:
            if self._seen > self._needed:
                self._needed *= 2
            self._shape, self._seen = shape, 0
        self._seen += shape is not None
        return self._seen > self._needed

    def start_over(self) -> None:
        """Count anew, without a grudge against the shape."""
        self._shape, self._seen = None, 0


def shape_of(h: Tensor, settings: Mapping[str, Any], parameters: Sequence[Tensor] = ()) -> Hashable:
    """All that a recording depends on; None if these arguments hold what cannot be fed to one, such as a cache."""
    found: list[Hashable] = [(tuple(h.shape), h.dtype, h.requires_grad)]
    for name, value in _leaves(settings):
        if isinstance(value, Tensor):
            if value.requires_grad or value.device != h.device:
                return None
            found.append((name, tuple(value.shape), value.dtype))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, value))
        else:
            return None
    return (*found, *(parameter.data_ptr() for parameter in parameters))


class LayerGraphs:
    """The recordings of all layers of one model, in one pool of memory.

    Attributes:
        turn: counts forward passes.
        in_part: whether layers with a plain part are recorded without it from now on.
        records_all: whether no layer of the model is started kernel by kernel.
        beside: what the rest of a step takes.
    """

    def __init__(self) -> None:
        self.turn = 0
        self.in_part = False
        self.records_all = True
        self.beside = Beside()
        self.captured: dict[int, CapturedLayer] = {}
        self.gradient: Tensor | None = None
        self._fed: dict[int, int] = {}  # by the place of a copy: the tensor that was copied in this pass
        self._schedule = CaptureSchedule()
        self._replays = False
        self._is_off = False
        self._is_stale = False
        self._misfits = 0
        self._told = 0
        self._statics: dict[Hashable, Tensor] = {}
        self._passage: HostPassage | None = None
        self._memory: GraphMemory | None = None

    def run(self, place: int, layer: CapturableLayer, h: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The layer's result `[rows, tokens, hidden]`: computed, or replayed if its shape is recorded.

        Args:
            place: of the layer; 0 begins a forward pass.
        """
        shape = shape_of(h, settings, layer.parameters)
        if place == 0:
            self._begin(shape, h)
        if not self._replays:
            return layer.compute(h, settings)
        if place not in self.captured and shape is not None and not self._is_off:
            self._try_to_capture(place, layer, h, settings, shape)
        known = self.captured.get(place)
        if known is None or known.shape != shape or not self._feed(known, h, settings):
            self._is_stale = True
            return layer.compute(h, settings)
        replayed: Tensor = Replay.apply(h, known, self, *layer.parameters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return replayed

    def release(self) -> None:
        """Give the memory of all recordings back; the next ones are made when a shape has come often enough again."""
        self._schedule.start_over()
        self._drop()

    def _begin(self, shape: Hashable, h: Tensor) -> None:
        self.turn += 1
        self._tell()
        self._fed.clear()
        self._statics.clear()
        self._misfits += self._is_stale
        if self._misfits > MOST_MISFITS and not self._is_off:
            self._fall_back("they are called with other settings from step to step")
        due = self._schedule.is_due(shape) and not self._is_off
        if self._is_stale or not due:
            self._drop()
        if due and not self.captured:
            due = self._open(h)
        self._replays, self._is_stale = due, False

    def _tell(self) -> None:
        """How many layers a pass has recorded, the first time and when they became more or fewer."""
        count = len(self.captured)
        if count and count != self._told:
            log.info(f"{counted(count, 'layer is', 'layers are')} started as CUDA graphs")
            self._told = count

    def _open(self, h: Tensor) -> bool:
        """Prepare to record; False if the recordings could take more memory than there is."""
        torch.cuda.empty_cache()
        needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0]
        beside = self.beside.head if self.records_all and not self.in_part else max(self.beside)
        if free < RECORDED_SPARE * needed + beside:
            taken = f"a step takes {human_bytes(needed)}, what is not recorded {human_bytes(beside)}"
            self._fall_back(f"{taken}, and {human_bytes(free)} are free")
            return False
        self._memory = GraphMemory(torch.cuda.graph_pool_handle(), torch.cuda.Stream())  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.gradient = torch.empty_like(h)
        return True

    def _fall_back(self, why: str) -> None:
        self._is_off = self._is_stale = True
        log.info(f"layers are started kernel by kernel, not recorded as CUDA graphs: {why}")

    def _drop(self) -> None:
        if self._memory is None:
            return
        torch.cuda.synchronize()
        self.captured, self.gradient, self._passage, self._memory, self._replays = {}, None, None, None, False
        self._fed.clear()
        self._statics.clear()
        torch.cuda.empty_cache()

    def _try_to_capture(
        self, place: int, layer: CapturableLayer, h: Tensor, settings: Mapping[str, Any], shape: Hashable
    ) -> None:
        before = self.captured.get(place - 1)
        chained = before is not None and before.output.data_ptr() == h.data_ptr()
        fixed = {name: self._static(value) for name, value in _leaves(settings) if isinstance(value, Tensor)}
        try:
            if layer.from_host is None:
                compute, host = layer.compute, None
                start = before.output if before is not None and chained else torch.empty_like(h)
            else:
                compute, host = layer.from_host, self._host_input(h)
                start = host.start
            assert self.gradient is not None and self._memory is not None
            given = _with_tensors(settings, fixed)
            start = start.detach().requires_grad_(h.requires_grad)
            captured = CapturedLayer(shape, fixed, start, layer.parameters, self.gradient, host)
            captured.capture(partial(compute, settings=given), self._memory, layer.set_grad_targets)
            self.captured[place] = captured
        except RuntimeError as error:  # of CUDA, torch.OutOfMemoryError included
            why = next(iter(str(error).splitlines()), type(error).__name__)
            if not layer.has_plain_part:
                self._fall_back(why)
                return
            log.info(f"layers are recorded as CUDA graphs without the part that runs plain: {why}")
            self.in_part = self._is_stale = True

    def _host_input(self, h: Tensor) -> HostInput:
        """Of the next layer whose input lies on the host."""
        if self._passage is None or not self._passage.fits(h):
            self._passage = HostPassage(h)
        return self._passage.add()

    def _static(self, value: Tensor) -> Tensor:
        """A copy's place; layers that are handed one tensor share it."""
        key = (value.data_ptr(), tuple(value.shape), value.dtype)
        if key not in self._statics:
            self._statics[key] = torch.empty_like(value)
        return self._statics[key]

    def _feed(self, known: "CapturedLayer", h: Tensor, settings: Mapping[str, Any]) -> bool:
        """Bring the inputs to where the recording reads them; False if another layer still needs what lies there."""
        given = {name: value for name, value in _leaves(settings) if isinstance(value, Tensor)}
        for name, static in known.fixed.items():
            if self._fed.get(id(static), given[name].data_ptr()) != given[name].data_ptr():
                return False
        for name, static in known.fixed.items():
            if id(static) not in self._fed:
                static.copy_(given[name])
                self._fed[id(static)] = given[name].data_ptr()
        if known.host is not None:
            known.host.take(h.detach())
        elif h.data_ptr() != known.start.data_ptr():
            known.start.detach().copy_(h.detach())
        return True


class Replay(Function):
    """A recorded layer: takes hidden states, the recording, the owner of all, and the parameters."""

    @staticmethod
    def forward(ctx: Any, _h: Tensor, known: CapturedLayer, owner: LayerGraphs, *_: Tensor) -> Tensor:
        """The hidden states after the layer, in memory that the next forward pass writes over."""
        ctx.known, ctx.owner, ctx.turn = known, owner, owner.turn
        return known.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of hidden states and parameters, in memory that the next layer and step write over."""
        known, owner = ctx.known, ctx.owner
        if ctx.turn != owner.turn or owner.gradient is None:
            raise RuntimeError(
                "the backward pass of an earlier forward pass: with CUDA graphs it has to come before the next forward "
                "pass; set engine.cuda_graphs=false"
            )
        if grad.data_ptr() != owner.gradient.data_ptr():
            owner.gradient.copy_(grad)
        known.backward()
        return owner.gradient if known.needs_input else None, None, None, *known.hand_over()


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, tuple | list):
            yield from ((f"{name}.{index}", part) for index, part in enumerate(value))
        else:
            yield name, value


def _with_tensors(settings: Mapping[str, Any], fixed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings with other tensors in them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found[name] = fixed.get(name, value)
        if isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            found[name] = tuple(fixed.get(f"{name}.{index}", part) for index, part in enumerate(value))
    return found
