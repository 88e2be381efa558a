"""A service that cannot stop a training: it is told each point once, and put on the shelf when it fails."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.secrets import masked
from qlora_kit.core.terminal import printable
from qlora_kit.tracking.record import Known, write_known
from qlora_kit.tracking.service import Ending, Service

Row = Mapping[str, float]


class KeptService:
    """One service of a run, and what it has been told."""

    def __init__(self, name: str, service: Service | None, known: Known, folder: Path, why_not: str = "") -> None:
        self.name = name
        self._service = service
        self._known = known
        self._folder = folder
        if service is None:
            self._shelve(why_not)

    def catch_up(self, logged: Iterable[Row], kept_step: int) -> None:
        """Tell the service what metrics.jsonl holds and it does not.

        Args:
            logged: rows that were written before this process, those after `kept_step` too.
            kept_step: that training goes on from.
        """
        if self._service is None:
            return
        logged = list(logged)
        if self._known.is_complete and self._known.id:
            for row in logged:
                self._known.note(int(row["step"]), row)
        if self._service.rewinds:
            self._known.rewind(kept_step)
        self._known.id, self._known.is_complete = self._service.id, True
        for row in logged:
            if row["step"] <= kept_step:
                self.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        self._store()

    def log(self, step: int, metrics: Row) -> None:
        """Tell the service of a step, unless it is on the shelf or was told before."""
        untold = self._known.untold(step, metrics)
        if self._service is None or not untold:
            return
        try:
            self._service.log(step, untold)
        except Exception as error:  # whatever a library raises: no service stops a training
            self._shelve(f"at step {step}: {reason(error)}")
        else:
            self._known.note(step, untold)

    def finish(self, ending: Ending) -> None:
        """Mark the run as it ended; says so where the service's record has gaps."""
        if self._service is not None:
            try:
                self._service.finish(ending)
            except Exception as error:
                self._shelve(f"while the run was closed: {reason(error)}")
        self._store()
        if not self._known.is_complete:
            log.warning(f"tracker: the record of {self.name} is incomplete; metrics.jsonl holds every step")

    def _shelve(self, why: str) -> None:
        self._service = None
        self._known.is_complete = False
        log.warning(f"tracker: {self.name} failed {why}; training goes on without it")
        self._store()

    def _store(self) -> None:
        try:
            write_known(self._folder, self.name, self._known)
        except OSError as error:
            log.warning(f"tracker: cannot note in the run directory what {self.name} was told: {reason(error)}")


def reason(error: BaseException) -> str:
    """A library's error in one line, without secrets."""
    lines = str(error).strip().splitlines()
    return printable(masked(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__))[:300]
