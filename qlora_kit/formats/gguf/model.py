"""A model as a GGUF file will hold it, before a mix gives its tensors types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RunError
from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf.architectures import extra_tensors, find_architecture, has_own_rules
from qlora_kit.formats.gguf.metadata import add_hyper_parameters, read_full_config
from qlora_kit.formats.gguf.mixes import MixContext
from qlora_kit.formats.gguf.tensors import PlannedTensor, named_tensors
from qlora_kit.weights.float_rows import find_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from qlora_kit.formats.gguf.converter.convert import Conversion

    Extras = Mapping[str, npt.NDArray[np.float32]]

_TOWERS = {"vision_config", "audio_config"}
_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GgufModel:
    """Names, values and keys of a model.

    Attributes:
        architecture: llama.cpp's name of it.
        marker: of the family: see `GgufRules`.
        config: fields of config.json, those of the text part at the top.
        tensors: without types.
        extras: tensors that are computed from the configuration, float32.
        shape: what the type rules look at.
        add_keys: writes the hyper-parameters through an open `gguf.GGUFWriter`.
        split: the converter's name of how the tokenizer splits text; empty where the kit knows one, or neither does.
    """

    architecture: str
    marker: str
    config: ConfigFields
    tensors: Sequence[PlannedTensor]
    extras: "Extras"
    shape: MixContext
    add_keys: "Callable[[Any], None]"
    split: str = ""

    @property
    def rows(self) -> int:
        """Rows of the token embedding.

        Raises:
            RunError: there is none.
        """
        found = next((tensor.stored.rows for tensor in self.tensors if tensor.name == _EMBEDDING), None)
        if found is None:
            raise RunError("the model has no token embedding, without which llama.cpp reads no file")
        return found


def read_gguf_model(model_dir: Path, conversion: "Conversion | None") -> GgufModel:
    """The model of a folder: by the kit's own rules where its family has some, else through llama.cpp's converter.

    Args:
        conversion: of this folder.

    Raises:
        RecipeError: an architecture, or a setting of it, that neither writes.
        RunError: the converter failed.
    """
    config = read_full_config(model_dir)
    if not has_own_rules(config) and conversion is not None:
        if towers := sorted(name.removesuffix("_config") for name in _TOWERS & config.keys() if config[name]):
            log.info(f"GGUF: the text model alone; its {' and '.join(towers)} part, llama.cpp's mmproj, is not written")
        return conversion.model(config)
    rules = find_architecture(config)
    tensors, shape = named_tensors(find_tensors(model_dir), rules, config)
    rows = next(tensor.stored.rows for tensor in tensors if tensor.name == _EMBEDDING)

    def add_keys(writer: Any) -> None:
        add_hyper_parameters(writer, rules, config, rows)

    return GgufModel(rules.name, rules.marker, config, tensors, extra_tensors(rules, config), shape, add_keys)
