"""Good rows of every family raise nothing, and an audit measures what it says it measures."""

import numpy as np
import pytest

from qlora_kit.data.audit import token_scan
from qlora_kit.data.audit.audit import audit, stop_on_errors
from qlora_kit.data.audit.finding import Finding, Level, by_level, places
from qlora_kit.data.packing import pack
from qlora_kit.data.tokens import TokenRows
from tests.marked_rows import LLAMA3, MISTRAL, SMOLLM, chat, found, good, llama, row
from tests.stored_rows import StoredData, stored_rows
from tests.tiny_tokenizers import gemma_tokenizer, phi3_tokenizer

GEMMA_ROW = "<bos><start_of_turn>user\nask {}<end_of_turn>\n<start_of_turn>model\n⟦say {}<end_of_turn>⟧\n"


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        (SMOLLM, good()),
        (LLAMA3, [llama(number) for number in range(30)]),
        (MISTRAL, [row(f"<s>[INST] ask {n * 7919} [/INST]⟦say {n}</s>⟧", MISTRAL) for n in range(30)]),
        (
            gemma_tokenizer(),
            [row(GEMMA_ROW.format(n * 7919, n), gemma_tokenizer()) for n in range(10)],
        ),
        (
            phi3_tokenizer(),
            [
                row(f"<|user|>\nask {n * 7919}<|end|>\n<|assistant|>\n⟦say {n}<|end|>⟧\n", phi3_tokenizer())
                for n in range(10)
            ],
        ),
    ],
    ids=["smollm", "llama3", "mistral", "gemma", "phi3"],
)
def test_good_rows_of_every_family_raise_no_alarm(tmp_path, tokenizer, rows):
    result = audit(StoredData(stored_rows(tmp_path / "train", rows)), tokenizer, 100, frozenset())
    assert [finding for finding in result.findings if finding.level is not Level.note] == []
    stop_on_errors(result)


def test_an_empty_held_out_split_is_none(tmp_path):
    train = stored_rows(tmp_path / "train", good())
    data = StoredData(train)
    data.held_out = TokenRows.whole(train.store, np.zeros(0, dtype=np.int64))
    result = audit(data, SMOLLM, 100, frozenset())
    assert result.held_out_lengths is None


def test_faults_of_held_out_rows_are_told_once(tmp_path):
    held_out = stored_rows(tmp_path / "held", [chat(1), chat(2, answer="so<|im_start|>then")])
    names = found(StoredData(stored_rows(tmp_path / "train", good()), held_out))
    assert names["special_token_inside_answer"].what.startswith("held out: ")
    assert names["special_token_inside_answer"].places == ("held.jsonl:2",)


def test_packing_and_padding_are_measured(tmp_path):
    ids = [SMOLLM.eos_token_id]
    rows = [([7] * length + ids, [True] * (length + 1)) for length in (9, 19, 9, 39)]
    train = stored_rows(tmp_path / "train", rows)
    bins = pack(train.lengths, 40)
    result = audit(StoredData(train), SMOLLM, 40, frozenset(), packing=bins, batch_size=2)
    # 10 + 20 + 10 + 40 tokens in two bins of 40; sorted pairs (10, 10), (20, 40) pad to 20 + 80
    assert result.packing is not None and result.padding is not None
    assert (result.packing.bins, result.packing.efficiency) == (2, 1.0)
    assert sorted(map(sorted, result.packing.drawn)) == [[10, 10, 20], [40]]
    assert result.padding.by_length == pytest.approx(1 - 80 / 100)
    assert result.padding.random >= result.padding.by_length
    assert "100.0% of 2 bins" in {finding.name: finding for finding in result.findings}["packing"].what
    names = found(StoredData(train), batch_size=4)
    assert "packing" not in names and "padding" in names


def test_facts_say_what_each_special_token_does(tmp_path):
    result = audit(StoredData(stored_rows(tmp_path / "train", [llama(1), llama(2)])), LLAMA3, 100, frozenset())
    facts = {fact.part: fact for fact in result.tokens}
    assert facts["beginning of text"].said.endswith("2 of 2 rows begin with it")
    assert facts["end of turn"].token == "<|eot_id|>"
    assert facts["end of turn"].said == "trained; closes 2 of 2 answers; ends generation"
    assert facts["unknown"].id is None


@pytest.mark.parametrize("chunk", [1, 50, 137])
def test_chunks_do_not_change_what_is_found(tmp_path, monkeypatch, chunk):
    rows = [*good(), chat(90, end="."), chat(77, answer="so<|im_end|>then"), chat(91, answer="a<|im_start|>b")]
    data = StoredData(stored_rows(tmp_path / "train", rows))
    data.train = data.train.select(np.random.default_rng(0).permutation(len(rows)))
    whole = audit(data, SMOLLM, 100, frozenset())
    monkeypatch.setattr(token_scan, "CHUNK_TOKENS", chunk)
    assert audit(data, SMOLLM, 100, frozenset()) == whole


def test_too_many_tokens_are_sampled_and_that_is_said(tmp_path, monkeypatch):
    data = StoredData(stored_rows(tmp_path / "train", good()))
    monkeypatch.setattr(token_scan, "MOST_TOKENS_READ", 300)
    result = audit(data, SMOLLM, 100, frozenset())
    assert 0 < result.rows_read < 30
    assert f"{result.rows_read} of 30 rows" in {finding.name: finding for finding in result.findings}["sampled"].what


def test_lengths_have_quantiles_and_a_histogram_of_every_row(tmp_path):
    rows = [([SMOLLM.eos_token_id] * length, [True] * length) for length in range(1, 101)]
    lengths = audit(StoredData(stored_rows(tmp_path / "train", rows)), SMOLLM, 100, frozenset()).lengths
    assert (lengths.rows, lengths.shortest, lengths.longest, lengths.mean) == (100, 1, 100, 50.5)
    assert lengths.quantiles == (5, 25, 50, 75, 95, 99)
    assert sum(lengths.counts) == 100
    assert list(lengths.counts) == [b - a for a, b in zip(lengths.edges, (*lengths.edges[1:-1], 101), strict=False)]


def test_the_gravest_come_first_and_places_are_few():
    findings = [Finding(Level.note, "a", ""), Finding(Level.error, "b", ""), Finding(Level.warning, "c", "")]
    assert [finding.name for finding in by_level(findings)] == ["b", "c", "a"]
    assert places([3, 3, 1, 5, 9], lambda index: f"f:{index}") == ("f:3", "f:1", "f:5")
