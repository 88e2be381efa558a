"""One decoder layer as two CUDA graphs: its forward pass and its backward pass."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.core.collection import no_collection
from qlora_kit.engine.graphs.host_passage import HostInput


class SetGradTargets(Protocol):
    """Tells a layer where its backward pass is to write gradients; it may write elsewhere."""

    def __call__(self, of_input: Tensor | None, of_parameters: Sequence[Tensor]) -> None:
        """In new memory from now on where there is None or nothing."""
        ...


class GraphMemory(NamedTuple):
    """Where recordings are made: a pool that only they allocate from, and a stream for the time of recording."""

    pool: Any
    stream: torch.cuda.Stream

    def grows(self) -> bool:
        """Whether memory of smaller tensors can become part of a larger one's, as the allocator was set up."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        own = (one for one in segments if tuple(one["segment_pool_id"]) == tuple(self.pool))
        return all(one["is_expandable"] for one in own)


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, memory: GraphMemory) -> Iterator[None]:
    """`torch.cuda.graph` without its waiting for the device and emptying of the cache, which 64 graphs would repeat.

    Raises:
        RuntimeError: what went wrong first; to end a recording that has failed is an error too, which says less.
    """
    graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        try:
            graph.capture_end()
        except RuntimeError:  # CUDA gave the recording up, and torch then leaves its allocator bound to the pool
            device = torch.cuda.current_device()
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(device, memory.pool)
                torch._C._cuda_releasePool(device, memory.pool)
        raise
    graph.capture_end()


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Random numbers after a recording that failed: the generator would refuse to draw until one ends well."""
    try:
        yield
    except BaseException:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise


class CapturedLayer:
    """One layer's forward and backward pass as two CUDA graphs.

    Both are recorded at once, and what the forward pass saved for the backward pass stays referenced, so that no later
    layer is recorded into that memory. What the backward pass writes on the way may lie where later layers keep theirs:
    in a step they are done by then.

    Attributes:
        start: where the hidden states are read.
        fixed: where tensors of the settings are read, by name.
        output: hidden states after the layer, in a place that recordings of other shapes write to as well.
        parameters: that the layer trains.
        gradients: of these; that of the hidden states is written to `gradient`, for all layers the same place.
        host: where its input lies between the two passes, if other layers read in the same place.
        adds_up: whether the backward pass adds to `gradients`, which are the parameters' own where these have some that
            stay from step to step; else it writes them.
    """

    def __init__(
        self,
        shape: Hashable,
        fixed: Mapping[str, Tensor],
        start: Tensor,
        output: Tensor,
        parameters: Sequence[Tensor],
        gradient: Tensor,
        host: HostInput | None = None,
        made: Sequence[Tensor] = (),
    ) -> None:
        """made: memory for gradients of parameters, from a recording of another shape."""
        self.shape, self.fixed, self.start, self.gradient = shape, fixed, start, gradient
        self.output, self.host = output, host
        self.needs_input = start.requires_grad
        kept = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.adds_up = len(kept) == len(parameters) > 0 and not _are_several()
        # Beside the pool, where layers whose backward pass comes later would write over them.
        self.gradients = kept if self.adds_up else list(made) or [torch.empty_like(one) for one in parameters]
        self._kept: list[Tensor] = []
        self.parameters = list(parameters)
        self._wanted = [start, *parameters] if self.needs_input else list(parameters)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def capture(
        self, compute: Callable[[Tensor], Tensor], memory: GraphMemory, set_grad_targets: SetGradTargets
    ) -> None:
        """Run the layer and its backward once without any kernel being started, and keep what would have been.

        Args:
            set_grad_targets: of `compute`. The incoming gradient is done with when that of the input is written, over
                it.
        Raises:
            RuntimeError: of CUDA, where the layer does what cannot be recorded, or where memory is short.
        """
        memory.stream.wait_stream(torch.cuda.current_stream())
        # What is freed by chance meanwhile, such as another recording, would end this one.
        with torch.cuda.stream(memory.stream), torch.enable_grad(), _keep_random_state(), no_collection():
            with _capture(self.forward_graph, memory), saved_tensors_hooks(self._keep, lambda kept: kept):
                result = compute(self.start)
                if self.host is None and result.dtype is not self.output.dtype:
                    self.output = result.detach()
                else:
                    self.output.copy_(result.detach())
            # Autograd's graph does not outlive this: its nodes for the parameters' gradients belong to this stream,
            # and later steps would add up their gradients on it, beside the stream that the graphs are started on.
            set_grad_targets(self.gradient, () if self.adds_up else self.gradients)
            try:
                with _capture(self.backward_graph, memory):
                    self._capture_backward(result)
            finally:
                set_grad_targets(None, ())

    def forget(self) -> None:
        """Let other recordings into the memory of this one's values, once all layers of its shape are recorded.

        A step writes all of them before it reads them, and another shape's step is not begun before it is done.
        """
        self._kept.clear()

    def forward(self) -> Tensor:
        """Start the forward pass; the result is in memory that the next forward pass writes over at the earliest."""
        self.forward_graph.replay()
        # A copy where the next layer writes over it: what is no recorded layer may still keep it.
        return self.output.detach() if self.host is None else self.output.clone()

    def backward(self) -> None:
        """Start the backward pass, from `gradient` to `gradient` and to those of the parameters."""
        if self.host is not None:
            self.host.bring_back()
        self.keep_gradients()
        self.backward_graph.replay()

    def _capture_backward(self, result: Tensor) -> None:
        # As in a step, where autocast ends with the loss: torch.compile would otherwise compile everything anew, and
        # what it tries out then cannot be recorded.
        with torch.autocast(result.device.type, enabled=False):
            found = torch.autograd.grad(result, self._wanted, self.gradient)
        if self.needs_input and found[0].data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(found[0])
        made = found[len(found) - len(self.gradients) :]
        if self.adds_up:
            torch._foreach_add_(self.gradients, list(made))
            return
        pairs = zip(self.gradients, made, strict=True)
        if elsewhere := [pair for pair in pairs if pair[0].data_ptr() != pair[1].data_ptr()]:
            torch._foreach_copy_([place for place, _ in elsewhere], [made for _, made in elsewhere])

    def keep_gradients(self) -> None:
        """Copy gradients that were handed over and are still in use, such as those of an earlier micro-batch.

        Where the pass adds to them, they are brought to where it does.
        """
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if not self.adds_up:
                if parameter.grad is gradient:
                    parameter.grad = gradient.clone()
            elif parameter.grad is not gradient:
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def hand_over(self) -> list[Tensor | None]:
        """Make the recorded gradients those of the parameters; the result is what is left for autograd to add.

        Autograd would copy each, which is 448 short kernels a step for 32 layers. Several processes need it to, since
        they learn from it that a gradient is there.
        """
        if self.adds_up:
            return [None] * len(self.gradients)
        if _are_several():
            return list(self.gradients)
        added = []
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                added.append((parameter.grad, gradient))
        if added:
            torch._foreach_add_([sum_ for sum_, _ in added], [gradient for _, gradient in added])
        return [None] * len(self.gradients)

    def _keep(self, saved: Tensor) -> Tensor:
        self._kept.append(saved.detach())
        return saved


def _are_several() -> bool:
    """Whether gradients are shared with other processes, which learn from autograd that there are some."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
