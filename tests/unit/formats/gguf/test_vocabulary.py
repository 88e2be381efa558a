"""Reading tokenizers: kinds, pre-tokenizer names, added tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.core.errors import RecipeError
from qlora_kit.formats.gguf.pre_tokenizers import name_of_pre_tokenizer
from qlora_kit.formats.gguf.vocabulary import TokenType, Vocabulary, read_vocabulary
from tests.tiny_tokenizers import (
    gemma_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    phi3_tokenizer,
    qwen_tokenizer,
    smollm_tokenizer,
)

TOKENIZERS = {
    "smollm": smollm_tokenizer,
    "llama-bpe": llama3_tokenizer,
    "qwen2": qwen_tokenizer,
    "gemma": gemma_tokenizer,
    "phi3": phi3_tokenizer,
    "mistral": mistral_tokenizer,
}


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, folder: Path, stops: list[int] | None = None) -> Vocabulary:
    tokenizer.save_pretrained(folder)
    return read_vocabulary(folder, 640, stops or [], {})


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizers_are_recognized(pre: str, tmp_path: Path) -> None:
    found = vocabulary_of(TOKENIZERS[pre](), tmp_path)
    assert (found.kind, found.pre) == ("gpt2", pre)
    assert found.merges and not found.scores
    assert found.add_bos == (pre == "llama-bpe")
    assert not found.add_eos


@pytest.mark.parametrize(("name", "prefix", "bos"), [("gemma", False, True), ("phi3", True, False)])
def test_sentencepiece_like_tokenizers_are_recognized(name: str, prefix: bool, bos: bool, tmp_path: Path) -> None:
    found = vocabulary_of(TOKENIZERS[name](), tmp_path)
    assert (found.kind, found.pre) == ("llama", "default")
    assert (found.add_space_prefix, found.add_bos) == (prefix, bos)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<0x0A>"] is TokenType.BYTE
    assert kinds["<unk>"] is TokenType.UNKNOWN
    assert found.strips_after_special == (name == "phi3")


def test_scores_follow_the_order_of_the_merges(tmp_path: Path) -> None:
    found = vocabulary_of(mistral_tokenizer(), tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    score = dict(zip(found.tokens, found.scores, strict=True))
    joined = [score["".join(pair)] for pair in merges]
    assert joined == sorted(joined, reverse=True) and joined[0] > joined[-1]
    assert min(joined) > score["[PAD639]"]


def test_added_tokens_are_control_or_user_defined(tmp_path: Path) -> None:
    found = vocabulary_of(qwen_tokenizer(), tmp_path)
    kinds = dict(zip(found.tokens, found.types, strict=True))
    assert kinds["<|im_end|>"] is TokenType.CONTROL
    assert kinds["<think>"] is TokenType.USER_DEFINED
    assert kinds["[PAD630]"] is TokenType.UNUSED


def test_tokens_beyond_the_embedding_are_dropped(tmp_path: Path) -> None:
    qwen_tokenizer().save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 603, [], {})
    assert len(found.tokens) == 603
    assert "<|im_end|>" in found.tokens
    assert "</think>" not in found.tokens


def test_stop_tokens_win_over_the_tokenizers_own_end(tmp_path: Path) -> None:
    found = vocabulary_of(smollm_tokenizer(), tmp_path, stops=[600])
    assert found.special_ids["eos"] == 600


@pytest.mark.parametrize(
    ("steps", "skips_merges", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], False, "gpt-2"),
        ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], False, None),
        ([{"type": "Whitespace"}], False, None),
    ],
)
def test_pre_tokenizer_table(steps: list[dict[str, Any]], skips_merges: bool, name: str | None) -> None:
    tokenizer = {
        "model": {"ignore_merges": skips_merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
    if name:
        assert name_of_pre_tokenizer(tokenizer, "x") == name
        return
    with pytest.raises(RecipeError, match=r"no llama\.cpp name"):
        name_of_pre_tokenizer(tokenizer, "x")


def test_a_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="Unigram"):
        read_vocabulary(tmp_path, 8, [], {})


def test_a_normalizer_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = smollm_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RecipeError, match="Lowercase"):
        vocabulary_of(tokenizer, tmp_path)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    tokenizer = smollm_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(RecipeError, match="Punctuation"):
        vocabulary_of(tokenizer, tmp_path)


def test_a_template_with_a_date_of_its_own_keeps_it(tmp_path: Path) -> None:
    tokenizer = llama3_tokenizer()
    own = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{{ date_string }}"
    tokenizer.chat_template = own
    served = vocabulary_of(tokenizer, tmp_path).chat_template
    assert isinstance(served, str)
    assert served.endswith(own) and "26 Jul 2024" in served.removesuffix(own)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert vocabulary_of(tokenizer, tmp_path).chat_template == "{{ messages[0]['content'] }}"
