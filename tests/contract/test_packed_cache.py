"""A base that is kept in 4 bit is the one that was loaded, and only that one."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qlora_kit.cli.verbs import main
from qlora_kit.core.files import size_on_disk
from qlora_kit.model import load, packed_cache
from qlora_kit.model.load import load_base
from qlora_kit.model.packed_cache import CACHE, META
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.tracking.tracker import read_metrics
from tests.e2e.conftest import only_run, train_line, write_rows
from tests.tiny_models import build_tiny_image_text_model, build_tiny_model

FAMILIES = ("llama", "qwen3_moe", "qwen3_5", "gemma4_e", "starcoder2", "granite_hybrid", "apertus")
OF_LOADING = ("_is_hf_initialized", "_weight_conversions", "_use_kernels")  # notes of transformers on how it read files


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(packed_cache, "WORTH_BYTES", 0)
    monkeypatch.setattr(packed_cache, "LEFT_ON_DISK", 0.0)
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 20_000)  # several files
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / CACHE


def kept(cache):
    return sorted(path.name for path in cache.iterdir() if (path / META).exists()) if cache.exists() else []


def notes(model):
    """What modules hold beside tensors and modules, as far as it can be compared."""
    held = {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()}
    plain = (bool, int, float, str, torch.dtype, type(None))
    return {key: value for key, value in held.items() if isinstance(value, plain) and not key.endswith(OF_LOADING)}


def assert_same(found, wanted):
    assert type(found) is type(wanted) and notes(found) == notes(wanted)
    assert found.config.to_dict() == wanted.config.to_dict() and found.generation_config == wanted.generation_config
    for these, those in (
        (found.named_parameters(), wanted.named_parameters()),
        (found.named_buffers(), wanted.named_buffers()),
    ):
        mine, theirs = dict(these), dict(those)
        assert mine.keys() == theirs.keys()
        for name, one in mine.items():
            other = theirs[name]
            assert (type(one), one.dtype, one.requires_grad) == (type(other), other.dtype, other.requires_grad), name
            assert torch.equal(one.data, other.data), name
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def no_reading(*_, **__):
    raise AssertionError("the checkpoint's weights are read again")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_load_gives_the_same_model_from_the_cache(family, double_quant, tmp_path, cache, monkeypatch, capsys):
    folder = build_tiny_model(family, tmp_path / "base", dtype=torch.bfloat16)
    quant = QuantConfig(double_quant=double_quant)
    first = load_base(folder, quant)
    assert len(kept(cache)) == 1
    monkeypatch.setattr(load, "load_language_model", no_reading)
    assert_same(load_base(folder, quant), first)
    assert "base: read in 4 bit, as an earlier run kept it" in capsys.readouterr().err


def test_the_language_model_of_an_image_text_base_too(tmp_path, cache, monkeypatch):
    folder = build_tiny_image_text_model(tmp_path / "base")
    first = load_base(folder, QuantConfig())
    monkeypatch.setattr(load, "load_language_model", no_reading)
    assert_same(load_base(folder, QuantConfig()), first)


def test_other_settings_and_other_weights_are_kept_apart(tmp_path, cache):
    folder = build_tiny_model("llama", tmp_path / "base")
    settings = [
        QuantConfig(),
        QuantConfig(double_quant=False),
        QuantConfig(kind=QuantKind.fp4),
        QuantConfig(compute_dtype=ComputeDtype.float32),
        QuantConfig(keep_16bit=["o_proj"]),
    ]
    for count, quant in enumerate(settings, 1):
        load_base(folder, quant)
        assert len(kept(cache)) == count
    before = load_base(folder, settings[0])
    shutil.rmtree(folder)
    build_tiny_model("llama", folder, seed=1)
    after = load_base(folder, settings[0])
    assert len(kept(cache)) == len(settings) + 1
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "other", "not json"])
def test_a_damaged_one_is_said_and_made_again(damage, tmp_path, cache, capsys):
    folder = build_tiny_model("llama", tmp_path / "base")
    first = load_base(folder, QuantConfig())
    (name,) = kept(cache)
    *_, file = sorted((cache / name).glob("*.safetensors"))
    assert file.name != "0.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "flipped":
        held = bytearray(file.read_bytes())
        held[-5] ^= 1
        file.write_bytes(held)
    elif damage == "gone":
        file.unlink()
    elif damage == "other":
        meta = cache / name / META
        meta.write_text(meta.read_text().replace('"model.norm.weight"', '"lm_head.weight.quant_state.none"'))
    else:
        (cache / name / META).write_text("{")
    capsys.readouterr()
    assert_same(load_base(folder, QuantConfig()), first)
    assert "cannot be read" in capsys.readouterr().err
    assert kept(cache) == [name]
    assert_same(load_base(folder, QuantConfig()), first)
    assert "cannot be read" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [SafetensorError("I/O error: no space left"), MemoryError("no memory")])
def test_a_run_goes_on_where_a_file_cannot_be_written(error, tmp_path, cache, monkeypatch, capsys):
    folder = build_tiny_model("llama", tmp_path / "base")
    written = []

    def save(tensors, file):
        written.append(file)
        if len(written) == 3:
            raise error
        save_file(tensors, file)

    monkeypatch.setattr(packed_cache, "save_file", save)
    load_base(folder, QuantConfig())
    assert f"base: not kept in 4 bit: {error}" in capsys.readouterr().err
    assert not kept(cache) and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
def test_a_shortage_is_no_damage(error, tmp_path, cache, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "base")
    load_base(folder, QuantConfig())

    def full(*_):
        raise error

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(packed_cache, "_read_file", full)
        load_base(folder, QuantConfig())
    assert len(kept(cache)) == 1


def test_large_tensors_are_held_one_at_a_time(monkeypatch):
    assert packed_cache._at_once([20_000, 40_000]) == packed_cache.AT_ONCE
    assert packed_cache._at_once([20_000, 40_001]) == 1


def test_what_is_not_worth_it_is_not_kept(tmp_path, cache, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "base")
    load_base(folder, replace(QuantConfig(), cache=False))
    load_base(folder, QuantConfig(kind=QuantKind.none))
    load_base(folder, QuantConfig(kind=QuantKind.int8))
    monkeypatch.setattr(packed_cache, "WORTH_BYTES", 10**9)
    load_base(folder, QuantConfig())
    assert not kept(cache)


def test_a_disk_that_would_be_full_is_left_alone(tmp_path, cache, monkeypatch, capsys):
    folder = build_tiny_model("llama", tmp_path / "base")
    usage = SimpleNamespace(total=10**7, free=10**6, used=9 * 10**6)
    monkeypatch.setattr(packed_cache, "LEFT_ON_DISK", 0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    load_base(folder, QuantConfig())
    assert not kept(cache)
    assert "is almost full" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    folder = build_tiny_model("llama", tmp_path / "base")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file"))
    load_base(folder, QuantConfig())
    assert "base: not kept in 4 bit" in capsys.readouterr().err


def test_what_was_not_used_for_longest_goes_first(tmp_path, cache, monkeypatch):
    folder = build_tiny_model("llama", tmp_path / "base")
    settings = [QuantConfig(), QuantConfig(double_quant=False), QuantConfig(kind=QuantKind.fp4)]
    load_base(folder, settings[0])
    (first,) = kept(cache)
    load_base(folder, settings[1])
    load_base(folder, settings[0])  # used again
    size = size_on_disk(cache / first)
    monkeypatch.setattr(packed_cache, "MOST_CACHED_BYTES", int(2.5 * size))
    load_base(folder, settings[2])
    assert len(kept(cache)) == 2 and first in kept(cache)


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_a_run_on_it_learns_as_the_first_one_did(engine, tmp_path, monkeypatch, cache):
    build_tiny_model("qwen3", tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 8, 1, "turn on")
    write_rows(tmp_path / "held_out.jsonl", 4, 2, "please start")
    losses = []
    for name in ("first", "second"):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)
        assert main(train_line(tmp_path, f"engine={engine}", "trainer.max_steps=4")) == 0
        losses.append([row.get("loss") for row in read_metrics(only_run(place) / "metrics.jsonl")])
        if name == "first":
            monkeypatch.setattr(load, "load_language_model", no_reading)
    assert losses[0] == losses[1] and len(kept(cache)) == 1
