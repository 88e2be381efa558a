"""A base model quantized: every kind of format, with rows and without, killed, and rejected."""

from pathlib import Path

import pytest

from qlora_kit.core.files import read_json
from tests.e2e.conftest import kit
from tests.e2e.killing import kill_when

pytestmark = pytest.mark.slow

TARGETS = ["bnb_nf4", "merged_16bit", "gguf_q4_k_m", "gguf_q8_0", "fp8_dynamic", "w4a16_g64", "gptq_4bit_g64"]
TARGETS.append("awq_4bit_g64")


def line(workshop, targets, *more):
    few = ("export.score_rows=4", "export.calibration_rows=6")
    return ["export", f"base={workshop / 'base'}", f"export=[{','.join(targets)}]", *few, *more]


def rows(workshop):
    return ["data=messages", f"data.train_file={workshop / 'train.jsonl'}", "data.max_tokens=128"]


def only_export(folder) -> Path:
    (noted,) = folder.glob("outputs/base/*/export.yaml")
    return noted.parent


@pytest.fixture(scope="module")
def exported(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export_base")
    held_out = f"data.eval_file={workshop / 'held_out.jsonl'}"
    return folder, kit(folder, *line(workshop, TARGETS, *rows(workshop), held_out), timeout=580)


def test_every_file_is_written_measured_and_said_to_be_of_a_base(exported, workshop):
    folder, done = exported
    assert done.returncode == 0, done.stderr
    made = only_export(folder)
    assert sorted(path.name for path in (made / "exports").iterdir()) == sorted(TARGETS)
    for name in TARGETS:
        artifact = made / "exports" / name
        manifest = read_json(artifact / "manifest.json")
        assert (manifest["merge"]["adapted"], manifest["merge"]["base"]) == (0, "original")
        assert manifest["faults"] == [] and manifest["rejected"] is False
        assert set(manifest["contract"]["compared"].values()) == {20}
        assert manifest["fidelity"]["rows"] == 4
        assert manifest["survival"] == {}
        assert manifest["serve"]
        assert manifest["run"] == str(made.relative_to(folder))
        assert (artifact / manifest["file"]).exists()
        card = (artifact / "README.md").read_text(encoding="utf-8")
        assert "base, quantized, not fine-tuned, as " in card
        assert "Trained on" not in card
        lock = read_json(artifact / "lock.json")
        assert lock["adapter_sha256"] is None
        assert [list(lock["data"][split]) for split in ("train", "held_out")] == [["train.jsonl"], ["held_out.jsonl"]]
        assert "mean KL to the base (nats)" in card and "against the base." in card
    assert (made / "exports" / "gguf_q8_0" / "base.Q8_0.gguf").is_file()


def test_the_rows_are_those_of_the_data(exported, workshop):
    folder, done = exported
    assert "scoring the 16-bit base on 4 held-out rows" in done.stderr
    assert "calibrating on 6 rows of data" in done.stderr
    data = read_json(only_export(folder) / "data.json")
    assert list(data["train"]["sources"][0]["sha256"]) == [str(workshop / "train.jsonl")]
    assert list(data["held_out"]["sources"][0]["sha256"]) == [str(workshop / "held_out.jsonl")]


def test_the_files_are_as_close_as_their_bits_allow(exported):
    folder, _ = exported
    manifests = {name: read_json(only_export(folder) / "exports" / name / "manifest.json") for name in TARGETS}
    kl = {name: manifest["fidelity"]["mean_kl"] for name, manifest in manifests.items()}
    assert kl["merged_16bit"] < 0.002
    assert kl["merged_16bit"] < kl["gguf_q8_0"] < 0.01
    assert kl["gguf_q8_0"] < min(kl["gguf_q4_k_m"], kl["gptq_4bit_g64"], kl["awq_4bit_g64"], kl["bnb_nf4"])
    assert max(kl.values()) < 1


def test_the_table_has_a_line_for_each(exported):
    _, done = exported
    _, _, table = done.stdout.partition("against the 16-bit base, KL in nats\n")
    columns, *lines = table.strip().splitlines()
    assert columns.split()[:2] == ["artifact", "size"]
    assert sorted(line.split()[0] for line in lines) == sorted(TARGETS)


@pytest.mark.parametrize("name", ["gguf_q8_0", "merged_16bit"])
def test_chat_answers(exported, name):
    folder, _ = exported
    place = str(only_export(folder) / "exports" / name)
    done = kit(folder, "chat", place, "--message", "turn on 1: lamp", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_eval_scores_the_files_and_report_shows_them(exported):
    folder, _ = exported
    made = only_export(folder)
    names = "eval.artifacts=[base,gguf_q8_0,gptq_4bit_g64]"
    done = kit(folder, "eval", f"base={made}", names, "eval.kl_rows=4")
    assert done.returncode == 0, done.stderr
    record = read_json(made / "eval.json")
    assert [row["name"] for row in record["rows"]] == ["base", "gguf_q8_0", "gptq_4bit_g64"]
    for row in record["rows"][1:]:
        exported_with = read_json(made / "exports" / row["name"] / "manifest.json")["fidelity"]
        assert row["fidelity"]["mean_kl"] == pytest.approx(exported_with["mean_kl"], rel=1e-3)
    assert kit(folder, "report", "base=latest").returncode == 0
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "Nothing was trained here" in page and all(name in page for name in TARGETS)


def test_a_base_is_no_run(exported):
    folder, _ = exported
    done = kit(folder, "eval", "run=latest")
    assert done.returncode == 2
    assert "there is no finished run below outputs/" in done.stderr
    done = kit(folder, "train", "resume=latest")
    assert done.returncode == 2


def test_without_rows_general_text_serves_and_a_bound_rejects(workshop, tmp_path):
    done = kit(tmp_path, *line(workshop, ["gguf_q2_k"], "export.max_mean_kl=1e-6", "out=mine"))
    assert done.returncode == 3
    assert "no data is given: calibrating on 6 rows of built-in general text" in done.stderr
    assert "scoring on 4 others" in done.stderr
    assert "is above export.max_mean_kl=1e-06" in done.stderr
    assert "REJECTED" in done.stdout
    artifact = tmp_path / "mine" / "exports" / "gguf_q2_k"
    assert read_json(artifact / "manifest.json")["rejected"] is True
    assert "**Rejected**, do not serve this file" in (artifact / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_kill_9_leaves_nothing_that_the_next_export_does_not_clear(workshop, tmp_path):
    words = line(workshop, ["gptq_4bit_g64"], *rows(workshop))
    kill_when(lambda: list(tmp_path.glob("outputs/base/*/exports/.gptq_4bit_g64.*.partial")), words, tmp_path)
    killed = only_export(tmp_path)
    assert list((killed / "exports").glob(".merged.*"))
    assert not (killed / "exports" / "gptq_4bit_g64").exists()

    done = kit(tmp_path, *words, timeout=580)
    assert done.returncode == 0, done.stderr
    assert "data holds no rows out: 20% of them are set aside" in done.stderr
    assert list((killed / "exports").iterdir()) == []
    (manifest,) = tmp_path.glob("outputs/base/*/exports/gptq_4bit_g64/manifest.json")
    assert read_json(manifest)["rejected"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base=missing", "export=gguf_q8_0"], "no such folder: missing"),
        (["base=x", "run=latest", "export=gguf_q8_0"], "run=latest and base=x are both set"),
        (["base=x", "export=adapter_peft"], "a base model has none"),
        (["export=gguf_q8_0"], "there is no finished run below outputs/"),
    ],
)
def test_a_wrong_line_ends_with_2_and_leaves_nothing(tmp_path, words, message):
    done = kit(tmp_path, "export", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
