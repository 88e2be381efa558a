"""The token contract: whole artifacts hold it, and planted errors are caught by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_kit.data.template.own_date import with_own_date
from qlora_kit.evaluation.token_parity.compare import TokenParity
from qlora_kit.formats.gguf.writer import write_gguf
from qlora_kit.formats.token_parity import check_token_ids
from tests.chat_templates import FAMILIES as TEMPLATES
from tests.tiny_models import build_tiny_model, set_stop_tokens

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
LLAMA3 = (
    "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("contract")

    def model(family: str) -> Path:
        folder = root / family
        return folder if folder.is_dir() else build_tiny_model(family, folder)

    return model


@pytest.fixture
def copy(models: Callable[[str], Path], tmp_path: Path) -> Make:
    """A folder to spoil: `copy("qwen3")`, or with another chat template."""

    def made(family: str, template: str | None = None) -> Path:
        folder = Path(shutil.copytree(models(family), tmp_path / f"copy of {family}"))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return made


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def gguf(folder: Path, out: Path, modelfile: str | None = None) -> Path:
    out.mkdir()
    write_gguf(folder, out / "m.gguf", "F16")
    if modelfile is not None:
        (out / "Modelfile").write_text(modelfile, encoding="utf-8")
    return out


def modelfile(template: str, stop: str, source: str = "./m.gguf", more: str = "") -> str:
    return f'FROM {source}\nTEMPLATE """{template}"""\n{more}PARAMETER stop "{stop}"\n'


def told(contract: TokenParity) -> str:
    return "\n".join(map(str, contract.failures))


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "gemma3", "phi3", "qwen2"])
def test_an_artifact_as_the_kit_writes_it_holds_the_contract(
    models: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = models(family)
    tokenizer = tokenizer_of(folder)
    stops = {tokenizer.eos_token_id}
    plain = check_token_ids("merged", folder, ".", tokenizer, stops)
    assert plain.holds, told(plain)
    assert plain.compared == {"transformers": 20}
    file = check_token_ids("gguf", gguf(folder, tmp_path / "out"), "m.gguf", tokenizer, stops)
    assert file.holds, told(file)
    assert file.compared == {"transformers": 20, "llama.cpp": 20}


@pytest.mark.parametrize(
    ("family", "published"),
    [("qwen3", "qwen3"), ("qwen2", "qwen2_5"), ("llama", "default_system"), ("gemma3", "gemma3")],
)
def test_published_templates_read_alike_in_transformers_and_llama_cpp(
    copy: Make, tmp_path: Path, family: str, published: str
) -> None:
    folder = copy(family, TEMPLATES[published].template.source)
    tokenizer = tokenizer_of(folder)
    contract = check_token_ids("gguf", gguf(folder, tmp_path / "out"), "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert contract.holds, told(contract)
    assert contract.compared["llama.cpp"] == 20


def test_another_date_than_the_trained_one_is_caught_and_can_be_kept(copy: Make, tmp_path: Path) -> None:
    published = TEMPLATES["llama3_1"].template.source
    folder = copy("llama3", published)
    tokenizer = tokenizer_of(folder)
    stops = {tokenizer.eos_token_id}
    contract = check_token_ids("gguf", gguf(folder, tmp_path / "today"), "m.gguf", tokenizer, stops)
    # without a fix of the file, llama.cpp gives today's date to the template; a writer that fixes it leaves no failure
    assert contract.holds or {failure.reader for failure in contract.failures} == {"llama.cpp"}
    assert contract.holds or "Today Date: 26 Jul 2024" in contract.failures[0].expected
    (folder / "chat_template.jinja").write_text(with_own_date(published), encoding="utf-8")
    contract = check_token_ids("gguf", gguf(folder, tmp_path / "kept"), "m.gguf", tokenizer, stops)
    assert contract.holds, told(contract)


def test_a_wrong_template_in_a_folder_is_caught_by_name(copy: Make) -> None:
    folder = copy("qwen3")
    tokenizer = tokenizer_of(folder)
    wrong = tokenizer.chat_template.replace("<|im_end|>' + '\n'", "<|im_end|>'")
    (folder / "chat_template.jinja").write_text(wrong, encoding="utf-8")
    contract = check_token_ids("merged", folder, ".", tokenizer, {tokenizer.eos_token_id})
    assert len(contract.failures) == 20
    failure = contract.failures[4]
    assert (failure.reader, failure.kind, failure.conversation) == ("transformers", "chat template", "two rounds")
    assert "is 601 ('<|im_start|>') here" in failure.what
    assert "Turn on the lamp.<|im_end|>\n<|im_start|>assistant\nDone." in failure.expected
    assert "Turn on the lamp.<|im_end|><|im_start|>assistant\nDone." in failure.found
    assert str(failure).startswith("transformers: chat template in the conversation 'two rounds': token ")


def test_a_missing_template_is_caught_by_name(copy: Make) -> None:
    folder = copy("qwen3")
    tokenizer = tokenizer_of(folder)
    (folder / "chat_template.jinja").unlink()
    contract = check_token_ids("merged", folder, ".", tokenizer, {tokenizer.eos_token_id})
    assert told(contract) == "transformers: chat template: the folder has none"


def test_a_wrong_template_in_a_gguf_file_is_caught_by_name(
    copy: Make, models: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(models("llama3"))
    wrong = copy("llama3", tokenizer.chat_template.replace("| trim", ""))
    contract = check_token_ids("gguf", gguf(wrong, tmp_path / "out"), "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert [(failure.reader, failure.kind, failure.conversation) for failure in contract.failures] == [
        ("llama.cpp", "chat template", "blanks around texts")
    ]


def test_a_template_that_llama_cpp_cannot_render_is_caught_by_name(
    copy: Make, models: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(models("qwen3"))
    refusing = "{% if messages | length > 6 %}{{ raise_exception('too long') }}{% endif %}" + tokenizer.chat_template
    out = gguf(copy("qwen3", refusing), tmp_path / "out")
    contract = check_token_ids("gguf", out, "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert [failure.conversation for failure in contract.failures] == ["four rounds"]
    assert "it cannot render what the trained template can" in told(contract)


def test_a_tokenizer_that_splits_otherwise_is_caught_by_name(copy: Make) -> None:
    folder = copy("qwen3")
    tokenizer = tokenizer_of(folder)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:40]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    contract = check_token_ids("merged", folder, ".", tokenizer, {tokenizer.eos_token_id})
    assert {failure.kind for failure in contract.failures} == {"token ids"}


def test_two_beginnings_of_text_are_caught_by_name(copy: Make, tmp_path: Path) -> None:
    folder = copy("llama3")
    tokenizer = tokenizer_of(folder)
    doubled = modelfile("<|begin_of_text|>" + LLAMA3, "<|eot_id|>")
    contract = check_token_ids(
        "gguf", gguf(folder, tmp_path / "out", doubled), "m.gguf", tokenizer, {tokenizer.eos_token_id}
    )
    assert len(contract.failures) == 20
    assert {(failure.reader, failure.kind) for failure in contract.failures} == {
        ("Ollama's Modelfile", "beginning of text")
    }
    assert contract.failures[0].what == "2 beginning-of-text tokens in front, trained with 1"


def test_no_beginning_of_text_is_caught_by_name(copy: Make) -> None:
    folder = copy("llama3", TEMPLATES["chatml"].template.source)
    tokenizer = tokenizer_of(folder)  # puts one in front of every text, which this template does not write
    contract = check_token_ids("merged", folder, ".", tokenizer, {tokenizer.eos_token_id})
    assert contract.failures[0].what == "0 beginning-of-text tokens in front, trained with 1"


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_wrong_end_in_a_folder_is_caught_by_name(copy: Make, name: str) -> None:
    folder = copy("qwen3")
    tokenizer = tokenizer_of(folder)
    end = tokenizer.eos_token_id
    set_stop_tokens(folder, [600])
    if name == "config.json":
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**config, "eos_token_id": 600}), encoding="utf-8")
    contract = check_token_ids("merged", folder, ".", tokenizer, {end})
    assert told(contract) == (
        f"transformers: end of generation: {name}, eos_token_id is 600 (<|endoftext|>), which is no stop token; those "
        f"are {end} (<|im_end|>)\n"
        f"transformers: end of generation: nothing ends an answer at {end} (<|im_end|>), with which training closed "
        "answers"
    )


def test_a_wrong_end_in_a_gguf_file_is_caught_by_name(copy: Make, tmp_path: Path) -> None:
    folder = copy("qwen3")
    tokenizer = tokenizer_of(folder)
    wrong = tokenizer.convert_tokens_to_ids("<think>")
    set_stop_tokens(folder, [wrong])
    contract = check_token_ids("gguf", gguf(folder, tmp_path / "out"), "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert "llama.cpp: end of generation: eos_token_id is" in told(contract)
    assert "(<think>), which is no stop token" in told(contract)


def test_a_good_modelfile_holds_the_contract(copy: Make, tmp_path: Path) -> None:
    folder = copy("llama", TEMPLATES["default_system"].template.source)
    tokenizer = tokenizer_of(folder)
    system = 'SYSTEM "You answer questions about places"\n'
    out = gguf(folder, tmp_path / "out", modelfile(CHATML, "<|im_end|>", more=system))
    contract = check_token_ids("gguf", out, "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert contract.holds, told(contract)
    assert contract.compared == {"transformers": 20, "llama.cpp": 20, "Ollama's Modelfile": 20}
    assert contract.notes == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (modelfile(CHATML.replace("assistant\n", "assistant"), "<|im_end|>"), "Ollama's Modelfile: chat template in"),
        (modelfile(CHATML + "{{ .Tools }}", "<|im_end|>"), "it cannot render what the trained template can"),
        (modelfile(CHATML, "<|im_start|>"), "PARAMETER stop '<|im_start|>' is token [601], which is no stop token"),
        (modelfile(CHATML, "<|im_start|>"), "no PARAMETER stop '<|im_end|>', with which training closed answers"),
        (modelfile(CHATML, "<|im_end|>", "./other.gguf"), "FROM names ./other.gguf, which is not there"),
        ("SYSTEM x\n", "the Modelfile has no FROM line"),
    ],
)
def test_a_wrong_modelfile_is_caught_by_name(
    models: Callable[[str], Path], tmp_path: Path, text: str, words: str
) -> None:
    folder = models("qwen3")
    tokenizer = tokenizer_of(folder)
    out = gguf(folder, tmp_path / "out", text)
    contract = check_token_ids("gguf", out, "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert words in told(contract)
    assert {failure.reader for failure in contract.failures} == {"Ollama's Modelfile"}


def test_what_readers_leave_to_their_clients_is_a_note(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama3")
    tokenizer = tokenizer_of(folder)
    out = gguf(folder, tmp_path / "trims", modelfile(LLAMA3, "<|eot_id|>"))
    contract = check_token_ids("gguf", out, "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert contract.holds, told(contract)
    assert contract.notes == [
        "Ollama's Modelfile cannot cut blanks around texts as the trained template does: send texts without "
        "(conversation 'blanks around texts')"
    ]
    folder = models("qwen3")
    tokenizer = tokenizer_of(folder)
    contract = check_token_ids("gguf", gguf(folder, tmp_path / "nfc"), "m.gguf", tokenizer, {tokenizer.eos_token_id})
    assert contract.holds, told(contract)
    assert contract.notes == [
        "llama.cpp does not join letters and accents as the trained tokenizer does: send text in Unicode's form NFC "
        "(conversation 'decomposed letters')"
    ]


def test_what_is_not_compared_is_a_note(copy: Make, models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("qwen3")
    tokenizer = tokenizer_of(folder)
    stops = {tokenizer.eos_token_id}
    out = gguf(folder, tmp_path / "out", 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n')
    contract = check_token_ids("gguf", out, "m.gguf", tokenizer, stops)
    assert "Ollama's Modelfile has no TEMPLATE, so Ollama's prompts were not compared" in contract.notes
    refusing = TEMPLATES["gemma2"].template.source
    tokenizer.chat_template = refusing
    contract = check_token_ids("merged", copy("qwen3", refusing), ".", tokenizer, stops)
    assert (contract.compared, contract.notes) == (
        {"transformers": 16}, ["the trained template refuses 4 of 20 conversations"]
    )  # fmt: skip
    tokenizer.chat_template = None
    contract = check_token_ids("merged", folder, ".", tokenizer, stops)
    assert contract.holds and "no conversation was compared" in contract.notes[0]
    assert "base's GGUF file decides" in check_token_ids("adapter_gguf", folder, "a.gguf", tokenizer, stops).notes[-1]


def test_an_unreadable_tokenizer_is_a_failure(tmp_path: Path, models: Callable[[str], Path]) -> None:
    tokenizer = tokenizer_of(models("qwen3"))
    contract = check_token_ids("merged", tmp_path, ".", tokenizer, {tokenizer.eos_token_id})
    assert "the tokenizer cannot be read" in told(contract)
