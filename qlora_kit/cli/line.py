"""A command line taken apart: flags, overrides, and the kit's own words."""

import os
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.core.shell import override, read_hydra_text, shell_line
from qlora_kit.core.terminal import printable
from qlora_kit.runs.directory import meant_run
from qlora_kit.schema.folders import meant_choice

HELP = ("-h", "--help")
MULTIRUN = ("-m", "--multirun")
# Taken off before a verb sees its line
EVERYWHERE = {"--quiet": "Warnings, errors and results alone.", "--verbose": "Details too."}


@dataclass(frozen=True)
class Line:
    """Arguments of a run verb."""

    flags: list[str]
    overrides: list[str]

    @property
    def wants_help(self) -> bool:
        """Whether help is all that is asked for."""
        return any(flag in HELP for flag in self.flags)

    @property
    def is_multirun(self) -> bool:
        """Whether it is a sweep."""
        return any(flag in MULTIRUN for flag in self.flags)

    def value(self, key: str) -> str | None:
        """The value that an override gives a key; the last one counts."""
        values = [
            line.split("=", 1)[1] for line in self.overrides if line.split("=", 1)[0].lstrip("+") == key and "=" in line
        ]
        return read_hydra_text(values[-1]) if values else None


def parse_line(arguments: list[str], takes: str = "") -> Line:
    """Split arguments into flags and overrides.

    Args:
        takes: the key by which the verb takes a run, `run` or `resume`; a run that is named without it is told with it.
    """
    flags = [word for word in arguments if word.startswith("-")]
    overrides = [word for word in arguments if not word.startswith("-")]
    own = [word for word in overrides if "=" not in word and not word.startswith("~")]
    unknown = [flag for flag in flags if flag not in HELP + MULTIRUN]
    if unknown or own:
        raise RecipeError([*map(_no_flag, unknown), *(_no_override(word, takes) for word in own)])
    return Line(flags, overrides)


def _no_flag(flag: str) -> Problem:
    fixes = {"--cfg": "qlora-kit recipes show", "-c": "qlora-kit recipes show"}
    what = f"there is no flag '{printable(flag)}'; there are {', '.join((*HELP, *MULTIRUN, *EVERYWHERE))}"
    return Problem(what, "the command line", fixes.get(flag.split("=")[0], ""))


def meant_place(word: str, takes: str, *, finished: bool | None) -> str:
    """The override, or line, that was meant with the name of a run, or of a base, alone; empty where it names none.

    Args:
        takes: the key by which the verb takes a run.
        finished: the state that the verb wants a run in, None for either.
    """
    if word == "latest":
        return f"{takes}=latest"
    place = typed_path(word)
    if not os.path.lexists(place):  # of a name that no disk takes as well
        return ""
    if run := meant_run(word, finished=finished):
        return shell_line([override(takes, run)])
    if takes == "run" and ((place / "export.yaml").is_file() or (place / "config.json").is_file()):
        return shell_line([override("base", word)])
    if takes == "run" and (place / "recipe.yaml").is_file():  # it was begun, and has nothing yet that the verb needs
        return shell_line(["qlora-kit", "train", override("resume", word)])
    return ""


def _no_override(word: str, takes: str) -> Problem:
    """A word without a value: a recipe's file or option where its group is wanted too, or a slip."""
    what, where = f"'{printable(word)}' is not an override", "the command line"
    file = Path(word)
    if file.suffix in (".yaml", ".yml"):
        what += "; a recipe file lies in ./recipes/experiment and is chosen by its name"
        commands = [["qlora-kit", "train", f"experiment={file.stem}"]]
        if file.is_file():
            commands = [["mkdir", "-p", "recipes/experiment"], ["cp", word, "recipes/experiment/"], *commands]
        return Problem(what, where, " && ".join(map(shell_line, commands)))
    fix = meant_choice(word)
    if not fix and takes:
        fix = meant_place(word, takes, finished=takes == "run")
        what += " (that run has no trained adapter yet)" if " resume=" in fix else ""
    return Problem(what, where, fix)


def looking_verb_help(page: str) -> str:
    """Help of a verb that looks at a training recipe: its own page, then what the recipe takes."""
    from qlora_kit.schema.explain import explain
    from qlora_kit.schema.root import TrainRecipe

    return f"{page}\n\n{explain(TrainRecipe)}"


def run_verb_help(verb: str, summary: str, examples: list[str]) -> str:
    """Help of a verb that takes a recipe."""
    from qlora_kit.schema.explain import explain
    from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe

    recipe = {"train": TrainRecipe, "export": ExportRecipe, "eval": EvalRecipe}[verb]
    shown = "\n".join(f"  {example}" for example in examples)
    return (
        f"usage: qlora-kit {verb} [group=option] [path=value]\n\n{summary}\n\nExamples:\n{shown}\n\n{explain(recipe)}"
    )
