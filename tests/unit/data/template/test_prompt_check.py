"""The prompt of a served model against the beginning of a training row, over published templates."""

import pytest

from qlora_kit.data.audit.finding import Level
from qlora_kit.data.template.chat_template import ChatTemplate
from qlora_kit.data.template.prompt_check import prompt_finding
from tests.tiny_tokenizers import CHATML


def test_rows_that_begin_as_the_prompt_does_are_fine():
    assert prompt_finding(ChatTemplate(CHATML, {})) is None
    assert prompt_finding(None) is None
    assert prompt_finding(ChatTemplate("{{ raise_exception('no') }}", {})) is None


@pytest.mark.parametrize("opener", ["<think>\n", "Well: "])
def test_a_prompt_with_another_ending_is_quoted(opener):
    template = ChatTemplate(CHATML.replace("<|im_start|>assistant\n'", f"<|im_start|>assistant\n{opener}'"), {})
    finding = prompt_finding(template)
    assert finding is not None
    assert (finding.level, finding.name) == (Level.warning, "prompt_differs")
    assert f"ends in {opener!r}, but rows go on with 'b<|im_end|>\\n' there" in finding.what
    assert "reasoning_content" in finding.fix
