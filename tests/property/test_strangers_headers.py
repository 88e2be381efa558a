"""A stranger's checkpoint: whatever its headers and settings hold, it is read or refused by name, in little memory."""

import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.core.errors import EXIT_BAD_RECIPE, KitError
from qlora_kit.model.source import check_folder
from qlora_kit.model.stored_tensors import LONGEST_HEADER, raw_header, read_headers
from qlora_kit.model.tokenizer import stop_ids
from qlora_kit.model.weight_names import linear_module_names

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
    fields = {"dtype": draw.choice(DTYPES), "shape": [2, 2], "data_offsets": [0, 16]}
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


def settings(draw: random.Random, good: dict[str, object]) -> str:
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
