"""`qlora-kit recipes`: list, show, validate, compare and copy recipes, and what each family can become."""

import argparse
import difflib
import re
from itertools import takewhile
from pathlib import Path

from qlora_kit.core.console.lines import show
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.files import write_text
from qlora_kit.core.shell import shell_line
from qlora_kit.schema.check_wished import EXPORTS
from qlora_kit.schema.folders import VERB_CONFIGS, groups, recipe_file, recipe_folders, user_recipes


def run(arguments: list[str]) -> int:
    """Do one of the recipe actions; returns the exit code."""
    parser = argparse.ArgumentParser(prog="qlora-kit recipes", description="Look at recipes without running one.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every option of every group, and where it comes from")
    listing.add_argument("group", nargs="?", help="only this group")
    for name, text in (("show", "the composed recipe as YAML"), ("validate", "compose and check, in a second")):
        action = actions.add_parser(name, help=text)
        action.add_argument("--verb", choices=VERB_CONFIGS, default="train", help="which primary recipe")
        action.add_argument("overrides", nargs="*", help="group=option and path=value")
    diff = actions.add_parser("diff", help="what two experiments set differently")
    diff.add_argument("left")
    diff.add_argument("right")
    copy = actions.add_parser("copy", help="copy a packaged recipe into ./recipes to change it")
    copy.add_argument("option", help="group/option, such as experiment/llama3_1_8b_chat_24gb")
    copy.add_argument("name", nargs="?", help="new name; the same by default")
    families = actions.add_parser("families", help="which families train and export as what, on tiny checkpoints")
    families.add_argument(
        "family", nargs="?", help="a name, a model_type, an architecture or a model folder: all reasons"
    )
    chosen = parser.parse_args(arguments)
    if chosen.action == "list":
        return _list(chosen.group)
    if chosen.action == "diff":
        return _diff(chosen.left, chosen.right)
    if chosen.action == "copy":
        return _copy(chosen.option, chosen.name)
    if chosen.action == "families":
        return _families(chosen.family)
    return _show(chosen.verb, chosen.overrides, shows=chosen.action == "show")


def _list(group: str | None) -> int:
    known = groups()
    if group is not None and group not in known:
        raise RecipeError(f"there is no group '{group}'; there are {', '.join(known)}", fix="qlora-kit recipes list")
    show("found in " + ", then ".join(str(folder) for folder in recipe_folders()))
    mine = user_recipes()
    for name in [group] if group else known:
        show(f"\n{name}")
        for option in known[name]:
            file = recipe_file(name, option)
            is_mine = mine is not None and file is not None and file.is_relative_to(mine)
            show(f"  {option:<36} {_headline(file)}{'  (./recipes)' if is_mine else ''}")
    return EXIT_OK


def _headline(file: Path | None) -> str:
    """The first sentence of a recipe's comment."""
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    comments = takewhile(lambda line: line.startswith("#"), [line for line in lines if "@package" not in line])
    text = " ".join(line.lstrip("# ") for line in comments)
    return re.split(r"(?<=\.)\s+(?=[A-Z]|memory:|launch:)", text, maxsplit=1)[0]


def _show(verb: str, overrides: list[str], *, shows: bool) -> int:
    from qlora_kit.schema.compose import compose_recipe, composed_yaml
    from qlora_kit.training.preflight import check_train

    if shows:
        show(composed_yaml(verb, overrides).rstrip())
    else:
        unchecked = ""
        if verb == "train":
            composed = compose_recipe("train", overrides)
            if (recipe := check_train(composed)).exports:
                from qlora_kit.formats.wished import refuse_wishes

                unchecked = refuse_wishes(recipe, composed.origins[EXPORTS])
        else:
            compose_recipe(verb, overrides)
        show("valid")
        if unchecked:
            show(unchecked)
    return EXIT_OK


def _families(name: str | None) -> int:
    from qlora_kit.families.support import lines_of_family, lines_of_table, meant_families, packaged_record, supported

    lines = (
        lines_of_table(supported(), packaged_record().get("note", ""))
        if name is None
        else [line for row in meant_families(name) for line in lines_of_family(row)]
    )
    show("\n".join(lines))
    return EXIT_OK


def _diff(left: str, right: str) -> int:
    from qlora_kit.schema.compose import composed_yaml

    texts = [composed_yaml("train", [f"experiment={name}", f"name={name}"]) for name in (left, right)]
    lines = difflib.unified_diff(texts[0].splitlines(), texts[1].splitlines(), left, right, n=1, lineterm="")
    show("\n".join(lines) or "no difference")
    return EXIT_OK


def _copy(option: str, name: str | None) -> int:
    group, _, stem = option.partition("/")
    file = recipe_file(group, stem)
    if file is None:
        near = difflib.get_close_matches(option, [f"{key}/{value}" for key in groups() for value in groups()[key]], n=1)
        raise RecipeError(
            f"there is no recipe '{option}'",
            fix=f"qlora-kit recipes copy {near[0]}" if near else "qlora-kit recipes list",
        )
    place = Path("recipes") / group / f"{name or stem}.yaml"
    if place.exists():
        fix = shell_line(["qlora-kit", "recipes", "copy", option, f"{name or stem}_2"])
        raise RecipeError(f"{place} exists already and is kept", fix=fix)
    write_text(place, file.read_text(encoding="utf-8"))
    show(f"{place}  (from {file})")
    return EXIT_OK
