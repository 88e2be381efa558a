"""Fixtures: a base with a license, a finished run of it, and facts about an artifact made from both."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.formats.registry import find_format
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from tests.tiny_tokenizers import qwen_tokenizer

README = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE\nlanguage: [en]\n---\n# Tiny\n"
SECRET = "/home/somebody/private"

Made = Callable[..., ServingFacts]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "bases" / "Tiny-1B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(README)
    (folder / "LICENSE").write_text("all of it")
    (folder / "NOTICE.txt").write_text("noted")
    (folder / "USE_POLICY.md").write_text("policy")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [600]})
    )
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.adapter.mkdir(parents=True)
    run.recipe.write_text("name: tiny\n")
    sources = [{"sha256": {f"{SECRET}/rows.jsonl": "ab12"}}]
    split = {"rows": 1200, "tokens": 70584, "trained_tokens": 19820, "sources": sources}
    other = {"rows": 10, "tokens": 70, "trained_tokens": 20, "sources": [{"sha256": {"out/rows.jsonl": "cd34"}}]}
    run.data.write_text(json.dumps({"train": split, "held_out": other}))
    run.result.write_text(json.dumps({"steps": 64.0, "final_loss": 0.03421}))
    run.environment.write_text(json.dumps({"packages": {"torch": "9.9"}}))
    (run.adapter / "adapter_config.json").write_text(json.dumps({"r": 16, "rank_pattern": {"q_proj": 48}}))
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return run


@pytest.fixture
def facts(base: Path, run: RunDirectory) -> Made:
    made = ServingFacts(
        name="tiny_q4",
        format=find_format("gguf"),
        file="tiny.Q4_K_M.gguf",
        base=Base(str(base), base),
        tokenizer=qwen_tokenizer(),
        settings={"mix": "Q4_K_M"},
        run=run,
        seed=3,
        fidelity={"loss": 0.51234, "mean_kl": 0.004321, "same_top": 0.9876, "positions": 390, "interval": [0.1, 0.2]},
    )

    def changed(**changes: Any) -> ServingFacts:
        """The facts with others; a format may be given by its name."""
        if "format" in changes:
            changes["format"] = find_format(changes["format"])
        return replace(made, **changes)

    return changed
