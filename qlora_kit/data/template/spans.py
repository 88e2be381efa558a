"""Conversation -> text, and the characters of it that the model has to write, for any chat template."""

from dataclasses import replace

from qlora_kit.data.conversation import Conversation
from qlora_kit.data.template.answers import check_answers
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.scaffold import found_by_scaffold
from qlora_kit.data.template.turns import RenderedRow, Span, found_by_rendering
from qlora_kit.schema.data import TrainOn

__all__ = ["RenderedRow", "Span", "rendered", "trained_turns"]


def rendered(conversation: Conversation, template: ChatTemplate, train_on: TrainOn) -> RenderedRow:
    """Render a conversation and find the turns to train; for rows that go through a template, not for plain ones.

    Raises:
        RecipeError: the template refuses the row, leaves out a turn or part of an answer, or rewrites what was before.
    """
    trained = trained_turns(conversation, train_on)
    row = found_by_scaffold(conversation, template, trained)
    if row is None:
        row = found_by_rendering(conversation, template, trained)
        check_answers(conversation, row, None if train_on is TrainOn.everything else trained)
    return replace(row, spans=(Span(0, len(row.text)),)) if train_on is TrainOn.everything else row


def trained_turns(conversation: Conversation, train_on: TrainOn) -> tuple[int, ...]:
    """Indices of the assistant turns that are trained one by one; none where the whole text is."""
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    if train_on is TrainOn.everything:
        return ()
    if train_on is TrainOn.last:
        return tuple(turns[-1:])
    if train_on is TrainOn.chosen:
        return tuple([index for index in turns if conversation.messages[index].is_chosen])
    return tuple([index for index in turns if index >= conversation.trained_from])
