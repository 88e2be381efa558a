"""What layers keep for their backward pass, measured: for those that keep more than their sizes tell."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from qlora_kit.engine.ops.compiled import as_written

TOKENS = 256  # of the row that is run: whole chunks of linear attention


def kept_per_token(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> dict[torch.nn.Module, float]:
    """Bytes that each of some layers keeps for each token, as they are set up now.

    Runs a short row through the model, and lets go of it.

    Args:
        model: decoder without a head, in training mode.
    """
    held = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
    found = dict.fromkeys(layers, 0)
    stacks: list[ExitStack] = []

    def begin(layer: torch.nn.Module, _given: Any, settings: Mapping[str, Any]) -> None:
        # What all layers are handed, such as angles, is no layer's own.
        held.update(part.untyped_storage()._cdata for part in tree_leaves(settings) if isinstance(part, Tensor))

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in held:
                held.add(storage._cdata)  # what two layers keep is counted once
                found[layer] += storage.nbytes()
            return tensor

        stacks.append(ExitStack())
        stacks[-1].enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))

    def end(*_: Any) -> None:
        stacks.pop().close()

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    ids = torch.arange(TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    devices = [ids.device] if ids.is_cuda else []
    with ExitStack() as hooks, torch.random.fork_rng(devices), as_written():
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(end).remove)
        with torch.enable_grad():
            result = model(input_ids=ids, use_cache=False)
    del result
    return {layer: count / TOKENS for layer, count in found.items()}
