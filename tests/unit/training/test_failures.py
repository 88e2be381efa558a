"""Lines that are proposed for a run that failed."""

from qlora_kit.core.overrides import write_overrides
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.training.failures import again_with


def test_a_line_of_an_earlier_release_is_proposed_under_todays_names(tmp_path):
    run = RunDirectory(tmp_path)
    write_overrides(run.overrides, ["model=demo", "+engine.weight_copies=all", "optim.strict=true"])
    line = again_with(run, {"engine.cached_weights": "none"})
    assert line == "qlora-kit train model=demo optim.fallback=false engine.cached_weights=none"
