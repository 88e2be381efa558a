"""CUDA graphs of decoder layers: what a layer launches is recorded once, and from then on launched as a whole.

A layer of the fast engine is about 100 kernels in a training step. Started one by one they keep the host busy for 200
to 400 ms per step of a model with 32 layers, and a GPU that is done sooner waits. A recorded layer takes two starts.

A recording holds for one shape of batch, and for the memory that it was made with. Everything that the layers keep for
the backward pass stays reserved, but only once: recordings of other shapes lie in the same memory, since a step is done
before the next one begins. So there is one for each shape that comes again, up to a number. A shape that is expected is
recorded when it first comes: to start its kernels one by one first would take memory beside the recordings'.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from qlora_kit.core.console.lines import log
from qlora_kit.core.units import counted, human_bytes
from qlora_kit.engine.graphs.capture_schedule import CaptureSchedule
from qlora_kit.engine.graphs.captured_layer import CapturedLayer, GraphMemory, SetGradTargets
from qlora_kit.engine.graphs.hidden_places import HiddenPlaces
from qlora_kit.engine.graphs.host_passage import HostInput, HostPassage
from qlora_kit.engine.graphs.recording_room import Beside, RecordingRoom

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


@dataclass
class Recording:
    """The layers of one model, recorded for one shape of batch.

    Attributes:
        shape: of the batch, as its first layer saw it.
        gradient: of hidden states, which one layer writes for the next.
        captured: by place.
        passage: of inputs that lie on the host.
        is_whole: no more layers are recorded: others' values may lie where those of these layers do.
        is_left: one of its layers could not be recorded.
    """

    shape: Hashable
    gradient: Tensor
    captured: dict[int, CapturedLayer] = field(default_factory=dict)
    passage: HostPassage | None = None
    is_whole: bool = False
    is_left: bool = False

    @property
    def is_open(self) -> bool:
        """Whether further layers may be recorded."""
        return not (self.is_whole or self.is_left)

    def close(self) -> None:
        """Let recordings of other shapes into the memory of this one."""
        if not self.is_whole:
            self.is_whole = True
            for layer in self.captured.values():
                layer.forget()


class LayerGraphs:
    """The recordings of all layers of one model, in one pool of memory.

    Attributes:
        turn: counts forward passes.
        in_part: whether layers with a plain part are recorded without it from now on.
        records_all: whether no layer of the model is started kernel by kernel.
        beside: what the rest of a step takes.
        largest: values of the hidden states of the largest batch; 0 where that is not known.
        expected: tokens that many batches have, each in one row.
    """

    def __init__(self) -> None:
        self.turn = 0
        self.in_part = False
        self.records_all = True
        self.beside = Beside()
        self.largest = 0
        self.expected = frozenset[int]()
        self._recordings: dict[Hashable, Recording] = {}
        self._current: Recording | None = None  # of the pass that runs
        self._fed: dict[int, int] = {}  # by the place of a copy: the tensor that was copied in this pass
        self._schedule = CaptureSchedule()
        self._is_off = False
        self._is_stale = False
        self._is_spent = False  # the pool, which CUDA gave a recording up in
        self._misfits = 0
        self._told = 0
        self._room = RecordingRoom()
        self._statics: dict[Hashable, Tensor] = {}
        self._gradients: dict[int, Sequence[Tensor]] = {}  # by the place of a layer: of its parameters
        self._places: HiddenPlaces | None = None
        self._memory: GraphMemory | None = None

    @property
    def captured(self) -> Mapping[int, CapturedLayer]:
        """The layers that are recorded for the shape of the last pass, by place."""
        return {} if self._current is None else self._current.captured

    @property
    def shapes(self) -> int:
        """For how many shapes of batches there are recordings."""
        return len(self._recordings)

    def run(self, place: int, layer: CapturableLayer, h: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The layer's result `[rows, tokens, hidden]`: computed, or replayed if its shape is recorded.

        Args:
            place: of the layer; 0 begins a forward pass.
        """
        shape = shape_of(h, settings, layer.parameters)
        if place == 0:
            self._begin(shape, h)
        if (current := self._current) is None:
            return layer.compute(h, settings)
        may_record = current.is_open and not (self._is_off or self._is_stale)
        if place not in current.captured and shape is not None and may_record:
            self._try_to_capture(current, place, layer, h, settings, shape)
        known = current.captured.get(place)
        if known is None or known.shape != shape or not self._feed(known, h, settings):
            self._is_stale |= not current.is_left
            return layer.compute(h, settings)
        replayed: Tensor = Replay.apply(h, known, self, *layer.parameters)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return replayed

    def release(self) -> None:
        """Give the memory of all recordings back; they are made anew when batches of their shapes come again."""
        self._drop()

    def _begin(self, shape: Hashable, h: Tensor) -> None:
        self.turn += 1
        self._tell()
        self._fed.clear()
        self._statics.clear()
        self._misfits += self._is_stale
        if self._misfits > MOST_MISFITS and not self._is_off:
            self._fall_back("they are called with other settings from step to step")
        if self._is_stale or self._is_spent:
            self._drop()
        elif self._current is not None and not self._current.is_whole:
            self._current.close()
            self._room.end_recording()
        self._is_stale = self._is_spent = False
        is_expected = h.shape[0] == 1 and h.shape[1] in self.expected
        due = self._schedule.is_due(shape, is_expected=is_expected) and not self._is_off
        if due and self._recordings and shape not in self._recordings and not self._room.holds_one_more():
            due = False
            self._tell_left(shape, f"recordings take {human_bytes(self._room.own)} each")
        if shape not in self._recordings and not self._leaves_room(h, is_recorded=due):
            self._drop()
        if not self._recordings:  # nor has the pool any use
            self._drop()
            self._room.note_unrecorded(h.numel())
        self._current = (self._recordings.get(shape) or self._open(shape, h)) if due else None

    def _leaves_room(self, h: Tensor, *, is_recorded: bool) -> bool:
        """Whether a batch of another shape can run beside the recordings.

        One that is recorded lies in their memory, which grows for a larger one: but without segments that grow, memory
        of smaller tensors would serve none of it. One that is not recorded needs memory of its own.
        """
        if not self._recordings:
            return True
        assert self._memory is not None  # recordings have it
        values = h.numel()
        if is_recorded:
            values -= max(one.gradient.numel() for one in self._recordings.values())
            if values > 0 and not self._memory.grows():
                return False
        return values <= 0 or self._room.holds(values, self.beside.head)

    def _tell(self) -> None:
        """How many layers a pass has recorded, the first time and when they became more or fewer."""
        count = len(self.captured)
        if count > self._told:
            log.info(f"{counted(count, 'layer is', 'layers are')} started as CUDA graphs")
            self._told = count

    def _open(self, shape: Hashable, h: Tensor) -> Recording | None:
        """Prepare to record a shape; None if the recordings could take more memory than there is."""
        if self._memory is None and not self._has_room(shape):
            return None
        if self._memory is None:
            self._memory = GraphMemory(torch.cuda.graph_pool_handle(), torch.cuda.Stream())  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._places = HiddenPlaces(self.largest)
        assert self._places is not None
        self._room.begin_recording()
        self._recordings[shape] = Recording(shape, self._places.at("gradient", h))
        return self._recordings[shape]

    def _has_room(self, shape: Hashable) -> bool:
        beside = self.beside.head if self.records_all and not self.in_part else max(self.beside)
        if not (why := self._room.lacks(beside)):
            return True
        if self._told:  # there was room for smaller ones
            self._tell_left(shape, why)
        else:
            self._fall_back(why)
        return False

    def _fall_back(self, why: str) -> None:
        self._is_off = self._is_stale = True
        log.info(f"layers are started kernel by kernel, not recorded as CUDA graphs: {why}")

    def _drop(self) -> None:
        if self._memory is None:
            return
        torch.cuda.synchronize()
        self._recordings.clear()
        self._gradients.clear()
        self._current = self._places = self._memory = None
        self._fed.clear()
        self._statics.clear()
        torch.cuda.empty_cache()

    def _try_to_capture(  # a layer as it is called, and where it goes
        self,
        recording: Recording,
        place: int,
        layer: CapturableLayer,
        h: Tensor,
        settings: Mapping[str, Any],
        shape: Hashable,
    ) -> None:
        assert self._memory is not None and self._places is not None
        before = recording.captured.get(place - 1)
        chained = before is not None and before.output.data_ptr() == h.data_ptr()
        fixed = {name: self._static(value) for name, value in _leaves(settings) if isinstance(value, Tensor)}
        try:
            if layer.from_host is None:
                compute, host, output = layer.compute, None, self._places.at(("after", place), h)
                start = before.output if before is not None and chained else self._places.at(("before", place), h)
            else:
                compute, host = layer.from_host, self._host_input(recording, h, self._places)
                start, output = host.start, host.output
            given = _with_tensors(settings, fixed)
            start = start.detach().requires_grad_(h.requires_grad)
            made = self._gradients.get(place, ())
            captured = CapturedLayer(shape, fixed, start, output, layer.parameters, recording.gradient, host, made)
            captured.capture(partial(compute, settings=given), self._memory, layer.set_grad_targets)
            recording.captured[place], self._gradients[place] = captured, captured.gradients
        except RuntimeError as error:  # of CUDA, torch.OutOfMemoryError included
            why = next(iter(str(error).splitlines()), type(error).__name__)
            self._is_spent = is_spent = not isinstance(error, torch.OutOfMemoryError)
            if is_spent and not self._schedule.fails_again(recording.shape):
                self._put_off(recording)
                return
            if len(self._recordings) > 1 or self._told:  # others could be recorded
                self._tell_left(recording.shape, why)
                self._put_off(recording)
                return
            if not layer.has_plain_part:
                self._fall_back(why)
                return
            log.info(f"layers are recorded as CUDA graphs without the part that runs plain: {why}")
            self.in_part = self._is_stale = True

    def _put_off(self, recording: Recording) -> None:
        """Start layers of this shape kernel by kernel for the rest of this pass."""
        del self._recordings[recording.shape]
        recording.is_left = True

    def _tell_left(self, shape: Hashable, why: str) -> None:
        log.info(f"batches of one more shape are started kernel by kernel, not as CUDA graphs: {why}")
        self._schedule.leave(shape)

    def _host_input(self, recording: Recording, h: Tensor, places: HiddenPlaces) -> HostInput:
        """Of the next layer whose input lies on the host."""
        if recording.passage is None or not recording.passage.fits(h):
            recording.passage = HostPassage(h, places)
        return recording.passage.add()

    def _static(self, value: Tensor) -> Tensor:
        """A copy's place; layers that are handed one tensor share it."""
        key = (value.data_ptr(), tuple(value.shape), value.dtype)
        if key not in self._statics:
            assert self._places is not None  # there while layers are recorded
            self._statics[key] = self._places.of_setting(len(self._statics), value)
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
        if ctx.turn != owner.turn:
            raise RuntimeError(
                "the backward pass of an earlier forward pass: with CUDA graphs it has to come before the next forward "
                "pass; set engine.cuda_graphs=false"
            )
        if grad.data_ptr() != known.gradient.data_ptr():
            known.gradient.copy_(grad)
        known.backward()
        return known.gradient if known.needs_input else None, None, None, *known.hand_over()


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
