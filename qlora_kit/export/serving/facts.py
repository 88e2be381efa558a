"""What the serving files are written from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qlora_kit.core.verdict import Verdict
from qlora_kit.export.serving.commands import ServeCommand, Served
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory


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
    def name(self) -> str:
        """As recipes name it."""

    @property
    def hub(self) -> Hub:
        """What a model hub is told of it."""

    def serve_commands(self, served: Served) -> list[ServeCommand]:
        """The commands that serve the artifact, a server each."""

    def serving_note(self, facts: "ServingFacts") -> str:
        """What else the model card says of serving it."""

    def write_server_files(self, folder: Path, facts: "ServingFacts") -> list[str]:
        """Write the files that its servers want beside it, and return their names."""


@dataclass(frozen=True)
class ServingFacts:
    """One artifact and where it comes from.

    Attributes:
        name: of the artifact; servers get it as the model's name.
        format: what it is written as.
        file: the path inside the artifact's folder that a reader opens; `.` for a folder.
        settings: the target's fields.
        tokenizer: the one that the run trained with.
        run: None for a base model.
        directory: the run's, or that of the exports of a base: its data.json names the rows.
        seed: of the run.
        fidelity: measured values by name.
        faults: why the artifact is rejected; none for a good one.
        unquantized: layers that stay in 16 bit by the format's limits, as the manifest has them; empty for none.
        uncalibrated: what calibration rows told nothing of, as the manifest has it; empty for nothing.
        verdict: on the artifact.
        is_unpacked: transformers reads it only with its weights unpacked by the kit.
    """

    name: str
    format: ServedFormat
    file: str
    base: Base
    tokenizer: Any
    settings: Mapping[str, object] = field(default_factory=dict)
    run: RunDirectory | None = None
    directory: RunDirectory | None = None
    seed: int | None = None
    fidelity: Mapping[str, object] = field(default_factory=dict)
    faults: Sequence[str] = ()
    verdict: Verdict = Verdict.not_measured
    unquantized: Mapping[str, object] = field(default_factory=dict)
    uncalibrated: Mapping[str, object] = field(default_factory=dict)
    is_unpacked: bool = False
