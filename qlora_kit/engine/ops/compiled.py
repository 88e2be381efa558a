"""Small functions between the matrix products, compiled by torch into one kernel each on a GPU.

Each is compiled at its first use, for any number of tokens, and runs as written if that fails.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_kit.core.console.lines import log

_UNCOMPILED: set[Callable[..., Any]] = set()  # functions that did not compile in this process
_as_written: ContextVar[bool] = ContextVar("as_written", default=False)


@contextmanager
def as_written() -> Iterator[None]:
    """Run functions uncompiled, for a few tokens: kernels would be tuned for as few, and kept for all of training."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def run_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run the compiled form of a function; as written, from then on, if it does not compile."""
    if function in _UNCOMPILED or _as_written.get():
        return function(*arguments)
    try:
        return _compiled(function)(*(_any_tokens(part) for part in arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _UNCOMPILED.add(function)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning(f"{function.__name__.lstrip('_')} was not compiled and runs slower: {reason}")
        return function(*arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Only the tokens vary: every other size is a constant, which makes better kernels.
    return torch.compile(function, dynamic=False)


def _any_tokens(part: Any) -> Any:
    """A tensor whose first size the compiler may not take for a constant; anything else as it is."""
    if not isinstance(part, Tensor):
        return part
    alias = part.detach()
    if alias.dim() > 1:
        vars(alias).update(_marks())
    return alias


@cache
def _marks() -> dict[str, Any]:
    """What torch notes on a tensor whose first size varies; it takes 10 us to do so, of 900 tensors a step."""
    probe = torch.empty(2, 2)
    torch._dynamo.maybe_mark_dynamic(probe, 0)
    return vars(probe)
