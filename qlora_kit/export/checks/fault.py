"""What does not fit, the line that mends it, and what is left out by a format's limits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_kit.core.errors import Problem
from qlora_kit.core.shell import hydra_value, shell_line

Target = TypeVar("Target")
ELSEWHERE = "export=merged_16bit"  # what every model can be written as
_SHOWN = 4  # kinds of layers in a line


@dataclass(frozen=True)
class Fault:
    """What a target's field asks of a model that it has not."""

    field: str
    what: str


@dataclass(frozen=True)
class Unquantized:
    """Layers that a format leaves in 16 bit.

    Attributes:
        names: of these layers.
        of: linear layers in all, each expert's weights counted as one.
        why: in words.
    """

    names: tuple[str, ...]
    of: int
    why: str

    def __str__(self) -> str:
        kinds = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in self.names})
        more = ", ..." if len(kinds) > _SHOWN else ""
        named = f"{', '.join(kinds[:_SHOWN])}{more}"
        return f"{len(self.names)} of {self.of} linear layers stay in 16 bit ({named}): {self.why}"

    def record(self) -> dict[str, object]:
        """The manifest's entry."""
        return {"layers": list(self.names), "of": self.of, "why": self.why}


def with_fixes(
    path: str,
    faults: Sequence[Fault],
    candidates: Callable[[Fault], Iterable[tuple[str, object, Target]]],
    faults_of: Callable[[Target], Sequence[Fault]],
) -> Iterator[Problem]:
    """Each fault with the first setting that was tried and found to mend it.

    Args:
        path: of the target, such as `export.merged.merged_16bit`.
        candidates: a field, a value, and the target with it, likely ones first.
        faults_of: the rules; a candidate mends a fault if its field is at fault no more, and no other one is now.
    """
    others = {fault.field for fault in faults}
    for fault in faults:
        fix = ELSEWHERE
        for name, value, changed in candidates(fault):
            if {left.field for left in faults_of(changed)} <= others - {fault.field}:
                fix = shell_line([f"{path}.{name}={hydra_value(value)}"])
                break
        yield Problem(fault.what, f"{path}.{fault.field}", fix)
