"""The demo task: a home command in English -> one line of compact JSON.

    turn off the light in the attic                      {"do":"light","room":"attic","on":false}
    wake me every day at 06:45                           {"do":"alarm","time":"06:45","daily":true}

Nine actions with string, integer and boolean slots. Values are copied from the command as they stand. Held-out rows use
phrasings and slot values that no training row has, so a score on them is not a score of memory.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_kit.core.errors import KitError, RecipeError
from qlora_kit.core.files import write_text
from qlora_kit.data.home_words import HELD_OUT, TRAIN, Words

Slots = dict[str, str]
Answer = dict[str, str | int | bool]

TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"
_DAILY = " every day"
MOST_REPEATS = 1000  # draws in a row that find nothing new


# Numbers that make sense for an action; elsewhere 1 to 100.
_RANGES = {"heat": range(8, 31), "shop": range(1, 61)}


def _draw_slots(action: str, words: Words, draw: random.Random) -> Slots:
    """One value for every slot, as it stands in the command."""
    numbers = sorted(words.numbers.intersection(_RANGES.get(action, range(1, 101))))
    minutes = sorted(number for number in words.numbers if number < 60)
    return {
        "state": draw.choice(("on", "off")),
        "room": draw.choice(words.rooms),
        "artist": f"{draw.choice(words.first_names)} {draw.choice(words.last_names)}",
        "name": draw.choice(words.first_names),
        "item": draw.choice(words.items),
        "text": f"{draw.choice(words.openers)} {draw.choice(words.endings)}",
        "time": f"{draw.randrange(24):02d}:{draw.choice(minutes):02d}",
        "daily": draw.choice(("", _DAILY)),
        "number": str(draw.choice(numbers)),
    }


# What each action answers; the slots are those of its phrasings.
ANSWERS: dict[str, Callable[[Slots], Answer]] = {
    "light": lambda slots: {"room": slots["room"], "on": slots["state"] == "on"},
    "dim": lambda slots: {"room": slots["room"], "percent": int(slots["number"])},
    "heat": lambda slots: {"room": slots["room"], "degrees": int(slots["number"])},
    "alarm": lambda slots: {"time": slots["time"], "daily": slots["daily"] == _DAILY},
    "timer": lambda slots: {"minutes": int(slots["number"])},
    "music": lambda slots: {"artist": slots["artist"], "room": slots["room"]},
    "shop": lambda slots: {"item": slots["item"], "count": int(slots["number"])},
    "blinds": lambda slots: {"room": slots["room"], "percent": int(slots["number"])},
    "message": lambda slots: {"to": slots["name"], "text": slots["text"]},
}


def rows(words: Words, count: int, seed: int) -> list[str]:
    """`count` distinct JSONL rows, every action equally often, in a shuffled order that the seed fixes.

    Raises:
        RecipeError: the words do not allow so many distinct rows.
    """
    draw = random.Random(seed)  # noqa: S311  # example rows, no secret
    names = list(ANSWERS)
    commands: dict[str, str] = {}
    repeats = 0
    while len(commands) < count:
        command, answer = _pair(names[len(commands) % len(names)], words, draw)
        repeats = repeats + 1 if command in commands else 0
        if repeats == MOST_REPEATS:
            raise RecipeError(f"there are hardly more than {len(commands)} distinct home commands; ask for fewer rows")
        commands.setdefault(command, answer)
    lines = [_row(command, answer) for command, answer in commands.items()]
    draw.shuffle(lines)
    return lines


def _pair(action: str, words: Words, draw: random.Random) -> tuple[str, str]:
    slots = _draw_slots(action, words, draw)
    orders, statements = words.orders[action], words.statements[action]
    phrasing = draw.choice(orders + statements)
    frames = words.asking + words.neutral if phrasing in orders else words.neutral
    if phrasing.endswith("{text}"):
        # Words after a free text would read as part of it.
        frames = tuple(frame for frame in frames if frame.endswith("{}"))
    command = draw.choice(frames).format(phrasing.format(**slots))
    answer = {"do": action, **ANSWERS[action](slots)}
    return command, json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def _row(command: str, answer: str) -> str:
    turns = [{"role": "user", "content": command}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


def write_files(folder: Path, seed: int, train_rows: int, held_out_rows: int, *, force: bool = False) -> list[Path]:
    """Write train.jsonl and held_out.jsonl, each complete or not at all, and return their paths.

    Raises:
        RecipeError: a file is there with other contents and `force` is off; then neither is written.
    """
    wanted = {
        folder / TRAIN_FILE: rows(TRAIN, train_rows, seed),
        folder / HELD_OUT_FILE: rows(HELD_OUT, held_out_rows, seed + 1),
    }
    texts = {path: "\n".join(lines) + "\n" for path, lines in wanted.items()}
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_bytes() != text.encode("utf-8")]
    in_the_way = [path for path in changed if path.exists()]
    if in_the_way and not force:
        raise RecipeError(
            f"{' and '.join(str(path) for path in in_the_way)} would be overwritten with other rows",
            fix="--force, or another folder with --out",
        )
    for path in changed:
        write_text(path, texts[path])
    return list(texts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the demo files and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m qlora_kit.data.home_commands", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/home_commands"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same rows (default: %(default)s)")
    parser.add_argument("--train-rows", type=_positive, default=1200, help="rows to train on (default: %(default)s)")
    parser.add_argument("--held-out-rows", type=_positive, default=100, help="rows to score on (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite files that hold other rows")
    chosen = parser.parse_args(arguments)
    try:
        paths = write_files(chosen.out, chosen.seed, chosen.train_rows, chosen.held_out_rows, force=chosen.force)
    except KitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for path in paths:
        print(path)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
