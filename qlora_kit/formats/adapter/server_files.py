"""What servers of LoRA require of an adapter's files, for machines where they are not there."""

from collections.abc import Iterator
from pathlib import Path

from qlora_kit.adapter.saved import CONFIG, WEIGHTS
from qlora_kit.core.files import read_json
from qlora_kit.evaluation.servers.requirements import Required, required_problems

# vLLM's PEFTHelper and SGLang's LoRA manager refuse adapters that are more than low-rank products.
_ADAPTER = (
    Required(("peft_type",), ("LORA",)),
    Required(("r",)),
    Required(("lora_alpha",)),
    Required(("target_modules",)),
    Required(("bias",), ("none",)),
)


def adapter_problems(folder: Path) -> Iterator[str]:
    """What is wrong with them."""
    path = folder / CONFIG
    if not path.is_file():
        yield f"there is no {CONFIG}"
        return
    config = read_json(path)
    yield from required_problems(_ADAPTER, config, path.name)
    if config.get("use_dora"):
        yield f"{path.name}: use_dora is true, which servers of LoRA do not serve; merge the adapter"
    if config.get("modules_to_save"):
        yield f"{path.name}: modules_to_save is set, which servers of LoRA do not serve; merge the adapter"
    if not (folder / WEIGHTS).is_file():
        yield f"there is no {WEIGHTS}"
