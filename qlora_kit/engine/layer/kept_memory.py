"""What layers keep for their backward pass, measured: for those that keep more than their sizes tell."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_kit.engine.ops.compiled import as_written

TOKENS = 256  # of the row that is run: whole chunks of linear attention


def kept_per_token(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> float:
    """Bytes that layers keep for each token, all together, as they are set up now.

    Runs a short row through the model, and lets go of it.

    Args:
        model: decoder without a head, in training mode.
    """
    held = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    stacks: list[ExitStack] = []

    def begin(*_: Any) -> None:
        stacks.append(ExitStack())
        stacks[-1].enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))

    def end(*_: Any) -> None:
        stacks.pop().close()

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    ids = torch.arange(TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    devices = [ids.device] if ids.is_cuda else []
    with ExitStack() as hooks, torch.random.fork_rng(devices), as_written():
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(begin).remove)
            hooks.callback(layer.register_forward_hook(end).remove)
        with torch.enable_grad():
            result = model(input_ids=ids, use_cache=False)
    del result
    return sum(kept.values()) / TOKENS
