"""What counts as a difference between a reader and training, and how it is told."""

from qlora_kit.data.template.probes import stripped
from qlora_kit.evaluation.token_parity.compare import Failure, Messages, TokenParity, Trained, compare_all
from tests.tiny_tokenizers import qwen_tokenizer


def test_a_rewriting_that_training_would_have_told_apart_mends_nothing() -> None:
    trained = Trained.of(qwen_tokenizer(), {602})  # its template keeps blanks
    blanks = trained.prompts[-1]

    def read(messages: Messages) -> list[int]:
        same = [expected.ids for expected in trained.prompts[:-1] if expected.probe.messages == messages]
        return same[0] if same else blanks.ids if messages == stripped(blanks.probe.messages) else []

    contract = TokenParity()
    compare_all(contract, trained, "reader", read, {"trims": stripped})
    assert [failure.conversation for failure in contract.failures] == ["blanks around texts"]
    assert contract.notes == []


def test_a_failure_reads_as_a_sentence() -> None:
    assert str(Failure("llama.cpp", "token ids", "it differs")) == "llama.cpp: token ids: it differs"
    whole = Failure("vLLM", "token ids", "it differs", "code", "a", "b", 3)
    assert str(whole) == "vLLM: token ids in the conversation 'code': it differs: trained 'a', here 'b'"
