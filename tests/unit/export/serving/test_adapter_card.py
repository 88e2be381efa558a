"""README.md of a run's own adapter."""

from pathlib import Path

from huggingface_hub import metadata_load

from qlora_kit.export.serving.adapter_card import write_adapter_card
from qlora_kit.runs.base import Base


def test_a_base_of_the_hub_is_named_with_its_revision(base: Path, tmp_path: Path) -> None:
    write_adapter_card(tmp_path, "my_run", Base("owner/Tiny-1B", base, "abc123"))
    assert metadata_load(tmp_path / "README.md") == {
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "LICENSE",
        "base_model": "owner/Tiny-1B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora-kit"],
    }
    card = (tmp_path / "README.md").read_text()
    assert "# my_run\n\nA LoRA adapter for owner/Tiny-1B at revision `abc123`, trained with qlora-kit" in card
    assert "More Information Needed" not in card


def test_a_base_in_the_hubs_cache_is_named_by_its_repository(base: Path, tmp_path: Path) -> None:
    source = "/home/me/.cache/huggingface/hub/models--owner--Tiny-1B/snapshots/abc123"
    write_adapter_card(tmp_path, "my_run", Base(source, base))
    assert "owner/Tiny-1B at revision `abc123`" in (tmp_path / "README.md").read_text()
    assert "/home" not in (tmp_path / "README.md").read_text()


def test_a_local_base_is_named_without_its_path(base: Path, tmp_path: Path) -> None:
    write_adapter_card(tmp_path, "<b>", Base(str(base), base))
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card and str(base.parent) not in card
    assert "# &lt;b&gt;" in card


def test_what_peft_alone_makes_of_it_is_told(base: Path, tmp_path: Path) -> None:
    write_adapter_card(tmp_path, "my_run", Base("owner/Tiny-1B", base), "peft alone takes gate_proj for experts")
    assert "\nPeft alone takes gate_proj for experts.\n" in (tmp_path / "README.md").read_text()
