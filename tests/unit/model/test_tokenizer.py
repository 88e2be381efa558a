"""A tokenizer is fast, has a pad token that ends nothing, and takes the template of the recipe."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_kit.core.errors import RecipeError
from qlora_kit.families.registry import CHAT_TEMPLATES
from qlora_kit.model.tokenizer import load_tokenizer, stop_ids
from tests.tiny_tokenizers import gemma_tokenizer, llama3_tokenizer, mistral_tokenizer, phi3_tokenizer, smollm_tokenizer


def saved(folder, *names, **special):
    raw = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=special.get("unk_token"))
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return folder


def test_a_pad_token_of_the_model_is_kept(tmp_path):
    smollm_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast
    assert tokenizer.pad_token == "<|im_end|>"


def test_without_one_a_reserved_token_comes_before_the_unknown_one(tmp_path):
    folder = saved(tmp_path, "a", "</s>", "<unk>", "<|finetune_right_pad_id|>", eos_token="</s>", unk_token="<unk>")
    assert load_tokenizer(folder).pad_token == "<|finetune_right_pad_id|>"


def test_without_a_reserved_token_the_unknown_one_pads(tmp_path):
    mistral_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<unk>", "</s>")


def test_a_reserved_token_that_ends_text_is_passed_over(tmp_path):
    folder = saved(tmp_path, "a", "<|endoftext|>", "<unk>", eos_token="<|endoftext|>", unk_token="<unk>")
    assert load_tokenizer(folder).pad_token == "<unk>"


def test_the_end_of_text_pads_when_nothing_else_is_there(tmp_path):
    assert load_tokenizer(saved(tmp_path, "a", "</s>", eos_token="</s>")).pad_token == "</s>"


def test_the_vocabulary_does_not_grow(tmp_path):
    folder = saved(tmp_path, "a", "</s>", "<unk>", eos_token="</s>", unk_token="<unk>")
    assert len(load_tokenizer(folder)) == 3


def test_a_tokenizer_without_any_such_token_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="neither a pad token nor an end-of-text token"):
        load_tokenizer(saved(tmp_path, "a"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)has no fast version.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_template_of_the_recipe_replaces_the_models(tmp_path):
    smollm_tokenizer().save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path, str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize(("contents", "reason"), [(None, "no such chat template file"), (" \n", "is empty")])
def test_a_template_file_that_is_missing_or_empty(tmp_path, contents, reason):
    smollm_tokenizer().save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    if contents is not None:
        template.write_text(contents, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(tmp_path, str(template))
    assert reason in str(caught.value)
    assert "fix      model.chat_template=null" in str(caught.value)


NAMED = {
    "chatml": (smollm_tokenizer, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"),
    "gemma": (gemma_tokenizer, "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"),
    "llama3": (
        llama3_tokenizer,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>",
    ),
    "mistral": (mistral_tokenizer, "<s>[INST] hi [/INST] yes</s>"),
    "phi3": (phi3_tokenizer, "<|user|>\nhi<|end|>\n<|assistant|>\nyes<|end|>\n"),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_replaces_the_models_own(tmp_path, name):
    make, expected = NAMED[name]
    tokenizer = make()
    tokenizer.chat_template = "{{ 'other' }}"
    tokenizer.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    loaded = load_tokenizer(tmp_path, name)
    assert loaded.apply_chat_template(turns, tokenize=False) == expected
    prompt = loaded.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert prompt.endswith(expected[: expected.index("yes")].rstrip(" ")[-5:])


def test_a_named_template_needs_its_tokens(tmp_path):
    mistral_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(tmp_path, "chatml")
    assert "the tokenizer has no token <|im_start|> and no <|im_end|>" in str(caught.value)
    assert "model.chat_template=null" in str(caught.value)


def test_stop_ids_are_those_of_the_tokenizer_and_of_the_generation_settings(tmp_path):
    tokenizer = smollm_tokenizer()
    assert stop_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert stop_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id, 5, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id, 5}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 50_000,
        "{",
        '{"model": 5}',
        '{"added_tokens_decoder": [1]}',
        '{"extra": 1, "model_max_length": {}}',
    ],
)
def test_a_strangers_tokenizer_is_read_or_refused_by_name(tmp_path, name, text):
    smollm_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    try:
        load_tokenizer(tmp_path)
    except RecipeError as error:
        assert str(tmp_path) in str(error)
