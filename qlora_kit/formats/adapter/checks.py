"""What an adapter beside its base asks of the base and of itself."""

from collections.abc import Mapping
from typing import Any

from qlora_kit.export.checks.form import ModelForm
from qlora_kit.formats.adapter.lora_gguf import refuse_changed_base, refuse_unplaced
from qlora_kit.formats.gguf.architectures import find_architecture
from qlora_kit.schema.export import AdapterFormat, AdapterTarget


def refuse_unfit(target: AdapterTarget, form: ModelForm, settings: Mapping[str, Any]) -> None:
    """Refuse an adapter that servers have no place for.

    Args:
        settings: of the trained adapter.

    Raises:
        RecipeError: it fits only a base that its start has changed, or llama.cpp has no place for what it holds.
    """
    refuse_changed_base(settings)
    if target.format is AdapterFormat.gguf:
        find_architecture(form.config)
        refuse_unplaced(settings)
