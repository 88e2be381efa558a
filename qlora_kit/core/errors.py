"""Errors that a user reads: the problem, where it was set, and the line to paste."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_kit.core.shell import is_line

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_BAD_RECIPE = 2
EXIT_UNFAITHFUL = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where it was set, and what mends it.

    A `fix` that can be pasted as it stands is shown as one; words, or a line with a `<place to fill in>`, as advice.
    """

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  set in   {self.where}")
        if self.fix:
            lines.append(f"  {'fix' if is_line(self.fix) else 'do ':<9}{self.fix}")
        return "\n".join(lines)


class KitError(Exception):
    """Base of every error whose message is meant for the user; shown without a traceback."""

    exit_code = EXIT_RUN_FAILED

    def __init__(self, what: str | Sequence[Problem], where: str = "", fix: str = "") -> None:
        self.problems = (Problem(what, where, fix),) if isinstance(what, str) else tuple(what)
        super().__init__("\n\n".join(str(problem) for problem in self.problems))


class RecipeError(KitError):
    """The command line, the recipe or the data is wrong; found before a weight is loaded."""

    exit_code = EXIT_BAD_RECIPE


class UnreadableFileError(RecipeError, ValueError):
    """A file of ours or of a model is not there, or does not hold what it should."""


class RunError(KitError):
    """The run could not go on."""


class DamagedFileError(RunError):
    """A file that came from somebody else is damaged, or not what its name says."""

    exit_code = EXIT_BAD_RECIPE


class StoppedError(KitError):
    """The user stopped the run; what was done is saved."""


class FidelityError(KitError):
    """An exported file differs from the trained model by more than its bound."""

    exit_code = EXIT_UNFAITHFUL


def is_panic(error: BaseException) -> bool:
    """Whether a library's compiled part stopped in the middle of its work; PyO3's error for that is no Exception."""
    return type(error).__name__ == "PanicException"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of, the newest first; an error that was raised from itself comes once."""
    seen = set[int]()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
