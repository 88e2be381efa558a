"""Whether a training row begins as the prompt does that the served model will get."""

from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.conversation import Message
from qlora_kit.data.template.chat_template import ChatTemplate, TemplateRefusal

_ASKED = (Message("user", "a"), Message("assistant", "b"))


def prompt_finding(template: ChatTemplate | None) -> Finding | None:
    """A warning where the text that asks the model for an answer is not how a row with that answer begins.

    Thinking models are asked with an opened thought, `<think>`, which their templates leave out of rows that have none.
    """
    if template is None:
        return None
    try:
        prompt = template.render(_ASKED[:1], answer_follows=True)
        row = template.render(_ASKED)
    except TemplateRefusal:
        return None  # rows will say so themselves
    differs = (index for index, (asked, given) in enumerate(zip(prompt, row, strict=False)) if asked != given)
    shared = next(differs, min(len(prompt), len(row)))
    if shared == len(prompt):
        return None
    return Finding(
        Level.warning,
        "prompt_differs",
        f"the model will be asked with a prompt that ends in {prompt[shared:]!r}, but rows go on with "
        f"{row[shared : shared + 20]!r} there, so they teach an answer to another prompt",
        fix="give the rows reasoning_content, or model.chat_template=<a Jinja file without that ending>",
    )
