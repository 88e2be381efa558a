"""Tokens beyond the base's embedding stop a run before a weight is loaded, and are told where nothing uses them."""

import json

import pytest

from qlora_kit.cli.verbs import main
from qlora_kit.core.errors import EXIT_BAD_RECIPE, EXIT_OK, RecipeError
from qlora_kit.formats.gguf.vocabulary import read_vocabulary
from tests.tiny_models import EMBEDDING_ROWS, build_tiny_model
from tests.tiny_tokenizers import smollm_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("qwen3", tmp_path_factory.mktemp("base") / "qwen3")


def grown(base, tmp_path, *, pad=False, template=False):
    """The base's folder with a tokenizer of more tokens than the embedding has rows."""
    tokenizer = smollm_tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(80)])
    if pad:
        tokenizer.pad_token = "<extra79>"
    if template:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<extra79>")
    folder = tmp_path / "grown"
    folder.mkdir()
    for path in base.iterdir():
        if "token" not in path.name and "template" not in path.name:
            (folder / path.name).symlink_to(path)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<extra79>") >= EMBEDDING_ROWS
    return folder


def inspected(folder, tmp_path, capfd, text):
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"prompt": "hi", "completion": text}) + "\n", encoding="utf-8")
    line = ["inspect", "model=demo", f"model.source={folder}", "data=rows", f"data.train_file={rows}"]
    code = main([*line, "data.max_tokens=64"])
    return code, "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_row_with_a_token_beyond_the_embedding_is_an_error(base, tmp_path, capfd):
    code, said = inspected(grown(base, tmp_path), tmp_path, capfd, "a <extra79> b")
    assert code == EXIT_BAD_RECIPE
    assert "1 training row holds <extra79>, which the base has no embedding for (640 rows;" in said
    assert f"{tmp_path}/a.jsonl:1" in said


@pytest.mark.parametrize("nested", [False, True])
def test_the_rows_of_the_embedding_are_those_of_the_text_model(base, tmp_path, capfd, nested):
    folder = grown(base, tmp_path)
    config = json.loads((base / "config.json").read_text("utf-8"))
    assert config["vocab_size"] == EMBEDDING_ROWS
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config), encoding="utf-8")
    assert inspected(folder, tmp_path, capfd, "a <extra79> b")[0] == EXIT_BAD_RECIPE


@pytest.mark.slow
def test_a_padding_token_or_a_template_beyond_the_embedding_is_an_error(base, tmp_path, capfd):
    (tmp_path / "pad").mkdir()
    code, said = inspected(grown(base, tmp_path / "pad", pad=True), tmp_path, capfd, "a")
    assert code == EXIT_BAD_RECIPE
    assert "the padding token <extra79> has the id" in said
    code, said = inspected(grown(base, tmp_path, template=True), tmp_path, capfd, "a")
    assert code == EXIT_BAD_RECIPE
    assert "1 training row holds <extra79>" in said


@pytest.mark.slow
def test_tokens_that_nothing_uses_are_told(base, tmp_path, capfd):
    code, said = inspected(grown(base, tmp_path), tmp_path, capfd, "a")
    assert code == EXIT_OK
    assert "that the base has no embedding for (<extra" in said
    assert "these rows use none" in said
    assert "no embedding for" not in inspected(base, tmp_path, capfd, "a")[1]


def test_a_gguf_file_says_what_it_leaves_out_or_is_refused(base, tmp_path, capfd):
    config = json.loads((base / "config.json").read_text("utf-8"))
    folder = grown(base, tmp_path)
    assert len(read_vocabulary(folder, EMBEDDING_ROWS, (), config).tokens) == EMBEDDING_ROWS
    assert (
        "tokens of the tokenizer are beyond the 640 rows of the embedding; left out: <extra" in capfd.readouterr().err
    )
    (tmp_path / "b").mkdir()
    with pytest.raises(RecipeError) as caught:
        read_vocabulary(grown(base, tmp_path / "b", template=True), EMBEDDING_ROWS, (), config)
    assert "has <extra79>, which ends answers or stands in the chat template" in str(caught.value)
