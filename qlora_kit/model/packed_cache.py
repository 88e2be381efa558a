"""A base as it lies in 4 bit, kept in the user's cache: a second run reads a third of the bytes, and rounds nothing.

What is kept is everything that loading made: packed weights with their scales, weights in 16 bit, buffers. A model that
is built from it is the one that was loaded, to the bit.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.core.cache import cache_folder, drop_oldest, made_in_cache
from qlora_kit.core.console.lines import log
from qlora_kit.core.distributed import is_main
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import quick_hash, read_json, size_on_disk, staged_directory, write_json
from qlora_kit.core.lock import BusyError, hold
from qlora_kit.core.units import human_bytes
from qlora_kit.model.identity import SETTINGS, identity
from qlora_kit.model.language_model import as_language_model, language_model
from qlora_kit.model.skeleton import is_of_the_machine
from qlora_kit.schema.quant import QuantConfig

CACHE = "bases"
META = "base.json"
FILE = "{}.safetensors"
LAYOUT = 1  # raised when a base is kept in another way
WORTH_BYTES = 2_000_000_000  # of a checkpoint: smaller ones are loaded in a moment
MOST_CACHED_BYTES = 80_000_000_000
LEFT_ON_DISK = 0.1  # of the disk, which is never filled further
FILE_BYTES = 500_000_000
AT_ONCE = 4  # files that are written or read side by side, each through a copy in the host's memory
_STATE = "quant_state."  # begin of the names under which bitsandbytes has scales and sizes of a packed weight
_LIBRARIES = ("bitsandbytes", "transformers", "torch")


@dataclass(frozen=True)
class PackedPlace:
    """Where a base is kept as some settings load it, whether or not it is there yet."""

    folder: Path

    @classmethod
    def of(cls, base: Path, quant: QuantConfig, dtype: torch.dtype, device: torch.device) -> "PackedPlace | None":
        """The place; None for what is not worth keeping.

        Args:
            base: folder of the checkpoint, in 16 or 32 bit.
            dtype: of what is not packed.
        """
        files = sorted(base.glob("*.safetensors"))
        if not quant.cache or not quant.kind.is_4bit or sum(file.stat().st_size for file in files) < WORTH_BYTES:
            return None
        stats = {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        hashes = {name: found for name, found in identity(base).items() if name in (*SETTINGS, *stats)}
        settings = {name: getattr(value, "name", value) for name, value in asdict(quant).items()}
        made_by = {name: version(name) for name in _LIBRARIES}
        key = [LAYOUT, hashes, stats, settings, str(dtype), device.type, made_by]
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return cls(cache_folder() / CACHE / name)

    @property
    def holds_one(self) -> bool:
        """Whether a base is kept there, whole."""
        return (self.folder / META).is_file()

    def keep(self, model: PreTrainedModel) -> None:
        """Keep a base that was loaded; a line says where, or why not. Only one of several processes writes."""
        if self.holds_one or not is_main():
            return
        try:
            parent = made_in_cache(CACHE)
            needed = sum(tensor.nbytes for _, tensor in _tensors(model))
            disk = shutil.disk_usage(parent)
            if disk.free - needed < LEFT_ON_DISK * disk.total:
                log.info(f"base: not kept in 4 bit, {human_bytes(needed)}: the disk of {parent} is almost full")
                return
            with hold(parent, "a process that keeps the same base", name=f".{self.folder.name}.lock"):
                for left_over in parent.glob(f".{self.folder.name}.*.partial"):
                    shutil.rmtree(left_over, ignore_errors=True)
                with staged_directory(self.folder) as folder:
                    _write(model, folder)
                drop_oldest(self.folder, META, MOST_CACHED_BYTES)
        except BusyError:  # another run keeps it
            return
        except (OSError, RecipeError, SafetensorError, MemoryError, RuntimeError) as error:  # the run goes on without
            log.info(f"base: not kept in 4 bit: {error}")
            return
        kept = human_bytes(size_on_disk(self.folder))
        log.info(f"base: kept in 4 bit for the next run, {kept} in {self.folder} (quant.cache=false keeps none)")

    def load(
        self,
        base: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: QuantizationConfigMixin,
        attention: str | None,
    ) -> PreTrainedModel | None:
        """The base that is kept; None where there is none, or where it is damaged, which is said.

        Args:
            base: folder of the checkpoint, for its settings.
            quantization: that it was loaded with.
        """
        if not self.holds_one:
            return None
        try:
            model = _built(base, dtype, device, quantization, attention)
            _fill(model, self.folder, device)
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and is_of_the_machine(error):
                raise
            log.warning(f"the base kept in {self.folder} cannot be read ({error}), and is made again")
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        with suppress(OSError):
            self.folder.touch()  # the oldest goes first
        log.info("base: read in 4 bit, as an earlier run kept it")
        return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, and of packed ones the tensors of their state behind their names."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from ((f"{name}.{_STATE}{part}", tensor) for part, tensor in state.as_dict(packed=True).items())
    yield from model.named_buffers()


def _write(model: nn.Module, folder: Path) -> None:
    files: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in _tensors(model):
        if files[-1] and sizes[-1] + tensor.nbytes > FILE_BYTES:
            files.append({})
            sizes.append(0)
        files[-1][name] = tensor.detach()
        sizes[-1] += tensor.nbytes
    noted = {FILE.format(number): list(tensors) for number, tensors in enumerate(files)}
    with ThreadPoolExecutor(_at_once(sizes)) as pool:
        hashes = pool.map(_write_file, files, [folder / name for name in noted])
        write_json(folder / META, {"files": noted, "xxh3_128": dict(zip(noted, hashes, strict=True))})


def _at_once(sizes: Sequence[int]) -> int:
    """How many files of these sizes are held in memory: one where a tensor alone is larger than most files."""
    return 1 if max(sizes, default=0) > 2 * FILE_BYTES else AT_ONCE


def _write_file(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Write a file; returns its hash."""
    # Buffers may share memory, which the format has no word for.
    copies = {name: torch.empty(one.shape, dtype=one.dtype).copy_(one) for name, one in tensors.items()}
    save_file(copies, file)
    return quick_hash(file)


