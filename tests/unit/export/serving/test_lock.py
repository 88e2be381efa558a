"""lock.json: hashes that change with what they stand for, and nothing private."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qlora_kit import __version__
from qlora_kit.export.serving.lock import lock_of, weight_hashes, write_lock
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from tests.served_artifact import SECRET, Made


def test_the_lock_names_everything_that_went_in(facts: Made, run: RunDirectory, base: Path) -> None:
    lock = lock_of(facts())
    assert lock["kit"] == __version__
    assert lock["artifact"] == {"name": "tiny_q4", "format": "gguf", "settings": {"mix": "Q4_K_M"}}
    assert lock["seed"] == 3
    assert lock["recipe_sha256"] == sha256(run.recipe.read_bytes()).hexdigest()
    assert lock["adapter_sha256"] == sha256(b"weights").hexdigest()
    assert lock["data"] == {"train": {"rows.jsonl": "ab12"}, "held_out": {"rows.jsonl": "cd34"}}
    assert lock["trained_with"] == {"torch": "9.9"}
    assert lock["chat_template_sha256"] == sha256(facts().tokenizer.chat_template.encode()).hexdigest()
    named = lock["base"]
    assert isinstance(named, dict)
    assert (named["source"], named["revision"]) == ("Tiny-1B", None)
    assert named["config_sha256"] == sha256(b"{}").hexdigest()


def test_no_path_of_the_machine_is_in_it(facts: Made, tmp_path: Path) -> None:
    write_lock(tmp_path, facts())
    text = (tmp_path / "lock.json").read_text("utf-8")
    assert SECRET not in text and str(tmp_path) not in text


def test_weights_are_told_by_size_and_header(base: Path) -> None:
    before = weight_hashes(Base("x", base))
    raw = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = sha256(raw[8 : 8 + length]).hexdigest()
    assert before == [{"file": "model.safetensors", "bytes": len(raw), "header_sha256": header}]
    save_file({"b": np.zeros((2, 3), np.float32)}, base / "model.safetensors")
    assert weight_hashes(Base("x", base)) != before


def test_a_base_that_was_never_trained(facts: Made) -> None:
    lock = json.loads(json.dumps(lock_of(facts(run=None, seed=None))))
    assert (lock["recipe_sha256"], lock["adapter_sha256"], lock["data"], lock["seed"]) == (None, None, {}, None)


def test_a_broken_weight_file_has_no_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\xff" * 20)
    assert weight_hashes(Base("x", base))[0]["header_sha256"] is None
