"""The tokens at which a reader ends an answer, and whether they are those that training taught."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.files import read_json


@dataclass(frozen=True)
class Stops:
    """The ids that an artifact names, by where it names them, and the texts that its reader knows anyway."""

    named: tuple[tuple[str, int], ...]
    known_texts: frozenset[str] = frozenset()


def transformers_stops(folder: Path) -> Stops:
    """What ends an answer in transformers, vLLM and SGLang: the generation settings, else config.json.

    The tokenizer's end of text is not among them: transformers does not look at it.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        stated = read_json(path).get("eos_token_id") if path.is_file() else None
        if stated is not None:
            ids = stated if isinstance(stated, list) else [stated]
            return Stops(tuple((f"{name}, eos_token_id", int(token)) for token in ids))
    return Stops(())


def stop_problems(
    stops: Stops, stop_ids: Collection[int], closing: int | None, show: Callable[[int], str]
) -> list[str]:
    """What is wrong with them: an id that ends no answer, and no end where training put it."""
    allowed = ", ".join(f"{token} ({show(token)})" for token in sorted(stop_ids))
    problems = [
        f"{where} is {token} ({show(token)}), which is no stop token; those are {allowed}"
        for where, token in stops.named
        if token not in stop_ids
    ]
    if closing is None or closing in {token for _, token in stops.named} or show(closing) in stops.known_texts:
        return problems
    return [*problems, f"nothing ends an answer at {closing} ({show(closing)}), with which training closed answers"]
