"""Where recipes are found: the user's ./recipes first, then the packaged ones."""

from pathlib import Path, PurePath

from qlora_kit.core.shell import override, shell_line

_INSTALLED = Path(__file__).resolve().parent.parent / "recipes"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent / "recipes"

VERB_CONFIGS = ("train", "export", "eval")


def packaged_recipes() -> Path:
    """The recipes that came with the package, or with the checkout it runs from."""
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def user_recipes() -> Path | None:
    """`./recipes`, unless it is the packaged folder itself."""
    here = Path.cwd() / "recipes"
    if here.is_dir() and here.resolve() != packaged_recipes().resolve():
        return here
    return None


def recipe_folders() -> list[Path]:
    """Every folder with recipes, the one that wins first."""
    mine = user_recipes()
    return ([mine] if mine else []) + [packaged_recipes()]


def groups() -> dict[str, list[str]]:
    """Option names by group, over all recipe folders, sorted."""
    found: dict[str, set[str]] = {}
    for folder in recipe_folders():
        for path in folder.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def meant_choice(word: str) -> str:
    """The override that chooses a recipe, from its name, `group/option` or file; empty where it is none, or several."""
    path = PurePath(word)
    option = path.stem if path.suffix in (".yaml", ".yml") else path.name
    chosen = [group for group, options in groups().items() if option in options and path.parent.name in ("", group)]
    return shell_line([override(chosen[0], option)]) if len(chosen) == 1 else ""


def recipe_file(group: str, option: str) -> Path | None:
    """The file that `group=option` loads."""
    for folder in recipe_folders():
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            return path
    return None
