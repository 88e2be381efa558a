"""Every export format by its name, and the targets of a recipe with theirs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.adapter.format import Adapter, GgufAdapter
from qlora_kit.formats.awq.format import Awq, AwqGemv
from qlora_kit.formats.bnb.format import Bnb
from qlora_kit.formats.compressed.format import Compressed
from qlora_kit.formats.format import Format
from qlora_kit.formats.fp8_block.format import Fp8Block
from qlora_kit.formats.gguf.format import Gguf
from qlora_kit.formats.gptq.format import Gptq
from qlora_kit.formats.job import ExportJob, ExportSource
from qlora_kit.formats.merged.format import Merged
from qlora_kit.schema.export import ExportConfig

FORMATS: dict[str, Format[Any]] = {
    one.name: one
    for one in (Merged(), Gptq(), Awq(), AwqGemv(), Compressed(), Bnb(), Fp8Block(), Gguf(), Adapter(), GgufAdapter())
}


def find_format(name: str) -> Format[Any]:
    """The format of a name that a manifest holds.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in FORMATS:
        raise RecipeError(f"no reader for the format '{name}'; there are {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Requested:
    """A file that a recipe asks for.

    Attributes:
        path: of its target, such as `export.merged.merged_16bit`.
    """

    name: str
    path: str
    target: Any
    format: Format[Any]


def requested(export: ExportConfig) -> Iterator[Requested]:
    """The files of a recipe, in the order of its groups."""
    for one in export.targets():
        found = next(each for each in FORMATS.values() if each.group == one.group and each.accepts(one.target))
        yield Requested(one.name, one.path, found.with_shared(one.target, export), found)


def export_jobs(export: ExportConfig, source: ExportSource) -> Iterator[ExportJob]:
    """The jobs of a recipe, quick ones first."""
    made: dict[str, Callable[[str, Any], ExportJob]] = {}
    for asked in sorted(requested(export), key=lambda one: one.format.order):
        if asked.format.name not in made:
            made[asked.format.name] = asked.format.jobs(source)
        yield made[asked.format.name](asked.name, asked.target)
