"""Whether a saved adapter is one that the kit could have trained, by its two files, before a weight is loaded.

peft reads its settings as expressions to match names with and as code paths to take: what the kit never writes there is
refused by name, for a library would hang, raise, or load something else than was trained.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_kit.adapter.saved import CONFIG, PREFIX, WEIGHTS
from qlora_kit.adapter.updates import read_adapter
from qlora_kit.core.errors import DamagedFileError, Problem
from qlora_kit.core.files import read_json
from qlora_kit.core.patterns import matched, whole_or_end
from qlora_kit.weights.headers import read_header, read_headers

# Of peft's settings those that the kit sets, and those that say nothing where their switch is off.
_SET = {
    *("base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
    *("target_parameters", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("ensure_weight_tying", "fan_in_fan_out"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # of initial values, which training replaced
    *("megatron_core", "qalora_group_size"),
}
_OFF: tuple[object, ...] = (None, False, "none", "", 0, [], {})
_NAME = re.compile(r"[\w.-]+")
_AGAIN = "fetch or copy the adapter again"
_SHOWN = 80  # signs of a stranger's value


def refuse_strange_adapter(folder: Path, base_folder: Path) -> None:
    """Refuse an adapter whose settings are not the kit's, or do not fit its tensors.

    Args:
        base_folder: whose tensors' names the patterns are tried on too.
    Raises:
        DamagedFileError: with everything that is wrong with the settings, or the first that is wrong with the tensors.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        read_adapter(folder, merges=False)  # says which
    try:
        config = read_json(path)
    except ValueError as error:
        raise DamagedFileError(f"{path} cannot be read: {error}", str(path), _AGAIN) from error
    held = [tensor.name for tensor in read_header(folder / WEIGHTS)]
    faults = [*_settings(config), *_saved(config, held)]
    faults = faults or list(_patterns(config, {*_modules(held), *_base_modules(base_folder)}))
    if faults:
        raise DamagedFileError([Problem(f"{path} {fault}", str(path), _AGAIN) for fault in faults])
    read_adapter(folder, merges=False)


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"is of an adapter of the kind {_shown(config.get('peft_type'))}; the kit's are LORA"
        return
    odd = {key: value for key, value in config.items() if key not in _SET and value not in _OFF}
    usual = _defaults() if odd else {}
    for key, value in odd.items():
        if key not in usual or usual[key] != value:
            yield f"has {key[:_SHOWN]}={_shown(value)}, which no adapter of the kit has"
    for key in ("use_rslora", "use_dora", "ensure_weight_tying", "fan_in_fan_out", "inference_mode"):
        if not isinstance(config.get(key, False), bool):
            yield f"has {key}={_shown(config[key])}, which is neither true nor false"
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = config.get(key)
        if value is not None and not _are_names(value):
            yield f"has {key}={_shown(value)}, which is no list of names"


def _defaults() -> Mapping[str, Any]:
    """Settings of the installed peft that nobody set, which a release may add with a value of its own."""
    from peft import LoraConfig

    found: dict[str, Any] = LoraConfig().to_dict()
    return found


def _saved(config: Mapping[str, Any], held: Collection[str]) -> Iterator[str]:
    names = config.get("modules_to_save") or []
    for name in names if _are_names(names) else []:
        if not any(f".{name}." in one for one in held):
            yield f"names {name[:_SHOWN]} under modules_to_save, and {WEIGHTS} holds no such module"
    stacks = config.get("target_parameters") or []
    for name in stacks if _are_names(stacks) else []:
        if not any(f".{name.rpartition('.')[0]}." in one and ".lora_A" in one for one in held):
            yield f"names {name[:_SHOWN]} under target_parameters, and {WEIGHTS} holds no factors of it"


def _patterns(config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if not isinstance(patterns, dict):
            continue  # told where its numbers are read
        expressions = {pattern: whole_or_end(pattern) for pattern in patterns}
        found = matched(expressions.values(), sorted(names))
        for pattern, expression in expressions.items():
            if isinstance(fault := found[expression], str):
                yield f"names {pattern[:_SHOWN]} under {key}, {fault}"


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


def _modules(held: Collection[str]) -> set[str]:
    return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in held}


def _base_modules(folder: Path) -> set[str]:
    with suppress(DamagedFileError):  # told where the base is opened
        return {name.removesuffix(".weight") for name in read_headers(folder)}
    return set()


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
