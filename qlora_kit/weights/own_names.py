"""Two names of one weight: in the model that is trained, and in the class of its checkpoint.

They differ where a checkpoint holds more than a language model, whose class holds the language model as a part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_NOTED = "_own_names"


@dataclass(frozen=True)
class OwnNames:
    """How names begin in the trained model, and in its checkpoint's own class.

    Attributes:
        begins: what a name begins with in the trained model, and in the own class; none where both are one class.
        outside: modules of the own class that are no part of its language model.
    """

    begins: Mapping[str, str]
    outside: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether the trained model is a part of what its checkpoint holds."""
        return bool(self.begins or self.outside)

    def own(self, name: str) -> str:
        """The own class's name of a weight or module of the trained model."""
        return _begun_otherwise(name, self.begins) or name

    def trained(self, name: str) -> str | None:
        """The trained model's name of a weight or module of the own class; None outside the language model."""
        if not self.begins:
            is_outside = any(name == other or name.startswith(f"{other}.") for other in self.outside)
            return None if is_outside else name
        return _begun_otherwise(name, {own: begin for begin, own in self.begins.items()})


SAME = OwnNames({})


def note_own_names(model: "nn.Module", names: OwnNames) -> None:
    """Note on a model how its checkpoint's class calls its weights."""
    setattr(model, _NOTED, names)


def own_names_of(model: "nn.Module") -> OwnNames:
    """What is noted on a model; the same names where nothing is."""
    noted = vars(model).get(_NOTED, SAME)
    assert isinstance(noted, OwnNames)
    return noted


def _begun_otherwise(name: str, begins: Mapping[str, str]) -> str | None:
    for begin, other in sorted(begins.items(), key=lambda pair: -len(pair[0])):
        if begin in (name, "") or name.startswith(f"{begin}."):
            rest = name.removeprefix(begin).removeprefix(".")
            return f"{other}.{rest}".strip(".")
    return None
