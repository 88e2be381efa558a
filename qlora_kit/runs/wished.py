"""What a run is exported as where the line does not say it: what its recipe named under `exports`."""

from collections.abc import Sequence

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import KitError
from qlora_kit.core.shell import hydra_value, override
from qlora_kit.runs.directory import find_run
from qlora_kit.schema.compose import load_recipe


def with_wished_exports(overrides: Sequence[str], run: str | None) -> list[str]:
    """The words of an export's line, with the run and the exports of its recipe where they choose none.

    Args:
        run: a run directory or `latest`, as the line names it; None for `latest`.
    """
    words = list(overrides)
    if {"base", "export"} & set(map(_key, words)):
        return words
    try:
        found = find_run("latest" if run is None else run, finished=True)
        wished = load_recipe("train", found.recipe).exports
    except KitError:  # which the verb meets too, and tells with all else that is wrong
        return words
    if not wished:
        return words
    log.info(f"exports of the run's recipe: {', '.join(wished)}")
    others = [word for word in words if _key(word) != "run"]
    return [*others, override("run", found.path), f"export={hydra_value(wished)}"]


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")
