"""What is wrong with a word of the command line that names no field or no option, with the nearest right one."""

from collections.abc import Callable
from difflib import get_close_matches

from qlora_kit.core.errors import Problem
from qlora_kit.core.terminal import printable
from qlora_kit.schema import walk
from qlora_kit.schema.check_wished import EXPORTS, line_of_exports
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import groups
from qlora_kit.schema.hydra_words import hydra_problem
from qlora_kit.schema.meant import beside, meant, nearest_option
from qlora_kit.schema.root import RECIPE_OF_VERB, TrainRecipe
from qlora_kit.schema.trust import unsafe_references
from qlora_kit.schema.value_problems import GROUPS_OF_SEVERAL, several_values
from qlora_kit.schema.words import Word

WORDS_OF_PLAN = ("card",)  # which it takes off before a recipe is made
COMMON_OPTIONS = {"export": "gguf_q4_k_m", "data": "rows"}  # proposed where nothing tells what was meant


def override_problem(root: type[Sealed], word: Word) -> Problem | None:
    """A misspelled key or option, with the nearest right one."""
    override, line = word.override, word.where
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        return hydra_problem(word)
    if key in groups():
        return _group_problem(root, word)
    if override.is_delete():
        return Problem(
            f"'{printable(word.typed)}' deletes a field; a recipe keeps all of its fields", line, f"{key}=<value>"
        )
    if walk.find_path(root, key):
        if outside := unsafe_references(str(override.value())):
            what = f"{key} looks up '{printable(outside[0])}'; a recipe may look up its own fields only"
            return Problem(f"{what}, such as ${{lora.r}}", line)
        return several_values(root, word) if override.is_sweep_override() else None
    return _no_field(root, word)


def _no_field(root: type[Sealed], word: Word) -> Problem:
    key, line = word.override.key_or_group, word.where
    if own := next(iter(get_close_matches(key, WORDS_OF_PLAN, cutoff=0.7)), None):
        what = f"'{own}' is a word of qlora-kit plan, and no field of a recipe"
        if own != key:
            what = f"there is no field '{key}'; did you mean '{own}', a word of qlora-kit plan?"
        return Problem(what, line, "qlora-kit plan --help")
    found = meant(root, key, word.override.value())
    what = f"there is no field '{key}'" + (f"; did you mean '{found.name}'?" if found.name else "")
    if found.hint:
        what += f"; {found.hint}"
    elif not found.name:
        what += f"\n  known    {', '.join(beside(root, key))}"
    return Problem(what, line, found.line or help_line(root))


def _group_problem(root: type[Sealed], word: Word) -> Problem | None:
    key, override = word.override.key_or_group, word.override
    if key not in walk.fields_of(root) and any(map(_has(key), RECIPE_OF_VERB.values())):
        return _of_another_verb(root, word)
    return _option_problem(key, word) or (several_values(root, word) if override.is_sweep_override() else None)


def _has(key: str) -> Callable[[type[Sealed]], bool]:
    return lambda recipe: key in walk.fields_of(recipe)


def _of_another_verb(root: type[Sealed], word: Word) -> Problem:
    """A group that only the recipe of another verb has; what a training is to become has a field of its own."""
    key, value = word.override.key_or_group, word.override.value()
    verbs = [verb for verb, recipe in RECIPE_OF_VERB.items() if _has(key)(recipe)]
    what = f"the {_verb_of(root)} recipe has no {key}; {key} belongs to qlora-kit {' and '.join(verbs)}"
    if root is not TrainRecipe or "export" not in verbs:
        return Problem(what, word.where, help_line(root))
    wished = [str(option) for option in (value if isinstance(value, list) else [value])]
    what += f"; what a training is to become is {EXPORTS}, and is checked before it begins"
    return Problem(what, word.where, line_of_exports(wished))


def _option_problem(group: str, word: Word) -> Problem | None:
    override = word.override
    value = override.value()
    if override.is_sweep_override():
        value = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    wanted = [str(option) for option in (value if isinstance(value, list) else [value]) if option is not None]
    known = groups()[group]
    wrong = [option for option in wanted if option not in known]
    if not wrong:
        return None
    likely = {option: nearest_option(group, option) for option in wrong}
    near = [option for option in likely.values() if option]
    what = f"there is no {group} named {_quoted(wrong)}" + (f"; did you mean {_quoted(near)}?" if near else "")
    what += f"\n  known    {', '.join(known)}"
    # The rest of a list stays as it is.
    right = [likely.get(option, option) or common_option(group) for option in wanted]
    is_list = isinstance(value, list) and (group in GROUPS_OF_SEVERAL or not override.is_sweep_override())
    fix = f"{group}=[{','.join(dict.fromkeys(right))}]" if is_list else f"{group}={right[0]}"
    return Problem(what, word.where, fix)


def _quoted(names: list[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def common_option(group: str) -> str:
    """An option of a group to propose; empty for a group without any."""
    options = groups().get(group, [])
    common = COMMON_OPTIONS.get(group)
    return common if common in options else next(iter(options), "")


def help_line(root: type[Sealed]) -> str:
    """The command that lists every field."""
    return f"qlora-kit {_verb_of(root)} --help"


def _verb_of(root: type[Sealed]) -> str:
    return next(verb for verb, recipe in RECIPE_OF_VERB.items() if recipe is root)
