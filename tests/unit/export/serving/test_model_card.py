"""README.md of an artifact: front matter that the hub reads, measured values, counts, commands."""

import json
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from qlora_kit.core.verdict import Verdict
from qlora_kit.export.checks.fault import Unquantized
from qlora_kit.export.serving.model_card import front_matter, model_card, served_of, write_model_card
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from tests.served_artifact import SECRET, Made


def test_the_front_matter_is_read_by_the_hubs_own_reader(facts: Made, tmp_path: Path, base: Path) -> None:
    made = facts(base=Base("owner/Tiny-1B", base, "abc123"))
    assert write_model_card(tmp_path, made) == "README.md"
    assert metadata_load(tmp_path / "README.md") == {
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "LICENSE",
        "base_model": "owner/Tiny-1B",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["qlora", "gguf", "llama.cpp", "conversational", "qlora-kit"],
    }
    assert "owner/Tiny-1B at revision `abc123`, fine-tuned with QLoRA, as `gguf` (mix Q4_K_M)." in model_card(made)


def test_a_fact_that_is_empty_is_left_out_and_the_rest_keep_their_order() -> None:
    assert front_matter({"license": "", "tags": ["b", "a"], "base_model": None, "library_name": "yes"}) == [
        *("---", "tags:", "- b", "- a", "library_name: 'yes'", "---")
    ]


@pytest.mark.parametrize(
    ("format_name", "library", "relation"),
    [("merged", "transformers", "finetune"), ("awq", "transformers", "quantized"), ("adapter", "peft", "adapter")],
)
def test_library_and_relation_by_format(facts: Made, base: Path, format_name: str, library: str, relation: str) -> None:
    card = model_card(facts(format=format_name, file=".", base=Base("owner/Tiny-1B", base)))
    assert f"library_name: {library}\n" in card
    assert f"base_model_relation: {relation}\n" in card


def test_a_local_base_is_named_without_its_path(facts: Made, tmp_path: Path) -> None:
    card = model_card(facts())
    assert "base_model" not in card
    assert "Tiny-1B, fine-tuned with QLoRA" in card
    assert str(tmp_path) not in card and SECRET not in card


def test_measured_values_are_in_a_table(facts: Made) -> None:
    lines = model_card(facts()).splitlines()
    assert "| loss on held-out answers (nats a token) | 0.5123 |" in lines
    assert "| mean KL to the trained model (nats) | 0.00432 |" in lines
    assert "| top-1 agreement | 98.76% |" in lines
    assert "| positions compared | 390 |" in lines
    assert not any("interval" in line for line in lines)  # no single number
    assert "Rejected" not in "".join(lines)


def test_a_rejected_file_says_so_and_an_unmeasured_one_claims_nothing(facts: Made) -> None:
    card = model_card(facts(faults=("mean KL 0.0043 is above export.max_mean_kl=0.001", "vLLM: no config.json")))
    assert "**Rejected**, do not serve this file:\n\n- mean KL 0.0043 is above export.max_mean_kl=0.001\n- vLLM" in card
    unmeasured = model_card(facts(fidelity={}))
    assert (
        "**Not measured**: without held-out rows nothing tells how close it is to the model that was trained."
        in unmeasured
    )
    assert "Measured" not in unmeasured
    assert "**Measured**, without a bound" in model_card(facts(verdict=Verdict.measured))
    assert "**Accepted**: measured, and within its bound." in model_card(facts(verdict=Verdict.accepted))


def test_what_it_was_trained_on_in_counts_and_hashes(facts: Made) -> None:
    card = model_card(facts())
    assert "| training | 1,200 | 70,584 | 19,820 |" in card
    assert "- `rows.jsonl` sha256 `ab12`" in card and "- `rows.jsonl` sha256 `cd34`" in card
    assert "64 steps, training loss 0.0342 at the end." in card


def test_a_file_that_both_splits_are_of_is_listed_once(facts: Made, run: RunDirectory) -> None:
    run.data.write_text(run.data.read_text().replace("cd34", "ab12"))
    assert model_card(facts()).count("sha256 `ab12`") == 1


