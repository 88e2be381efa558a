"""A base with a licence."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

README = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\nlanguage: [en]\n---\n# Tiny\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    import numpy as np

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
