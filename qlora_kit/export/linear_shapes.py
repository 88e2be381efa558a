"""A model's linear layers, without its weights."""

from pathlib import Path


def linear_shapes(model_dir: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer inside a model's blocks, by name, without its weights."""
    import torch

    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.model.skeleton import skeleton

    model = skeleton(model_dir)
    prefix, layers = decoder_layers(model)
    named = ((f"{prefix}.{name}", module) for name, module in layers.named_modules())
    return {name: (m.out_features, m.in_features) for name, m in named if isinstance(m, torch.nn.Linear)}
