"""Counts the bytes of tensors as they come and go: on any device, and for tensors without values.

What torch's allocator counts on a GPU can only be read there. Here every operation that torch dispatches is seen with
what it makes, and a storage is let go of when nothing holds it any more.

    with LiveMemory() as live:
        live.hold(model)
        loss = model(row).loss
        loss.backward()
    live.peak
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")
_counting: ContextVar["LiveMemory | None"] = ContextVar("counting", default=None)


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Bytes that are live, and the most that were at once.

    What is made before it begins counts only where it is held.

    Attributes:
        as_on_gpu: an operation that is one kernel on a GPU counts by its results alone, wherever it runs.
        now: bytes that are live.
        peak: the most since the start, or since `begin_peak`.
    """

    def __init__(self, *, as_on_gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.as_on_gpu = as_on_gpu
        self.now = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._unseen: dict[int, tuple[weakref.ref[Any], int]] | None = None  # made by an operation that is one kernel

    def __enter__(self) -> "LiveMemory":
        self._token = _counting.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _counting.reset(self._token)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._count(tensor)

    def begin_peak(self) -> None:
        """Look for the peak anew, from what is live now."""
        self.peak = self.now

    @contextmanager
    def results_alone(self) -> Iterator[None]:
        """Leave out what is made and let go of inside."""
        if self._unseen is not None:
            yield
            return
        self._unseen = {}
        try:
            yield
        finally:
            left, self._unseen = self._unseen, None
            for key, (reference, size) in left.items():
                if reference() is not None:
                    self._add(key, reference, size)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # torch's interface
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count what it makes."""
        kwargs = kwargs or {}
        given = {_key(part) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        made = func(*args, **kwargs)
        for part in tree_leaves(made):
            if isinstance(part, Tensor) and _key(part) not in given:
                self._count(part)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or (self._unseen is not None and key in self._unseen):
            return
        reference = weakref.ref(storage, lambda _: self._let_go(key))
        if self._unseen is None:
            self._add(key, reference, size)
        else:
            self._unseen[key] = reference, size

    def _add(self, key: int, reference: "weakref.ref[Any]", size: int) -> None:
        self._known[key] = reference, size
        self.now += size
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int) -> None:
        if self._unseen is not None:
            self._unseen.pop(key, None)
        if (known := self._known.pop(key, None)) is not None:
            self.now -= known[1]


def counts_as_on_gpu() -> bool:
    """Whether memory is being counted as a GPU would take it."""
    counting = _counting.get()
    return counting is not None and counting.as_on_gpu


def as_one_kernel(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run an operation that is one kernel on a GPU, whose results alone count there."""
    counting = _counting.get()
    assert counting is not None  # the caller's condition
    with counting.results_alone():
        return run(*args, **kwargs)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
