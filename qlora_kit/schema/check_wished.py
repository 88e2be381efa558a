"""What a training recipe may not say under `exports`, whatever its base is."""

from collections.abc import Iterable, Iterator

from qlora_kit.core.shell import hydra_value, shell_line
from qlora_kit.schema.folders import groups
from qlora_kit.schema.issue import Issue
from qlora_kit.schema.meant import nearest_option
from qlora_kit.schema.root import TrainRecipe

EXPORTS = "exports"
UNCHECKED = (
    f"{EXPORTS} are not checked: the base's files are not at hand. What each family can become: "
    "qlora-kit recipes families"
)
_GROUP = "export"
_COMMON = "gguf_q4_k_m"  # proposed where nothing tells what was meant


def wrong_exports(recipe: TrainRecipe) -> Iterator[Issue]:
    """Names that are no option of the group, or stand there twice."""
    known = groups()[_GROUP]
    unknown = [name for name in recipe.exports if name not in known]
    likely = {name: nearest_option(_GROUP, name) for name in unknown}
    right = dict.fromkeys(likely.get(name, name) for name in recipe.exports)
    fix = line_of_exports([name for name in right if name] or [_COMMON])
    if unknown:
        near = _quoted(dict.fromkeys(name for name in likely.values() if name))
        what = f"{EXPORTS} names {_quoted(unknown)}, and there is no such export"
        what += f"; did you mean {near}?" if near else ""
        yield Issue(EXPORTS, f"{what}\n  known    {', '.join(known)}", fix)
    elif len(right) < len(recipe.exports):
        twice = next(name for name in recipe.exports if recipe.exports.count(name) > 1)
        yield Issue(EXPORTS, f"{EXPORTS} names {twice} twice; each export gets a folder of its own", fix)


def line_of_exports(names: list[str]) -> str:
    """The words that name exports in a training recipe."""
    return shell_line([f"{EXPORTS}={hydra_value(names)}"])


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
