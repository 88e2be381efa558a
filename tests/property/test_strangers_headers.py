"""A stranger's checkpoint: whatever its headers and settings hold, it is read or refused by name, in little memory."""

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.adapter.attach import load_adapter
from qlora_kit.adapter.updates import read_adapter
from qlora_kit.core.errors import EXIT_BAD_RECIPE, KitError
from qlora_kit.model.source import check_folder
from qlora_kit.model.tokenizer import stop_ids
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.forecast import KnownBase
from qlora_kit.training.reach import reach_of
from qlora_kit.weights.headers import LONGEST_HEADER, raw_header, read_headers
from qlora_kit.weights.names import linear_module_names

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    float("nan"),
    "",
    "F32",
    "../up",
    [],
    [[]],
    [-1],
    [2**62, 4],
    {},
]
DTYPES = ["F32", "BF16", "U8", "F8_E4M3", "", None, 7, ["F32"], {}]
LENGTHS = [0, 1, 7, 2**20, 2**31, 2**60, 2**63, 2**64 - 1]
CONFIG = {"model_type": "llama", "hidden_size": 8}


def entry(draw: random.Random) -> object:
    if draw.random() < 0.15:
        return draw.choice(ODD)
    fields: dict[str, object] = {"dtype": draw.choice(DTYPES), "shape": [2, 2], "data_offsets": [0, 16]}
    for name in fields:
        if draw.random() < 0.3:
            fields[name] = draw.choice(ODD)
    if draw.random() < 0.2:
        del fields[draw.choice(list(fields))]
    return fields


def header(draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    table: object = {f"model.layers.{number}.up_proj.weight": entry(draw) for number in range(draw.randrange(4))}
    if kind == 0:
        table = draw.choice(ODD)
    text = json.dumps(table).encode()
    if kind == 1:
        text = bytes(draw.randrange(256) for _ in range(draw.randrange(60)))
    if kind == 2:
        text = b"[" * draw.choice([10, 100_000]) + text
    length = draw.choice(LENGTHS) if kind == 3 else len(text)
    whole = struct.pack("<Q", length) + text + bytes(draw.choice([0, 16, 17]))
    return whole[: draw.randrange(len(whole) + 1)] if kind == 4 else whole


def settings(draw: random.Random, good: Mapping[str, object]) -> str:
    kind = draw.randrange(5)
    if kind == 0:
        return json.dumps(draw.choice(ODD))
    if kind == 1:
        return "[" * 100_000
    if kind == 2:
        return json.dumps(good)[: draw.randrange(len(json.dumps(good)))]
    return json.dumps({**good, draw.choice(list(good)): draw.choice(ODD)})


def stranger(draw: random.Random, folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(header(draw))
    (folder / "config.json").write_text(settings(draw, {**CONFIG, "quantization_config": draw.choice(ODD)}))
    (folder / "generation_config.json").write_text(
        settings(draw, {"eos_token_id": draw.choice([2, *ODD, ["a"], [2, 3]])})
    )
    if draw.random() < 0.5:
        index = {"weight_map": draw.choice([*ODD, {"a": draw.choice(["model.safetensors", "no.safetensors", *ODD])}])}
        (folder / "model.safetensors.index.json").write_text(settings(draw, index))


READERS = {
    "headers": read_headers,
    "linear modules": linear_module_names,
    "folder": check_folder,
    "raw header": lambda folder: raw_header(folder / "model.safetensors"),
    "ends": lambda folder: stop_ids(folder, SimpleNamespace(eos_token_id=2)),
}


def walk(folder: Path, seed: int, count: int) -> int:
    refused = 0
    for number in range(count):
        draw = random.Random(seed + number)
        place = folder / str(number)
        stranger(draw, place)
        for name, read in READERS.items():
            try:
                read(place)
            except KitError as error:
                refused += 1
                assert error.exit_code == EXIT_BAD_RECIPE, (seed + number, name, error)
                assert str(place) in str(error), (seed + number, name, error)
        for path in place.iterdir():
            path.unlink()
    return refused


def test_a_strangers_files_are_read_or_refused_by_name(tmp_path):
    assert walk(tmp_path, 0, 300) > 300


@pytest.mark.walk
def test_a_long_walk_through_strangers_files(tmp_path):
    assert walk(tmp_path, 1000, 20_000) > 20_000


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_of_a_table_is_not_believed(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(KitError, match=r"model\.safetensors"):
        read_headers(tmp_path)


def test_a_table_longer_than_any_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", LONGEST_HEADER + 1))
        stream.truncate(2 * LONGEST_HEADER)
    assert raw_header(path) is None
    with pytest.raises(KitError, match="do not hold the table"):
        read_headers(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", 5, None])
def test_an_index_names_files_of_its_own_folder(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(KitError, match="no name of a file"):
        read_headers(tmp_path)


@pytest.mark.parametrize("end", [10**12, -1, "2", 2.0, True, [2, "x"], {"a": 1}])
def test_an_end_of_text_is_a_token(tmp_path, end):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(KitError, match="ends an answer"):
        stop_ids(tmp_path, SimpleNamespace(eos_token_id=2))


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"q": 2}}
ADAPTER |= {"init_lora_weights": True, "use_dora": False, "use_rslora": False, "target_parameters": None}


@pytest.mark.parametrize("seed", range(150))
def test_a_strangers_adapter_is_read_or_refused_by_name(tmp_path, seed):
    draw = random.Random(seed)
    config = {**ADAPTER, draw.choice(list(ADAPTER)): draw.choice([*ODD, {"(": 3}, {"q": "x"}, {"q": -1}])}
    (tmp_path / "adapter_config.json").write_text(settings(draw, config))
    shapes = [[4, 8], [8, 4], [2, 2]]
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    table, place = {}, 0
    for name in names[: draw.randrange(4)]:
        shape = draw.choice(shapes)
        size = 4 * shape[0] * shape[1]
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        table[f"base_model.model.layers.0.q_proj.{name}.weight"] = tensor
        place += size
    text = json.dumps(table).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))
    try:
        read_adapter(tmp_path)
    except KitError as error:
        assert str(tmp_path) in str(error)


def test_an_adapter_without_safetensors_is_refused_before_peft_sees_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(KitError, match=r"it has no adapter_model\.safetensors"):
        load_adapter(None, tmp_path)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
MORE = {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": None}
MORE |= {"max_position_embeddings": 64, "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "float32"}
KINDS = ("llama", "qwen3", "gemma3_text", "gpt2", "qwen3_moe", "mamba", "opt", "bert", "strange")


def described(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    config: dict[str, object] = {"model_type": draw.choice(KINDS), **SIZES, **MORE}
    for _ in range(draw.randrange(1, 4)):
        config[draw.choice([*config, "layer_types", "quantization_config", "architectures", "auto_map"])] = draw.choice(
            [*ODD, 2**40, ["full_attention"], {"rope_type": "yarn"}]
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    recipe = TrainRecipe(model=ModelConfig(source=str(folder)))
    for read in (reach_of, lambda recipe, folder: KnownBase.in_folder(folder)):
        try:
            read(recipe, folder)
        except KitError as error:
            assert error.exit_code == EXIT_BAD_RECIPE, (seed, error)


@pytest.mark.slow
def test_a_strangers_config_describes_a_model_or_is_refused(tmp_path):
    for seed in range(40):
        described(tmp_path / str(seed), seed)


@pytest.mark.walk
@pytest.mark.timeout(7200)
def test_a_long_walk_through_strangers_configs(tmp_path):
    for seed in range(1000, 6000):
        described(tmp_path / str(seed), seed)
