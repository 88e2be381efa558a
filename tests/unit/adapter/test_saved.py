"""A saved adapter names its base as users know it."""

import json

from qlora_kit.adapter.saved import BaseName, name_base


def test_the_base_is_named_and_the_card_of_blanks_is_gone(tmp_path):
    (tmp_path / "README.md").write_text("More Information Needed")
    settings = {"r": 4, "base_model_name_or_path": "/home/me/.cache/x", "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    name_base(tmp_path, BaseName("owner/model", "0a1b"))
    assert not (tmp_path / "README.md").exists()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written == {"r": 4, "base_model_name_or_path": "owner/model", "revision": "0a1b"}
