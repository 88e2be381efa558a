"""An export that is killed leaves nothing that looks finished, and the next call finishes."""

import fcntl
from dataclasses import dataclass

import pytest

from qlora_kit.core.files import read_json
from tests.e2e.conftest import kit, only_run, train_line
from tests.e2e.killing import kill_when

pytestmark = pytest.mark.slow

BEST = "export.merge_base=best"
SHARDS = "export.gguf.gguf_q8_0.shard_gb=0.0001"


@dataclass(frozen=True)
class Kill:
    """A call to kill: the target, the pattern below exports/ and how often it is to match before, and more words."""

    target: str
    moment: str
    count: int = 1
    words: tuple[str, ...] = ()


KILLS = {
    "gguf": Kill("gguf_q4_k_m", ".gguf_q4_k_m.*.partial"),
    "gguf_shards": Kill("gguf_q8_0", ".gguf_q8_0.*.partial/**/*-00002-of-*.gguf", words=(SHARDS,)),
    "gptq": Kill("gptq_4bit_g64", ".gptq_4bit_g64.*.partial"),
    "awq": Kill("awq_4bit_g64", ".awq_4bit_g64.*.partial"),
    # Without a GPU it is scored from a twin in the other layout.
    "awq_gemv": Kill("awq_4bit_gemv", ".twin.*.partial/*", words=("export.awq.awq_4bit_gemv.group_size=64",)),
    "compressed": Kill("w4a16_g64", ".w4a16_g64.*.partial"),
    "fp8_by_row": Kill("fp8_dynamic", ".fp8_dynamic.*.partial"),
    "bnb": Kill("bnb_nf4", ".bnb_nf4.*.partial/.bnb-*/*"),
    "adapter_peft": Kill("adapter_peft", ".adapter_peft.*.partial/*"),
    # Scored on the base as GGUF, which is written for that.
    "adapter_gguf": Kill("adapter_gguf", ".base.*.partial/*"),
    "merged": Kill("merged_16bit", ".merged_16bit.*.partial"),
    "second_merge_of_best": Kill("merged_16bit", ".merged.*/*.safetensors", 2, (BEST,)),
    "second_file_of_best": Kill("merged_16bit", ".merged_16bit.*.partial/made/config.json", 2, (BEST,)),
}


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = kit(folder, *train_line(workshop, "trainer.max_steps=2"))
    assert done.returncode == 0, done.stderr
    return folder


def export_line(target, *more):
    return ["export", "run=latest", f"export={target}", "export.score_rows=2", "export.calibration_rows=4", *more]


def count_of(folder, pattern):
    try:
        return len(list(folder.glob(pattern)))
    except FileNotFoundError:  # a folder went while it was looked through
        return 0


def kill_at(folder, kill):
    """Start an export, and kill it when what it is waited for lies there."""
    exports = only_run(folder) / "exports"
    words = export_line(kill.target, *kill.words)
    kill_when(lambda: count_of(exports, kill.moment) >= kill.count, words, folder)


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_kill_9_during_a_target(trained, kill):
    exports = only_run(trained) / "exports"
    before = sorted(path.name for path in exports.glob("*")) if exports.exists() else []
    kill_at(trained, kill)
    assert [*exports.glob(".*.partial"), *exports.glob(".merged.*")]
    assert sorted(path.name for path in exports.iterdir() if path.name[0] != ".") == before

    done = kit(trained, *export_line(kill.target, *kill.words), timeout=580)
    assert done.returncode == 0, done.stderr
    assert not list(exports.glob(".*"))
    place = exports / kill.target
    assert not list(place.glob(".*"))
    manifest = read_json(place / "manifest.json")
    assert (place / manifest["file"]).exists()
    assert set(manifest.get("merge_bases", {})) == ({"dequantized", "original"} if BEST in kill.words else set())


def test_two_exports_of_one_run_do_not_meet(trained):
    with (only_run(trained) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = kit(trained, *export_line("merged_16bit"))
    assert done.returncode == 2
    assert "it is in use; wait until it ends, or stop it" in done.stderr
