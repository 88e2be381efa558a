"""Where llama.cpp's converter lies, and which architectures it knows, read from its text without running it."""

import ast
import importlib.util
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.extras import missing_extra, require
from qlora_kit.export.checks.fault import ELSEWHERE
from qlora_kit.families.converted import CONVERTER_NAMES, UNFAITHFUL, converted_fixed
from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf.architectures import fixed_otherwise, refuse_quantized
from qlora_kit.formats.gguf.converter import EXTRA, PACKAGE

_INSIDE = Path("export", "export_to_gguf", "conversion")
_NEEDED_FOR = "writing a GGUF file of this architecture"


class UnknownArchitectureError(RecipeError):
    """No GGUF file can be made of an architecture, whatever its settings are."""


def find_converter() -> Path | None:
    """Folder of the converter's package `conversion`; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # of a top-level package: it is not imported
    folders = [Path(place) / _INSIDE for place in (spec.submodule_search_locations or []) if spec] if spec else []
    return next((folder for folder in folders if (folder / "__init__.py").is_file()), None)


def converter_folder() -> Path:
    """The same.

    Raises:
        RecipeError: it is not installed.
    """
    folder = find_converter()
    if folder is None:
        raise missing_extra(PACKAGE, _NEEDED_FOR, EXTRA)
    return folder


@lru_cache(maxsize=4)
def known_architectures(folder: Path) -> Mapping[str, str]:
    """What config.json calls an architecture, to the name of the converter's enumeration for it in llama.cpp.

    Multimodal models are in it with their text part.
    """
    listed = _text_models(ast.parse((folder / "__init__.py").read_text("utf-8")))
    found: dict[str, str] = {}
    for module in sorted(set(listed.values())):
        classes = dict(_registered(ast.parse((folder / f"{module}.py").read_text("utf-8"))))
        found |= {name: kind for name, kind in classes.items() if listed.get(name) == module}
    return found


@dataclass(frozen=True)
class Known:
    """An architecture that can be converted: the converter's name of it, and llama.cpp's."""

    registered: str
    llama_cpp: str


def find_known(config: ConfigFields) -> Known:
    """How a model is converted.

    transformers writes some class names in other letter case than the checkpoints that the converter was made for.

    Raises:
        UnknownArchitectureError: the converter does not know the architecture, it knows one that the installed packages
            gguf or xllamacpp have not, or llama.cpp computes it otherwise.
        RecipeError: the converter is not installed, llama.cpp has fixed a setting that config.json says otherwise, or
            the weights are quantized already.
    """
    folder, gguf = converter_folder(), require("gguf", _NEEDED_FOR, EXTRA)
    known = {name.lower(): (name, kind) for name, kind in known_architectures(folder).items()}
    known |= {name.lower(): named for name, named in CONVERTER_NAMES.items()}
    text = config.get("text_config") or {}
    stated = [*(config.get("architectures") or []), *(text.get("architectures") or []), *_class_of({**config, **text})]
    registered, kind = next((known[name.lower()] for name in stated if name.lower() in known), ("", ""))
    written = gguf.MODEL_ARCH_NAMES.get(getattr(gguf.MODEL_ARCH, kind, None)) if kind else None
    if not registered:
        raise _unknown(stated, "llama.cpp's converter does not know it")
    if written is None:
        raise _unknown(stated, "the installed package gguf does not know it")
    if not is_read_by_llama_cpp(written):
        raise _unknown(stated, "the llama.cpp of the installed package xllamacpp does not read it")
    if written in UNFAITHFUL:
        raise _unknown(stated, UNFAITHFUL[written])
    refuse_quantized(config)
    for field, expected in converted_fixed(written, config):
        raise fixed_otherwise(field, expected)
    return Known(registered, str(written))


def _class_of(text: ConfigFields) -> list[str]:
    """transformers' class of a text model by its type, which is all that a section of a config.json names."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(text.get("model_type")))
    return [] if name is None else [name]


def _unknown(stated: Sequence[str], why: str) -> UnknownArchitectureError:
    what = f"no GGUF export for the architecture {stated[0] if stated else '(none)'}: {why}"
    return UnknownArchitectureError(what, where="config.json, architectures", fix=ELSEWHERE)


def _text_models(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP" and node.value:
            listed: dict[str, str] = ast.literal_eval(node.value)
            return listed
    return {}


def _registered(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that a module's classes are registered under, with the `MODEL_ARCH` of each class."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        kind = next((found for line in node.body if (found := _model_arch(line))), None)
        if kind is None or kind == "MMPROJ":
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "attr", "") == "register":
                for given in decorator.args:
                    if isinstance(given, ast.Constant):
                        yield str(given.value), kind


def _model_arch(line: ast.stmt) -> str | None:
    is_it = isinstance(line, ast.Assign) and any(getattr(one, "id", "") == "model_arch" for one in line.targets)
    return line.value.attr if is_it and isinstance(line, ast.Assign) and isinstance(line.value, ast.Attribute) else None


@lru_cache(maxsize=256)
def is_read_by_llama_cpp(name: str) -> bool:
    """Whether llama.cpp, in the wheel of xllamacpp, has an architecture of that name; True where that is not there."""
    spec = importlib.util.find_spec("xllamacpp")
    folder = next(iter(spec.submodule_search_locations or []), None) if spec else None
    library = next(Path(folder).glob("xllamacpp*.so"), None) if folder else None
    if library is None:
        return True
    with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode() + b"\0") >= 0
