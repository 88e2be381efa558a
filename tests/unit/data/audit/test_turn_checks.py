"""Faults of beginnings, ends and special tokens, put into hand-made rows, are found with level, count and place."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.audit.audit import audit, stop_on_errors
from qlora_kit.data.audit.finding import Level
from qlora_kit.data.tokens import TokenRows
from qlora_kit.schema.data import TrainOn
from tests.marked_rows import LLAMA3, MISTRAL, SMOLLM, chat, found, good, llama, row
from tests.stored_rows import StoredData, stored_rows
from tests.tiny_tokenizers import llama3_tokenizer, smollm_tokenizer


def test_smollms_turn_marker_is_no_second_beginning(tmp_path):
    # <|im_start|> is its bos, and two user turns hold it four times
    twice = row("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n" * 2)
    names = found(StoredData(stored_rows(tmp_path / "train", [*good(), twice])))
    assert not {"double_bos", "missing_bos", "bos_inside_row"} & set(names)


@pytest.mark.parametrize(
    ("begin", "name", "level"),
    [
        ("<|begin_of_text|><|begin_of_text|>", "double_bos", Level.error),
        ("", "missing_bos", Level.error),
    ],
)
def test_a_row_that_begins_wrong_is_an_error(tmp_path, begin, name, level):
    rows = [llama(0), llama(1, begin), llama(2), llama(3, begin)]
    names = found(StoredData(stored_rows(tmp_path / "train", rows)), LLAMA3)
    finding = names[name]
    assert "bos_inside_row" not in names
    assert (finding.level, finding.count, finding.places) == (level, 2, ("train.jsonl:2", "train.jsonl:4"))
    assert "<|begin_of_text|>" in finding.what


def test_a_beginning_in_the_middle_is_a_warning(tmp_path):
    rows = [llama(0), llama(1, answer="as<|begin_of_text|>is")]
    names = found(StoredData(stored_rows(tmp_path / "train", rows)), LLAMA3)
    assert names["bos_inside_row"].places == ("train.jsonl:2",)
    assert names["special_token_inside_answer"].places == ("train.jsonl:2",)
    assert "double_bos" not in names


def test_answers_without_an_end_are_an_error_that_names_what_is_there(tmp_path):
    data = StoredData(stored_rows(tmp_path / "train", [chat(number, end=".") for number in range(5)]))
    finding = found(data)["never_stops"]
    assert (finding.level, finding.count) == (Level.error, 5)
    assert "'.', in 5 of 5" in finding.what
    assert "<|im_end|>" in finding.fix
    with pytest.raises(RecipeError) as raised:
        stop_on_errors(audit(data, SMOLLM, 100, frozenset()))
    assert [problem.what for problem in raised.value.problems] == [finding.what]
    assert raised.value.problems[0].where == "train.jsonl:1, train.jsonl:2, train.jsonl:3"


def test_some_answers_without_an_end_are_a_warning(tmp_path):
    rows = [*good(), chat(90, end="."), chat(91, end=".")]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)))["answer_not_closed"]
    assert (finding.level, finding.count, finding.places) == (
        Level.warning,
        2,
        ("train.jsonl:31", "train.jsonl:32"),
    )


def test_a_cut_row_shows_where_it_ends(tmp_path):
    whole = stored_rows(tmp_path / "train", good())
    ends = whole.ends.copy()
    ends[3] -= 4
    data = StoredData(TokenRows(whole.store, whole.rows, whole.heads, whole.begins, ends))
    assert found(data)["answer_not_closed"].places == ("train.jsonl:4",)


def test_what_is_kept_in_front_of_a_piece_counts(tmp_path):
    whole = stored_rows(tmp_path / "train", [llama(number) for number in range(6)])
    heads, begins = whole.heads.copy(), whole.begins.copy()
    heads[2], begins[2] = 1, 3
    begins[4] = 3
    names = found(StoredData(TokenRows(whole.store, whole.rows, heads, begins, whole.ends)), LLAMA3)
    assert names["missing_bos"].places == ("train.jsonl:5",)


def test_rows_trained_as_a_whole_may_end_with_the_templates_line_break(tmp_path):
    rows = [(ids, [True] * len(ids)) for ids, _ in good()]
    names = found(StoredData(stored_rows(tmp_path / "train", rows)), train_on=TrainOn.everything)
    assert not {"never_stops", "answer_not_closed", "special_token_inside_answer"} & set(names)


def test_an_end_of_turn_that_servers_do_not_know_is_a_warning(tmp_path):
    tokenizer = llama3_tokenizer()
    tokenizer.eos_token = "<|end_of_text|>"
    data = StoredData(stored_rows(tmp_path / "train", [llama(number) for number in range(4)]))
    finding = found(data, tokenizer)["stop_not_in_generation_config"]
    assert (finding.level, finding.count) == (Level.warning, 4)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert str(eot) in finding.fix and "<|end_of_text|>" in finding.what
    assert "stop_not_in_generation_config" not in found(data, tokenizer, frozenset({eot}))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_inside_an_answer_is_a_warning(tmp_path, token):
    rows = [*good(), chat(77, answer=f"so{token}then")]
    names = found(StoredData(stored_rows(tmp_path / "train", rows)))
    finding = names["special_token_inside_answer" if token != "<|endoftext|>" else "unknown_tokens"]
    assert finding.places == ("train.jsonl:31",)
    assert (finding.count, token in finding.what) == (1, True)
    assert "special_token_in_text" not in names, "told off once is enough"


def test_a_token_that_the_template_never_writes_is_foreign_however_common(tmp_path):
    tokenizer = smollm_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim|>"]})
    prompt = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    rows = [row(f"{prompt}⟦a {number}<|fim|>b<|im_end|>⟧\n", tokenizer) for number in range(40)]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)), tokenizer)["special_token_inside_answer"]
    assert (finding.count, "<|fim|>" in finding.what) == (40, True)


def test_texts_that_are_trained_from_end_to_end_stay_apart(tmp_path):
    rows = [row(f"⟦text {number * 7919}<|im_end|>⟧") for number in range(3)]
    result = audit(StoredData(stored_rows(tmp_path / "train", rows)), SMOLLM, 100, frozenset())
    facts = {fact.part: fact.said for fact in result.tokens}
    assert facts["end of turn"] == "trained; closes 3 of 3 answers; ends generation"
    assert [finding for finding in result.findings if finding.level is not Level.note] == []


def test_an_answer_that_is_closed_twice_is_found_even_in_every_row(tmp_path):
    rows = [chat(number, end="<|im_end|><|im_end|>") for number in range(30)]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)))["special_token_inside_answer"]
    assert finding.count == 30


def test_a_closing_token_in_a_question_is_found(tmp_path):
    odd = row("<|im_start|>user\nwhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n")
    finding = found(StoredData(stored_rows(tmp_path / "train", [*good(), odd])))["special_token_in_text"]
    assert (finding.count, finding.places) == (1, ("train.jsonl:31",))


def test_a_template_that_closes_more_than_it_opens_is_no_fault_of_the_rows(tmp_path):
    rows = [([SMOLLM.eos_token_id, *ids], [False, *trained]) for ids, trained in good()]
    assert "special_token_in_text" not in found(StoredData(stored_rows(tmp_path / "train", rows)))


def test_a_prompt_that_was_cut_may_lack_its_opening_token(tmp_path):
    whole = stored_rows(tmp_path / "train", good())
    begins = whole.begins.copy()
    begins[4] = 3
    data = StoredData(TokenRows(whole.store, whole.rows, whole.heads, begins, whole.ends))
    assert "special_token_in_text" not in found(data)


def test_tokens_of_the_template_inside_answers_are_left_alone(tmp_path):
    # a template with thinking writes its own added tokens into the answer
    tokenizer = smollm_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += "{# <think> and </think> #}"
    prompt = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    rows = [*good(), row(f"{prompt}⟦<think>hm</think>a<|im_end|>⟧\n", tokenizer)]
    assert "special_token_inside_answer" not in found(StoredData(stored_rows(tmp_path / "train", rows)), tokenizer)


def test_a_pad_token_inside_an_answer_is_a_warning(tmp_path):
    rows = [*[llama(number) for number in range(9)], llama(9, answer="a<|end_of_text|>b")]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)), LLAMA3)["pad_inside_answer"]
    assert (finding.level, finding.count, finding.places) == (Level.warning, 1, ("train.jsonl:10",))


def test_a_pad_token_that_ends_turns_is_a_harmless_note(tmp_path):
    finding = found(StoredData(stored_rows(tmp_path / "train", good())))["pad_is_eos"]
    assert finding.level is Level.note and "harmless" in finding.what


def test_unknown_tokens_are_counted(tmp_path):
    rows = [row(f"<s>[INST] ask {n} [/INST]⟦say<unk><unk> {n}</s>⟧", MISTRAL) for n in range(3)]
    finding = found(StoredData(stored_rows(tmp_path / "train", rows)), MISTRAL)["unknown_tokens"]
    assert (finding.level, finding.count) == (Level.warning, 6)
