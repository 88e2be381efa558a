"""An operation of the engine: the math in torch, a kernel that gives the same, and when the kernel is taken."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

from qlora_kit.core.device import runs_triton
from qlora_kit.engine.ops.compiled import run_compiled
from qlora_kit.model.live_memory import as_one_kernel, counts_as_on_gpu

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """One operation in two forms that take the same arguments and give the same numbers up to rounding.

    Attributes:
        name: in the registry.
        reference: in torch, on any device; its docstring is that of the operation.
        kernel: on a GPU; called only where `supported` says so.
        supported: whether the kernel takes these arguments.
    """

    name: str
    reference: Callable[P, R]
    kernel: Callable[P, R]
    supported: Callable[P, bool]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The operation, by its kernel where that takes these arguments."""
        if not self.supported(*args, **kwargs):
            return self.reference(*args, **kwargs)
        return as_one_kernel(self.reference, *args, **kwargs) if counts_as_on_gpu() else self.kernel(*args, **kwargs)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether kernels of triton can work on a tensor, or memory is counted as if they did."""
    return counts_as_on_gpu() or runs_triton(tensor)


def compiled(function: Callable[P, R]) -> Op[P, R]:
    """An operation whose kernel torch compiles from the reference, at its first use on a GPU."""

    def is_on_gpu(*args: P.args, **_: P.kwargs) -> bool:
        return isinstance(args[0], Tensor) and (args[0].is_cuda or counts_as_on_gpu())

    return Op(function.__name__.lstrip("_"), function, partial(run_compiled, function), is_on_gpu)
