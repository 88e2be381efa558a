"""A merge that was killed goes on behind its last complete file; that of anything else begins anew."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from qlora_kit.export import merge as merge_module
from qlora_kit.export.merge import MergeReport, merge
from qlora_kit.export.merging import plan, write_shards
from qlora_kit.export.merging.resume import JOURNAL
from qlora_kit.schema.export import MergeBase
from tests.unit.export.merging.trained import NOT_ROUNDED, WEIGHTS, Pair, Words, edit_json, rewrite, shard

FILES = ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def sharded(pair: Pair) -> Pair:
    """The base in three files."""
    tensors = load_file(shard(pair.base))
    shard(pair.base).unlink()
    names = sorted(tensors)
    held = dict(zip(FILES, (names[:7], names[7:14], names[14:]), strict=True))
    for file, here in held.items():
        save_file({name: tensors[name] for name in here}, pair.base / file)
    where = {name: file for file, here in held.items() for name in here}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return pair


def run(pair: Pair, out: Path) -> MergeReport:
    out.mkdir(exist_ok=True)
    return merge(pair.base, pair.adapter, NOT_ROUNDED, MergeBase.original, Words(), out)


def killed_in(pair: Pair, out: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that ends while it writes this file, of which a part is there."""
    write = write_shards._write_file

    def until(path: Path, *rest: object) -> list[write_shards.Written]:
        if path.name == file:
            path.write_bytes(b"half")
            raise Killed
        return write(path, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(write_shards, "_write_file", until)
        run(pair, out)


def written_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the files that are written from here on."""
    seen: list[str] = []
    write = write_shards._write_file

    def note(path: Path, *rest: object) -> list[write_shards.Written]:
        seen.append(path.name)
        return write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(write_shards, "_write_file", note)
    return seen


def assert_same_folder(left: Path, right: Path) -> None:
    assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
    for path in left.iterdir():
        assert path.read_bytes() == (right / path.name).read_bytes(), path.name


def test_killed_merge_goes_on_behind_its_last_file(
    sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run(sharded, tmp_path / "at_once")
    killed_in(sharded, tmp_path / "out", FILES[2], monkeypatch)
    assert (tmp_path / "out" / JOURNAL).is_file()
    seen = written_by(monkeypatch)
    report = run(sharded, tmp_path / "out")
    assert seen == [FILES[2]]
    assert_same_folder(tmp_path / "out", tmp_path / "at_once")
    assert report.resumed == sum(
        tensor.numel() * 2 for file in FILES[:2] for tensor in load_file(tmp_path / "out" / file).values()
    )
    assert (at_once.resumed, report.changed, report.merged) == (0, at_once.changed, at_once.merged)
    assert report.changed_sha256 == at_once.changed_sha256


def _new_adapter(pair: Pair) -> None:
    rewrite(pair.adapter / WEIGHTS, lambda found: {name: tensor * 2 for name, tensor in found.items()})


def _new_scale(pair: Pair) -> None:
    edit_json(pair.adapter / "adapter_config.json", lora_alpha=5)


def _newer_base(pair: Pair) -> None:
    os.utime(pair.base / FILES[1], (1, 1))


@pytest.mark.parametrize("change", [_new_adapter, _new_scale, _newer_base])
def test_other_inputs_begin_anew(
    change: Callable[[Pair], None], sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(sharded, tmp_path / "out", FILES[2], monkeypatch)
    change(sharded)
    (tmp_path / "out" / "model-9.safetensors").write_bytes(b"of another plan")
    seen = written_by(monkeypatch)
    assert run(sharded, tmp_path / "out").resumed == 0
    assert seen == FILES
    monkeypatch.undo()
    run(sharded, tmp_path / "at_once")
    assert_same_folder(tmp_path / "out", tmp_path / "at_once")


@pytest.mark.parametrize("where", [-1, 8 + 1, 60_001])
def test_file_that_was_damaged_since_is_written_again(
    where: int, sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(sharded, tmp_path / "out", FILES[2], monkeypatch)
    file = tmp_path / "out" / FILES[1]
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    seen = written_by(monkeypatch)
    run(sharded, tmp_path / "out")
    assert seen == FILES[1:]


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": 3}', '{"files": {"a": 1}}'])
def test_journal_that_cannot_be_read_begins_anew(
    text: str, sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in(sharded, tmp_path / "out", FILES[2], monkeypatch)
    (tmp_path / "out" / JOURNAL).write_text(text)
    seen = written_by(monkeypatch)
    run(sharded, tmp_path / "out")
    assert seen == FILES


def test_room_is_asked_for_what_is_left(sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(merge_module, "refuse_full_disk", lambda size, out: asked.append(size))
    killed_in(sharded, tmp_path / "out", FILES[1], monkeypatch)
    report = run(sharded, tmp_path / "out")
    assert asked == [report.size, report.size - report.resumed]
    assert 0 < report.resumed < report.size


def test_checksum_is_over_the_bytes(sharded: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK", 5000)  # 19 rows of 256 values
    killed_in(sharded, tmp_path / "out", FILES[2], monkeypatch)
    noted = json.loads((tmp_path / "out" / JOURNAL).read_text())["files"]
    for file in FILES[:2]:
        tensors = load_file(tmp_path / "out" / file)
        checksums = {name: checksum for name, _, checksum in noted[file]}
        assert checksums.keys() == tensors.keys()
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and tensor.shape[1] == 256:
                parts = [part.view(torch.uint8).numpy().tobytes() for part in tensor.split(19)]
                assert checksums[name] == xxh3_64_intdigest(b"".join(map(xxh3_64_digest, parts)))


KILLER = """
import os, signal, sys
from pathlib import Path
from qlora_kit.export.merging import resume
from tests.unit.export.merging.test_resume import run
from tests.unit.export.merging.trained import Pair
record = resume.Journal.record
def once(self, name, tensors):
    record(self, name, tensors)
    os.kill(os.getpid(), signal.SIGKILL)
resume.Journal.record = once
run(Pair(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_kill_9(sharded: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    root = Path(__file__).parents[4]
    line = [sys.executable, "-c", KILLER, str(sharded.base), str(sharded.adapter), str(out)]
    done = subprocess.run(line, cwd=root, check=False, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    report = run(sharded, out)
    assert report.resumed == sum(tensor.numel() * 2 for tensor in load_file(out / FILES[0]).values())
    run(sharded, tmp_path / "at_once")
    assert_same_folder(out, tmp_path / "at_once")
