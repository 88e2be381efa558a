"""Turns in an order that no chat has, and flags that say which of them are trained."""

import pytest

from qlora_kit.schema.data import TrainOn
from tests.example_rows import ANSWER, ASK, CALLS, PAIR, RESULT, SYSTEM, messages, read, refusal, turns

BAD_ROWS = [
    ({"prompt": "a", "completion": " \n"}, "the assistant's answer (turn 2) is empty"),
    ({"prompt": [ASK, ANSWER], "completion": [ASK]}, "the last turn is the user's; it must be the assistant's"),
    ({"prompt": [ASK], "completion": [ANSWER, ASK]}, "the last turn is the user's; it must be the assistant's"),
    (messages(ASK), "no assistant turn, so nothing to train on"),
    (messages(SYSTEM), "no assistant turn, so nothing to train on"),
    (messages(ANSWER), "roles out of order: assistant; expected an optional system, then user and assistant in turn"),
    (messages(ASK, ASK, ANSWER), "roles out of order: user, user, assistant"),
    (messages(ASK, ANSWER, ANSWER), "roles out of order: user, assistant, assistant"),
    (messages(ASK, ANSWER, SYSTEM), "roles out of order: user, assistant, system"),
    (messages(ASK, RESULT, ANSWER), "roles out of order: user, tool, assistant"),
    (messages(ASK, ANSWER, RESULT, ANSWER), "and tool turns only after an assistant's call"),
    (messages(ASK, CALLS, RESULT, ASK, ANSWER), "roles out of order: user, assistant, tool, user, assistant"),
    (messages(ASK, ANSWER, ASK), "the last turn is the user's; it must be the assistant's"),
    (messages(ASK, CALLS, RESULT), "the last turn is the tool's; it must be the assistant's"),
    (messages(ASK, {"role": "assistant", "content": ""}), "the assistant's answer (turn 2) is empty"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:50] for _, reason in BAD_ROWS])
def test_a_bad_row_says_why(row, reason):
    assert reason in refusal(row)


NO, YES = {**ANSWER, "train": False}, {**ANSWER, "train": True}


def chosen(row, **options):
    return [
        turn.is_chosen for turn in read(row, train_on=TrainOn.chosen, **options).messages if turn.role == "assistant"
    ]


def test_turns_without_a_train_flag_are_the_opposite_of_those_with_one():
    assert chosen(messages(ASK, ANSWER, ASK, YES)) == [False, True]
    assert chosen(messages(ASK, ANSWER, ASK, NO)) == [True, False]
    assert chosen(messages(ASK, NO, ASK, YES)) == [False, True]
    assert chosen(messages(ASK, {**ANSWER, "train": None}, ASK, YES)) == [False, True]


def test_turns_without_a_weight_are_trained():
    weighed = [{**ANSWER, "weight": weight} for weight in (0, 1, 0.0, 1.0)]
    assert chosen(messages(ASK, weighed[0], ASK, ANSWER)) == [False, True]
    assert chosen(messages(ASK, weighed[1], ASK, weighed[2])) == [True, False]
    assert chosen(messages(ASK, ANSWER, ASK, weighed[3])) == [True, True]


def test_flags_that_leave_a_turn_open_are_refused():
    def say(*rows):
        return refusal(*rows, train_on=TrainOn.chosen)

    assert say(messages(ASK, YES, ASK, NO, ASK, ANSWER)) == (
        "a row with both train: true and train: false must flag every assistant turn; turn 6 has no flag"
    )
    assert say(messages(ASK, ANSWER)) == (
        "no turn carries train: true or false, or weight: 0 or 1, which data.train_on=chosen needs"
    )
    assert "which data.train_on=chosen needs" in say(PAIR)
    assert say(messages(ASK, YES, ASK, {**ANSWER, "weight": 1})) == (
        "the row carries both train and weight flags; keep one kind"
    )


def test_flags_are_never_ignored():
    assert (
        refusal(messages(ASK, ANSWER, ASK, YES)) == "turn 4 carries a train flag, which only data.train_on=chosen reads"
    )
    assert refusal(messages(ASK, {**ANSWER, "weight": 0})) == (
        "turn 2 carries weight: 0, which only data.train_on=chosen reads"
    )
    assert turns(messages(ASK, {**ANSWER, "weight": 1}))[1].is_chosen is True
    assert refusal(messages({**ASK, "train": True}, ANSWER)) == (
        "messages[0].train is not supported, and ignoring it would change what is trained"
    )
