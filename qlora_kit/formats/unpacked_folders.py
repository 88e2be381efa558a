"""Folders that are loaded with their weights unpacked: by transformers while it loads them, or here before it does."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.files import read_json
from qlora_kit.weights.reader import WeightReader, fp32_names, tensor_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


def load_unpacked(folder: Path, unpacking: "QuantizationConfigMixin") -> "PreTrainedModel":
    """Load a folder, its weights unpacked once: on a GPU in the file's dtype, on a CPU in float32.

    Args:
        unpacking: the library's settings for the folder's kind, with `dequantize`.

    Raises:
        OSError, RuntimeError, ValueError, KeyError: transformers cannot load it.
    """
    import torch

    from qlora_kit.model.language_model import load_language_model

    on_gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        # Asking to unpack makes transformers warn that nothing else of what is asked counts.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = load_language_model(
            folder,
            dtype="auto" if on_gpu else torch.float32,
            device="cuda:0" if on_gpu else "cpu",
            quantization=unpacking,
        )
    # 4-bit floats unpack to bfloat16 whatever was asked for; so do FP8 blocks from transformers 5.23 on.
    return (model if on_gpu else model.float()).eval()


@dataclass(frozen=True)
class Unpacked:
    """The weights that a packed folder stands for.

    Attributes:
        names: of its tensors, with one weight in the place of those that it is packed in.
        read: gives each of them, packed ones as float32 [out_features, in_features].
    """

    names: Sequence[str]
    read: WeightReader


def load_weights(folder: Path, unpacked: Unpacked) -> "PreTrainedModel":
    """Load a folder with weights that are unpacked here, for kinds or families that the library cannot read.

    On a GPU in the folder's dtype, on a CPU in float32.

    Raises:
        OSError, RuntimeError, ValueError, KeyError: the weights do not fit the model that config.json describes.
    """
    import torch
    from transformers import GenerationConfig

    from qlora_kit.model.language_model import language_model_of

    on_gpu = torch.cuda.is_available()
    dtype = getattr(torch, str(read_json(folder / "config.json").get("dtype", "bfloat16"))) if on_gpu else torch.float32
    # What is stored in fp32 is brought to the dtype by transformers, which knows what a model computes with in fp32.
    wide = fp32_names(folder)
    tensors = (
        (name, tensor if name in wide else tensor.to(dtype))
        for name in unpacked.names
        if (tensor := unpacked.read(name)) is not None
    )
    model = language_model_of(folder, tensors, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.to("cuda:0" if on_gpu else "cpu").eval()


def names_its_layers(folder: Path, mark: str) -> bool:
    """Whether a folder's packed layers are the model's own, by name: no experts, and no part of a larger model.

    Args:
        mark: how the name of a tensor ends that packed layers alone have.
    """
    from torch import nn

    from qlora_kit.core.errors import DamagedFileError, RecipeError
    from qlora_kit.model.skeleton import skeleton
    from qlora_kit.model.structure import weights_of
    from qlora_kit.weights.own_names import own_names_of

    try:
        model = skeleton(folder)
    except (RecipeError, DamagedFileError):
        return True  # the library's own words tell what is wrong
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed = {name.removesuffix(mark) for name in tensor_names(folder) if name.endswith(mark)}
    mixes = any(one.kind == "experts" for one in weights_of(model))
    return packed <= linears and not mixes and not own_names_of(model).is_part