def _read_file(file: Path, names: Iterable[str], hash_of: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file that was written.

    Raises:
        ValueError: it holds other bytes.
    """
    if quick_hash(file) != hash_of:
        raise ValueError(f"{file.name} holds other bytes than were written")
    with safe_open(file, framework="pt", device=str(device)) as stream:
        return {name: stream.get_tensor(name) for name in names}


def _built(
    base: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationConfigMixin,
    attention: str | None,
) -> PreTrainedModel:
    """The model without values, as transformers builds it before it reads weights (`from_pretrained`)."""
    found = language_model(base)
    vars(found.config).pop("quantization_config", None)
    quantizer, config, placed = get_hf_quantizer(found.config, quantization, {"": device}, None, {})
    quantizer.pre_quantized = True
    config.name_or_path = str(base)
    with torch.device("meta"):
        model = found.auto.from_config(config, attn_implementation=attention, dtype=dtype, trust_remote_code=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=placed, checkpoint_files=None)
    model = as_language_model(model, found)
    with suppress(OSError):  # a base without one
        model.generation_config = GenerationConfig.from_pretrained(base, local_files_only=True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


def _fill(model: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Put what is kept into a model without values.

    Raises:
        ValueError: another set of tensors is kept than the model has, or other bytes than were written.
    """
    import bitsandbytes

    kept: dict[str, Tensor] = {}
    noted = read_json(folder / META)
    files = noted["files"]
    with ThreadPoolExecutor(_at_once([(folder / file).stat().st_size for file in files])) as pool:
        read = pool.map(lambda file: _read_file(folder / file, files[file], noted["xxh3_128"][file], device), files)
        for tensors in read:
            kept |= tensors
    states: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in kept if f".{_STATE}" in name]:
        of, _, part = name.partition(f".{_STATE}")
        states.setdefault(of, {})[part] = kept.pop(name)
    wanted = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if wanted != kept.keys():
        raise ValueError(f"{len(wanted ^ kept.keys())} tensors differ")
    for name, tensor in kept.items():
        module, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if last in module._buffers:
            module._buffers[last] = tensor
        elif name in states:
            linear = module if isinstance(module, bitsandbytes.nn.Linear4bit) else None
            packed = bitsandbytes.nn.Params4bit.from_prequantized(tensor, states[name], device=device, module=linear)
            module.register_parameter(last, packed)
        else:
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    model.tie_weights()
    if left := [name for name, tensor in _values(model) if tensor.is_meta]:
        raise ValueError(f"{len(left)} tensors have no value, such as {left[0]}")


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module has, those that are no parameter and no buffer included."""
    for name, module in model.named_modules():
        held: Mapping[str, Any] = {**vars(module), **module._parameters, **module._buffers}
        yield from ((f"{name}.{key}", value) for key, value in held.items() if isinstance(value, Tensor))
