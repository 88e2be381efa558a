"""The table of exports, and the error that they end with."""

import pytest

from qlora_kit.core.errors import FidelityError, RunError
from qlora_kit.core.files import write_json
from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.exported import Exported
from qlora_kit.evaluation.scores import Fidelity
from qlora_kit.formats.exported import raise_what_went_wrong
from qlora_kit.report.exports import print_exported

FIT = Fidelity(1.25, 3.49, 0.0125, 0.5, 0.975, 40, loss_change=0.02)


def test_a_line_for_each_file(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"x" * 2000)
    good = Exported("good", tmp_path, 3.0, FIT, Verdict.accepted)
    far = Exported("far", tmp_path, 3.0, FIT, Verdict.rejected, ("mean KL 0.0125 is above",))
    print_exported("the title", [good, far, Exported("lost", tmp_path / "lost", 1.0, error="no room")])
    title, columns, *lines = capsys.readouterr().out.splitlines()
    assert title == "the title"
    assert columns.split("  ")[0] == "artifact"
    assert lines[0].split() == [
        "good",
        "2.0",
        "kB",
        "1.2500",
        "+0.0200",
        "3.490",
        "0.01250",
        "0.5000",
        "97.5%",
        "3.0",
        "s",
        "accepted",
    ]
    assert lines[1].split()[-1] == "REJECTED"
    assert lines[2].split() == ["lost", *["-"] * 7, "1.0", "s", "FAILED"]


def test_a_file_that_was_not_measured_is_listed_as_such(tmp_path, capsys):
    print_exported("the title", [Exported("good", tmp_path, 3.0, verdict=Verdict.not_measured)])
    assert capsys.readouterr().out.splitlines()[2].endswith("NOT MEASURED")


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict.measured, "measured: scored, and held against no bound; export.max_mean_kl sets one\n"),
        (Verdict.accepted, ""),
    ],
)
def test_what_measured_means_is_said_where_it_stands(tmp_path, capsys, verdict, said):
    print_exported("the title", [Exported("good", tmp_path, 3.0, FIT, verdict)])
    assert capsys.readouterr().err == said


def test_a_failure_comes_before_a_rejection(tmp_path):
    good = Exported("good", tmp_path, 3.0, verdict=Verdict.measured)
    failed, rejected = (
        Exported("lost", tmp_path, 1.0, error="no room"),
        Exported("far", tmp_path, 1.0, verdict=Verdict.rejected, faults=("too far",)),
    )
    raise_what_went_wrong([good])
    with pytest.raises(RunError, match="lost was not written: no room"):
        raise_what_went_wrong([rejected, failed])
    with pytest.raises(FidelityError, match=f"{tmp_path.name} is rejected: too far"):
        raise_what_went_wrong([good, rejected])


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"format": "gguf", "settings": {"imatrix": True}}, "more bits (gguf_q6_k, gguf_q8_0)"),
        (
            {"format": "gptq", "settings": {"group_size": 128, "bits": 4}},
            "smaller groups (group_size: 32); or 8 bits (gptq_8bit); or more rows to calibrate on "
            "(export.calibration_rows)",
        ),
        ({"format": "bnb", "settings": {"kind": "nf4"}}, "int8 (bnb_int8)"),
        (
            {"format": "adapter_gguf", "settings": {}},
            "a merged file, which stands beside no other base (export=merged_16bit)",
        ),
    ],
)
def test_what_comes_closer_is_told_by_format(manifest, told, tmp_path):
    write_json(tmp_path / "far" / "manifest.json", {**manifest, "file": "x"})
    far = Exported("far", tmp_path / "far", 1.0, verdict=Verdict.rejected, faults=("mean KL 0.5 is above 0.1",))
    with pytest.raises(FidelityError) as caught:
        raise_what_went_wrong([far])
    assert str(caught.value) == f"far is rejected: mean KL 0.5 is above 0.1\n  closer is {told}"
