"""What the serving files are written from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qlora_kit.adapter.saved import BaseName
from qlora_kit.core.verdict import Verdict
from qlora_kit.export.serving.commands import ServeCommand, Served
from qlora_kit.model.source import hub_name
from qlora_kit.runs.directory import RunDirectory


@dataclass(frozen=True)
class BaseFacts:
    """The base model: as the recipe names it, and where it lies."""

    source: str
    folder: Path
    revision: str | None = None

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


@dataclass(frozen=True)
class Hub:
    """How a hub files a format.

    Attributes:
        library: that reads it.
        relation: to the base.
        tags: that users search by.
    """

    library: str
    relation: str
    tags: tuple[str, ...] = ()


class ServedFormat(Protocol):
    """What the serving files ask of a format."""

    @property
    def name(self) -> str: ...
    @property
    def hub(self) -> Hub: ...
    def commands(self, served: Served) -> list[ServeCommand]: ...
    def beside(self, facts: "ServingFacts") -> str: ...
    def write_beside(self, folder: Path, facts: "ServingFacts") -> list[str]: ...


@dataclass(frozen=True)
class ServingFacts:
    """One artifact and where it comes from.

    Attributes:
        name: of the artifact; servers get it as the model's name.
        format: what it is written as.
        file: the path inside the artifact's folder that a reader opens; `.` for a folder.
        settings: the target's fields.
        tokenizer: the one that the run trained with.
        run: None for a base that was never trained.
        directory: the run's, or that of the exports of a base: its data.json names the rows.
        seed: of the run.
        fidelity: measured values by name.
        faults: why the artifact is rejected; none for a good one.
        left: layers that stay in 16 bit by the format's limits, as the manifest has them; empty for none.
        verdict: on the artifact.
    """

    name: str
    format: ServedFormat
    file: str
    base: BaseFacts
    tokenizer: Any
    settings: Mapping[str, object] = field(default_factory=dict)
    run: RunDirectory | None = None
    directory: RunDirectory | None = None
    seed: int | None = None
    fidelity: Mapping[str, object] = field(default_factory=dict)
    faults: Sequence[str] = ()
    verdict: Verdict = Verdict.not_measured
    left: Mapping[str, object] = field(default_factory=dict)
