"""The base model that a run is of, and its names."""

from dataclasses import dataclass
from pathlib import Path

from qlora_kit.adapter.saved import BaseName
from qlora_kit.model.source import hub_name
from qlora_kit.schema.model import ModelConfig


@dataclass(frozen=True)
class Base:
    """The base model: as the recipe names it, and where it lies."""

    source: str
    folder: Path
    revision: str | None = None

    @classmethod
    def of(cls, model: ModelConfig, folder: Path) -> "Base":
        """The base of a recipe."""
        return cls(model.source, folder, model.revision)

    @property
    def hub_id(self) -> str | None:
        """`owner/name` where the base came from the hub; None for a local folder."""
        found = hub_name(self.source, self.revision)
        return found[0] if found else None

    @property
    def name(self) -> BaseName:
        """What a reader of an adapter loads under it: the hub's name, else the folder as the recipe names it."""
        return BaseName(*(hub_name(self.source, self.revision) or (self.source, self.revision)))

    @property
    def shown(self) -> str:
        """A name to print: the hub's, else the folder's last part; a path may hold what is nobody's business."""
        return self.hub_id or Path(self.source).name or self.folder.resolve().name
