"""What servers require of an artifact's own files, for machines where the server itself is not there.

Tables of keys and allowed values, from the servers' documentation and their configuration classes:
https://docs.vllm.ai/en/latest/features/quantization/ and https://docs.sglang.io/advanced_features/quantization.html.
They tell a file that a server refuses; they do not tell that it answers well.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json
from qlora_kit.data.template.ollama import MODELFILE, Modelfile

GGUF_MAGIC = b"GGUF"
VLLM, SGLANG, OLLAMA = "vLLM", "SGLang", "Ollama"
SERVERS_OF_FORMAT = {
    "merged": (VLLM, SGLANG),
    "gptq": (VLLM, SGLANG),
    "awq": (VLLM, SGLANG),
    "awq_gemv": (),
    "compressed": (VLLM, SGLANG),
    "bnb": (VLLM,),
    "adapter": (VLLM, SGLANG),
    "gguf": (OLLAMA,),
}


@dataclass(frozen=True)
class Required:
    """A key of a JSON object, other names that it goes by, and the values it may have; none means any."""

    names: tuple[str, ...]
    allowed: tuple[object, ...] = ()

    def problem(self, settings: Mapping[str, Any], where: str) -> str | None:
        """What is wrong with it, if anything."""
        found = next((name for name in self.names if name in settings), None)
        if found is None:
            return f"{where} has no {' or '.join(self.names)}"
        if self.allowed and settings[found] not in self.allowed:
            shown = ", ".join(map(str, self.allowed))
            return f"{where}: {found} is {settings[found]}, which may be {shown}"
        return None


_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
_QUANTIZATION: dict[str, tuple[Required, ...]] = {
    "gptq": (
        Required(("quant_method",), ("gptq",)),
        Required(("bits",), (2, 3, 4, 8)),
        Required(("group_size",)),
        Required(("desc_act",), (True, False)),
    ),
    "awq": (
        Required(("quant_method",), ("awq",)),
        Required(("bits", "w_bit"), (4,)),
        Required(("group_size", "q_group_size")),
        Required(("zero_point",), (True, False)),
    ),
    "compressed": (
        Required(("quant_method",), ("compressed-tensors",)),
        Required(("format",), _COMPRESSED_FORMATS),
        Required(("config_groups",)),
        Required(("ignore",)),
    ),
    "bnb": (Required(("quant_method",), ("bitsandbytes",)),),
}
# vLLM's PEFTHelper and SGLang's LoRA manager refuse adapters that are more than low-rank products.
_ADAPTER = (
    Required(("peft_type",), ("LORA",)),
    Required(("r",)),
    Required(("lora_alpha",)),
    Required(("target_modules",)),
    Required(("bias",), ("none",)),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def static_problems(format_name: str, server: str, folder: Path, file: str) -> list[str]:
    """What a server would refuse in an artifact's own files; empty where nothing is found."""
    if format_name == "gguf":
        return list(_gguf(folder, folder / file))
    if format_name == "adapter":
        return list(_adapter(folder))
    return list(_model(format_name, server, folder))


def _model(format_name: str, server: str, folder: Path) -> Iterator[str]:
    path = folder / "config.json"
    if not path.is_file():
        yield "there is no config.json"
        return
    config = read_json(path)
    for required in (Required(("architectures",)), Required(("model_type",)), Required(("vocab_size",))):
        yield from _said(required.problem(config.get("text_config", config) | config, path.name))
    yield from _files(folder)
    settings = config.get("quantization_config")
    if format_name == "merged":
        if settings is not None:
            yield "config.json holds a quantization_config, but the weights are 16-bit"
        return
    if not isinstance(settings, dict):
        yield "config.json has no quantization_config, so servers would read the weights as 16-bit ones"
        return
    where = "config.json, quantization_config"
    for required in _QUANTIZATION.get(format_name, ()):
        yield from _said(required.problem(settings, where))
    yield from _SPECIAL.get(format_name, _nothing)(settings, server)


def _files(folder: Path) -> Iterator[str]:
    if not any(folder.glob("*.safetensors")):
        yield "there is no *.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            yield f"weight files named by {index.name} are missing: {', '.join(missing)}"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"there is no tokenizer ({', '.join(_TOKENIZERS)})"


def _compressed(settings: Mapping[str, Any], server: str) -> Iterator[str]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        yield "quantization_config: config_groups is empty, so nothing would be read as quantized"
        return
    for name, group in groups.items():
        if not group.get("targets"):
            yield f"quantization_config: {name} has no targets"
        weights = group.get("weights") or {}
        if weights.get("num_bits") not in (4, 8):
            yield f"quantization_config: {name} has weights of {weights.get('num_bits')} bits; {server} reads 4 and 8"


def _bnb(settings: Mapping[str, Any], server: str) -> Iterator[str]:
    if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        yield "quantization_config says neither load_in_4bit nor load_in_8bit"
    if settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") not in ("nf4", "fp4"):
        yield f"quantization_config: bnb_4bit_quant_type is {settings.get('bnb_4bit_quant_type')}; nf4 and fp4 are read"


def _nothing(settings: Mapping[str, Any], server: str) -> Iterator[str]:
    yield from ()


_SPECIAL: dict[str, Callable[[Mapping[str, Any], str], Iterator[str]]] = {
    "compressed": _compressed,
    "bnb": _bnb,
}


def _adapter(folder: Path) -> Iterator[str]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        yield "there is no adapter_config.json"
        return
    config = read_json(path)
    for required in _ADAPTER:
        yield from _said(required.problem(config, path.name))
    if config.get("use_dora"):
        yield f"{path.name}: use_dora is true, which servers of LoRA do not serve; merge the adapter"
    if config.get("modules_to_save"):
        yield f"{path.name}: modules_to_save is set, which servers of LoRA do not serve; merge the adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        yield "there is no adapter_model.safetensors"


def _gguf(folder: Path, file: Path) -> Iterator[str]:
    if not file.is_file():
        yield f"there is no {file.name}"
        return
    with file.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            yield f"{file.name} is not a GGUF file"
    modelfile = folder / MODELFILE
    if not modelfile.is_file():
        yield "there is no Modelfile for ollama create"
        return
    try:
        source = Modelfile.read(modelfile.read_text(encoding="utf-8")).source
    except ValueError as error:
        yield str(error)
        return
    if (folder / source).resolve() != file.resolve():
        yield f"the Modelfile's FROM names {source}, not ./{file.name}"


def _said(problem: str | None) -> Iterator[str]:
    if problem is not None:
        yield problem
