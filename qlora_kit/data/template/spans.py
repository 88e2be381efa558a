"""Conversation -> text, and the characters of it that the model has to write, for any chat template."""

from dataclasses import replace

from qlora_kit.data.conversation import Conversation
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.scaffold import found_by_scaffold
from qlora_kit.data.template.turns import RenderedRow, Span, found_by_rendering
from qlora_kit.schema.data import TrainOn

__all__ = ["RenderedRow", "Span", "rendered", "trained_turns"]


def rendered(conversation: Conversation, template: ChatTemplate, train_on: TrainOn) -> RenderedRow:
    """Render a conversation and find the turns to train; for rows that go through a template, not for plain ones.

    Raises:
        RecipeError: the template refuses the row, leaves a turn of it out, or rewrites what was rendered before.
    """
    trained = trained_turns(conversation, train_on)
    row = found_by_scaffold(conversation, template, trained) or found_by_rendering(conversation, template, trained)
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
