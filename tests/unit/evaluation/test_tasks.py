"""Answers are right or wrong, types included."""

import pytest

from qlora_kit.evaluation.tasks import grade
from qlora_kit.schema.data import Task


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ('{"a":1,"b":"x"}', '{"b": "x", "a": 1}', True),
        (' {"a":1}\n', '{"a":1}', True),
        ('{"a":true}', '{"a":1}', False),
        ('{"a":1}', '{"a":true}', False),
        ('{"a":"1"}', '{"a":1}', False),
        ('{"a":1.0}', '{"a":1}', False),
        ('{"a":null}', '{"a":false}', False),
        ('{"a":1}', '{"a":1,"b":2}', False),
        ('{"a":1,"b":2}', '{"a":1}', False),
        ('{"a":[1,2]}', '{"a":[1,2]}', True),
        ('{"a":[2,1]}', '{"a":[1,2]}', False),
        ('{"a":[1]}', '{"a":[1,2]}', False),
        ('{"a":{"b":[true]}}', '{"a":{"b":[1]}}', False),
        ('{"a":1} and more', '{"a":1}', False),
        ('{"a":1', '{"a":1}', False),
        ("", '{"a":1}', False),
        ("[" * 100_000, '{"a":1}', False),
        ("1" * 5_000, "1", False),
        ("3", "3", True),
    ],
)
def test_json_is_compared_as_values_with_types(answer, expected, right):
    assert grade(Task.json_exact_match, answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "expected", "right"), [(" yes\n", "yes", True), ("Yes", "yes", False), ('{"a": 1}', '{"a":1}', False)]
)
def test_text_is_compared_without_the_white_space_around_it(answer, expected, right):
    assert grade(Task.exact_match, answer, expected) is right


def test_an_expected_answer_that_is_not_json_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match="Expecting value"):
        grade(Task.json_exact_match, "yes", "yes")


def test_nothing_is_judged_without_a_task():
    with pytest.raises(ValueError, match="nothing to judge with task=none"):
        grade(Task.none, "a", "a")
