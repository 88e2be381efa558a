"""The longest row that trains in a given amount of GPU memory."""

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

STEP, LAST = 1024, 1 << 20  # tokens
PARTS = 16  # a long row is found to one part in so many of its length, at least
BLOCK = 128  # tokens that attend to one another where attention is cut into blocks; rows are padded to multiples
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


def longest(fits: Callable[[int], bool], first: int, growth: float = 2, step: int = STEP, last: int = LAST) -> int:
    """The largest length that fits, by growing and then halving the gap; 0 if none does.

    Lengths are multiples of `step`; the gap to one that does not fit is a step, or a sixteenth of a long row.

    Args:
        fits: whether a length in tokens fits; asked for at most once each.
        first: multiple of `step` to begin with.
        growth: of a length that fits to the next; a small one is quick where `first` is a good guess.
        last: lengths above this are not tried.
    """
    low, high = 0, first
    while high <= last and fits(high):
        low, high = high, max(round(growth * high / step), high // step + 1) * step
    while high - low > max(step, low // PARTS):
        middle = int((low + high) / 2 if low else high / growth) // step * step
        if middle <= last and fits(middle):
            low = middle
        else:
            high = middle
    return low


def fill_all_but(gigabytes: float) -> torch.Tensor | None:
    """Take all of the GPU but so many 10^9 bytes, which are left to this process, its context of CUDA included.

    torch's limit on a process would not do: stacks that plan by the free memory would still see the whole GPU.

    Returns:
        What takes the memory; None where the GPU is not larger.
    """
    surplus = int(torch.cuda.get_device_properties(0).total_memory - gigabytes * 1e9)
    return torch.empty(surplus, dtype=torch.uint8, device="cuda") if surplus > 0 else None


def attention_in_blocks() -> None:
    """Let each block of tokens attend to itself alone, in all that asks torch for attention from here on.

    Attention within blocks reads and writes tensors of the same sizes as over the whole row, so a step needs the same
    memory, but its time grows with the row's length and not with the square of it: a search that would take hours
    takes minutes. To be called before a stack is imported.
    """
    whole = torch.nn.functional.scaled_dot_product_attention

    @functools.wraps(whole)
    def in_blocks(query: Any, key: Any, value: Any, *rest: Any, **settings: Any) -> Any:
        tokens = query.shape[2]
        mask = settings.get("attn_mask", rest[0] if rest else None)
        if mask is not None or len(query) != 1 or tokens % BLOCK or key.shape[2] != tokens:
            raise RuntimeError(f"attention of {tuple(query.shape)} cannot be cut into blocks")
        # Views: [1, heads, tokens, width] to [blocks, heads, tokens of a block, width], and back.
        cut = [part[0].unflatten(1, (-1, BLOCK)).transpose(0, 1) for part in (query, key, value)]
        return whole(*cut, *rest, **settings).transpose(0, 1).flatten(1, 2)[None]

    torch.nn.functional.scaled_dot_product_attention = in_blocks


def tries(
    step: Callable[[int], None], note: Callable[[list[dict[str, object]]], None], first: int, growth: float = 2
) -> int:
    """Find the longest row of which one step fits.

    Args:
        step: trains one step on a row of so many tokens.
        note: called with all tries so far after each, so that a cut-off loses none.
        first: tokens to begin with.
        growth: see `longest`.
    """
    seen: list[dict[str, object]] = []

    def fits(tokens: int) -> bool:
        began = time.perf_counter()
        problem = ""
        try:
            step(tokens)
            torch.cuda.synchronize()
        except RuntimeError as error:
            problem = str(error)
            if not any(sign in problem for sign in OUT_OF_MEMORY):
                raise
        gc.collect()
        torch.cuda.empty_cache()
        seconds = round(time.perf_counter() - began, 1)
        seen.append({"tokens": tokens, "fits": not problem, "seconds": seconds})
        note(seen)
        return not problem

    return longest(fits, first, growth)
