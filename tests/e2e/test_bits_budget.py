"""A budget of bits on the command line: in the file, and in its record."""

import pytest

from qlora_kit.core.files import read_json
from tests.e2e.conftest import kit

pytestmark = pytest.mark.slow


def test_the_record_says_what_the_bits_were_spent_on(workshop, tmp_path):
    few = ("export.score_rows=4", "export.calibration_rows=6")
    done = kit(
        tmp_path, "export", f"base={workshop / 'base'}", "export=[gguf_4_5bits,gguf_q4_k_m]",
        "export.bits_budget=6", *few, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for name, budget in (("gguf_4_5bits", 4.5), ("gguf_q4_k_m", 6)):
        (place,) = tmp_path.glob(f"outputs/base/*/exports/{name}")
        manifest = read_json(place / "manifest.json")
        assert manifest["settings"]["bits_budget"] == manifest["bits"]["budget"] == budget
        assert manifest["bits"]["bits"] <= budget
        assert f"{manifest['bits']['bits']:.2f} of {budget:g} bits a weight" in done.stderr
        assert (place / manifest["file"]).is_file() and f"-{budget:g}bits.gguf" in manifest["file"]
        assert manifest["rejected"] is False
        found[name] = manifest
    assert found["gguf_4_5bits"]["fidelity"]["mean_kl"] > found["gguf_q4_k_m"]["fidelity"]["mean_kl"]
    assert found["gguf_4_5bits"]["bits"]["predicted_rise"] > found["gguf_q4_k_m"]["bits"]["predicted_rise"]
