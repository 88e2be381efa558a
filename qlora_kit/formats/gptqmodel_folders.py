"""GPTQ and AWQ folders, loaded the way a user of transformers loads them."""

import contextlib
import io
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import DamagedFileError, RecipeError, RunError
from qlora_kit.core.extras import require
from qlora_kit.core.files import read_json
from qlora_kit.core.units import counted
from qlora_kit.formats.gptqmodel_settings import EXTRA, set_up_gptqmodel
from qlora_kit.formats.unpacked_folders import names_its_layers

if TYPE_CHECKING:
    from transformers import GPTQConfig, PreTrainedModel

METHODS = ("gptq", "awq")
MARK = ".qweight"
LAYERS = "model.layers"  # where the library looks for them in most families
FAST_CPU_BITS = 4
FAST_CPU_GROUPS = (32, 64, 128)


def load_quantized(folder: Path) -> "PreTrainedModel":
    """Load a GPTQ or AWQ folder through transformers, ready to score.

    On a GPU in the file's dtype (transformers turns AWQ to float16); without one on the CPU, in float32 around
    kernels that multiply in bfloat16, of which AWQ's GEMV layout has none. A GPTQ file whose layers differ is loaded
    by gptqmodel itself, the way vLLM and SGLang read it: transformers knows one number of bits for all.

    Raises:
        RecipeError: gptqmodel or optimum is not installed.
        RunError: the folder is not GPTQ or AWQ, or its weights cannot be loaded.
    """
    method = quantization_method(folder)
    set_up_gptqmodel()
    # The import prints a banner, loading prints a table.
    with contextlib.redirect_stdout(io.StringIO()):
        require("gptqmodel", f"Loading {method.upper()} files", EXTRA)
        if method == "gptq":
            require("optimum", "Loading GPTQ files", EXTRA)
        return _load(folder, method)


def quantization_method(folder: Path) -> str:
    """`gptq` or `awq`, from the folder's config.json.

    Raises:
        RunError: the folder is something else.
    """
    path = folder / "config.json"
    if not path.exists():
        raise RunError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    method = str(read_json(path).get("quantization_config", {}).get("quant_method", "none"))
    if method not in METHODS:
        raise RunError(f"{folder} is not a GPTQ or AWQ folder: its config.json names the quantization '{method}'")
    return method


def _load(folder: Path, method: str) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_kit.model.language_model import cap_scores

    on_gpu = torch.cuda.is_available()
    try:
        if _layers_differ(folder):
            return _load_mixed(folder)
        with warnings.catch_warnings():
            # Naming a kernel makes transformers warn that everything but its name is ignored.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model: PreTrainedModel
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype="auto" if on_gpu else torch.float32,
                device_map={"": "cuda:0" if on_gpu else "cpu"},
                local_files_only=True,
                **({} if on_gpu else _cpu_kernel(folder, method)),
            )
        _refuse_missing(folder, found["missing_keys"])
    except (OSError, RuntimeError, ValueError) as error:
        reader = "gptqmodel" if _layers_differ(folder) else "transformers"
        raise RunError(f"{reader} could not load the {method.upper()} folder {folder}: {error}") from error
    if not on_gpu:
        _without_compiler(model)
    cap_scores(model)
    return model.eval()


def _refuse_missing(folder: Path, missing: Collection[str]) -> None:
    """transformers fills what a file lacks with random numbers, and says so in a table at most."""
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise RunError(
            f"transformers finds {counted(len(missing), 'tensor')} of the model not in {folder}, such as {some}"
        )


def is_read_by_library(folder: Path) -> bool:
    """Whether gptqmodel and transformers read a folder's model right, as far as its structure tells.

    They take dense decoders of one kind of layer. Experts, layers that differ, settings of rotary embeddings that do,
    towers, and names of layers that are not the model's, they read wrongly or not at all.
    """
    from torch import nn

    from qlora_kit.export.layer_inputs import decoder_layers
    from qlora_kit.model.skeleton import skeleton

    if not names_its_layers(folder, MARK):
        return False
    try:
        model = skeleton(folder)
        prefix, layers = decoder_layers(model)
    except (RecipeError, DamagedFileError, ValueError):
        return True  # the library's own words tell what is wrong
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head}
    kinds: dict[str, set[str]] = {}
    for name in linears:
        layer, rest = _parted(name)
        kinds.setdefault(layer, set()).add(rest)
    is_alike = len(kinds) == len(layers) and len({frozenset(kind) for kind in kinds.values()}) == 1
    rope = getattr(model.config, "rope_parameters", None) or {}
    # gptqmodel by itself reads rotary settings that differ by kind of layer as if there were none.
    is_misread = _layers_differ(folder) and any(isinstance(value, dict) for value in rope.values())
    return is_alike and not is_misread and prefix == LAYERS


def _parted(name: str) -> tuple[str, str]:
    """A layer's name up to its number, and the rest."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1]), ".".join(parts[number + 1 :])


def _layers_differ(folder: Path) -> bool:
    """Whether gptqmodel has to read it: transformers knows one number of bits for all layers."""
    return bool((read_json(folder / "config.json").get("quantization_config") or {}).get("dynamic"))


def _load_mixed(folder: Path) -> "PreTrainedModel":
    import torch

    from qlora_kit.model.language_model import cap_scores

    gptqmodel = require("gptqmodel", "Loading GPTQ files", EXTRA)
    on_gpu = torch.cuda.is_available()
    wrapper = gptqmodel.GPTQModel.load(
        str(folder),
        device="cuda:0" if on_gpu else "cpu",
        backend=gptqmodel.BACKEND.AUTO if on_gpu else gptqmodel.BACKEND.GPTQ_TORCH,
        # Its kernels take no float32 while loading; around them the rest is widened afterwards.
        dtype="auto" if on_gpu else torch.bfloat16,
    )
    model: PreTrainedModel = wrapper.model
    if not on_gpu:
        _without_compiler(model.float())
    cap_scores(model)
    return model.eval()


def _cpu_kernel(folder: Path, method: str) -> "dict[str, GPTQConfig]":
    """The argument that asks for the slower kernel in plain torch, for what torch's 4-bit CPU kernel does not take.

    Left to itself the library picks that kernel for other group sizes too, and the first forward fails.
    """
    from transformers import AwqConfig, GPTQConfig

    settings = read_json(folder / "config.json")["quantization_config"]
    bits, group_size = int(settings["bits"]), int(settings["group_size"])
    if bits == FAST_CPU_BITS and group_size in FAST_CPU_GROUPS:
        return {}
    if method == "gptq":
        return {"quantization_config": GPTQConfig(bits=bits, backend="gptq_torch")}
    return {"quantization_config": AwqConfig(bits=bits, group_size=group_size, backend="torch_awq")}


def _without_compiler(model: "PreTrainedModel") -> None:
    """Take torch.compile off the layers that unpack their weights in torch; on a CPU it needs a C++ compiler."""
    for module in model.modules():
        # The library puts the compiled function over the method of the same name.
        vars(module).pop("dequantize_weight", None)
