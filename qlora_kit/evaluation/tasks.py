"""Judges a generated answer against the row's own."""

import json

from qlora_kit.schema.data import Task


def grade(task: Task, answer: str, expected: str) -> bool:
    """Whether an answer is right.

    `json_exact_match`: both are JSON and equal, types included, so 1 is neither true nor "1" nor 1.0; the order of keys
    does not matter. `exact_match`: the same text, white space around it aside.

    Raises:
        ValueError: the task is `none`, or `expected` is not JSON where JSON is judged.
    """
    if task is Task.exact_match:
        return answer.strip() == expected.strip()
    if task is Task.json_exact_match:
        wanted = json.loads(expected)
        try:
            given = json.loads(answer)
        except (ValueError, RecursionError):
            return False
        return _same(given, wanted)
    raise ValueError(f"there is nothing to judge with task={task.name}")


def _same(left: object, right: object) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return left == right