def test_a_base_that_was_never_trained(facts: Made, base: Path) -> None:
    card = model_card(facts(run=None, format="merged", file=".", base=Base("owner/Tiny-1B", base)))
    assert "Trained on" not in card and "- qlora\n" not in card
    assert "quantized, not fine-tuned" in card
    assert "against the base." in card


def test_layers_in_16_bit_are_counted(facts: Made) -> None:
    left = Unquantized(("a.k_proj", "a.v_proj"), 7, "the kernels take 8 outputs at once").record()
    card = model_card(facts(unquantized=left))
    assert "\n2 of 7 linear layers stay in 16 bit: the kernels take 8 outputs at once.\n" in card
    assert "stay in 16 bit" not in model_card(facts())


def test_what_calibration_rows_told_nothing_of_is_counted(facts: Made) -> None:
    card = model_card(facts(uncalibrated=Uncalibrated(3, 24, ("blk.0.attn_q.weight",)).record()))
    assert (
        "\nNo calibration row reached 3 of 24 matrices of experts and the importance matrix holds nothing for 1 tensor "
        "of the layers, which are rounded without.\n"
    ) in card
    assert Uncalibrated(0, 24).record() == {}
    assert "calibration row" not in model_card(facts())


def test_commands_and_license(facts: Made) -> None:
    card = model_card(facts())
    assert "```bash\nllama-server -m ./tiny.Q4_K_M.gguf --alias tiny_q4 --jinja --port 8080\n```" in card
    assert "That of the base: tiny-license. See `LICENSE`, `NOTICE.txt`, `USE_POLICY.md`." in card


def test_an_adapter_that_peft_alone_takes_for_another_says_so(facts: Made, base: Path, run: RunDirectory) -> None:
    (base / "config.json").write_text('{"model_type": "glm4_moe"}')
    settings = {"r": 16, "target_modules": ["q_proj", "gate_proj"]}
    (run.adapter / "adapter_config.json").write_text(json.dumps(settings))
    told = "Peft alone takes gate_proj of this base for its experts and would leave out what was trained"
    made = {"format": "adapter", "file": ".", "base": Base("owner/Tiny-1B", base)}
    assert told in model_card(facts(**made))
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert told not in model_card(facts(**made))


def test_an_adapter_is_served_with_its_largest_rank(facts: Made, base: Path) -> None:
    card = model_card(facts(format="adapter", file=".", base=Base("owner/Tiny-1B", base)))
    assert "vllm serve owner/Tiny-1B --enable-lora --lora-modules tiny_q4=. --max-lora-rank 64" in card


def test_what_the_commands_look_for_beside_an_adapter_is_told(facts: Made, base: Path) -> None:
    card = model_card(facts(format="adapter", file="."))
    assert "vllm serve ./Tiny-1B --enable-lora" in card
    assert "look for the base's folder, `Tiny-1B`, here too" in card
    assert "The base as a GGUF file, `base.gguf`" in model_card(facts(format="adapter_gguf", file="a.gguf"))
    of_hub = model_card(facts(format="adapter", file=".", base=Base("owner/Tiny-1B", base)))
    assert "Run these in this folder.\n" in of_hub


def test_the_commands_hold_the_adapters_largest_rank_and_where_it_lies(facts: Made) -> None:
    served = served_of(facts(format="adapter", file="."), "/runs/tiny")
    assert (served.rank, served.folder, served.name) == (48, "/runs/tiny", "tiny_q4")


def test_settings_that_were_left_open_are_not_listed(facts):
    card = model_card(facts(settings={"mix": "Q4_K_M", "imatrix": False, "overrides": {}, "bits_budget": None}))
    assert "as `gguf` (mix Q4_K_M, imatrix False)." in card


def test_a_card_says_who_does_not_read_the_files(facts: Made) -> None:
    card = model_card(facts(format="awq", file=".", is_unpacked=True))
    assert "from transformers import" not in card and "vllm serve" in card
    assert "transformers by itself does not find all weights of these files" in card
    assert "`qlora-kit chat` and `qlora-kit eval` read them." in card
    alone = model_card(facts(format="awq_gemv", file=".", is_unpacked=True))
    assert "## Serve" in alone and "Run these" not in alone and "does not find all weights" in alone
    assert "does not find all weights" not in model_card(facts(format="awq", file="."))
