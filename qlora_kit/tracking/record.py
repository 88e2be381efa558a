"""What the run directory knows of its services: under which id each goes on, and what each has been told."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlora_kit.core.files import read_json, write_json

FILE = "tracker.json"


@dataclass
class Known:
    """One service of a run.

    Attributes:
        place: the server's address without secrets; empty for the run directory.
        id: of the run there.
        told: metric -> the last step of it that the service was told.
        is_complete: it was told all that metrics.jsonl held; false from its first failure on.
    """

    place: str
    id: str
    told: dict[str, int] = field(default_factory=dict)
    is_complete: bool = True

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """The service has been told of a step."""
        for name in metrics:
            self.told[name] = max(step, self.told.get(name, step))

    def untold(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step that the service does not have."""
        return {name: value for name, value in metrics.items() if step > self.told.get(name, -1)}

    def rewind(self, step: int) -> None:
        """The service forgot what came after a step."""
        self.told = {name: min(last, step) for name, last in self.told.items()}


def read_known(folder: Path, service: str, place: str) -> Known:
    """What is known of a service; new where nothing is, or where the run was recorded at another place."""
    try:
        record = read_json(folder / FILE).get(service)
        known = Known(**record) if isinstance(record, dict) else None
    except (OSError, ValueError, TypeError):
        known = None
    return known if known and known.place == place else Known(place, "")


def write_known(folder: Path, service: str, known: Known) -> None:
    """Store what is known of a service beside the others."""
    try:
        others = dict(read_json(folder / FILE))
    except (OSError, ValueError):
        others = {}
    write_json(folder / FILE, {**others, service: asdict(known)})
