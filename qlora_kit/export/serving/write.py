"""The one door: every file beside an artifact that its servers and readers need."""

from pathlib import Path

from qlora_kit.export.license import copy_license
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.export.serving.generation_config import write_generation_config
from qlora_kit.export.serving.lock import write_lock
from qlora_kit.export.serving.model_card import write_model_card


def write_serving_files(folder: Path, facts: ServingFacts) -> list[str]:
    """Write the model card, lock file, license, and, by format, the generation config and what its servers need.

    Args:
        folder: the artifact's, complete but for these files; what a quantizer left under their names is replaced.

    Returns:
        The names of the files written.
    """
    written = [write_model_card(folder, facts), write_lock(folder, facts), *copy_license(facts.base.folder, folder)]
    if (folder / "config.json").is_file():
        written.append(write_generation_config(folder, facts.base.folder, facts.tokenizer))
    return [*written, *facts.format.write_server_files(folder, facts)]
