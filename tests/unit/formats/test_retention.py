"""What a manifest says of an update's survival."""

import pytest

from qlora_kit.core.units import kept_share
from qlora_kit.export.delta_retention import DeltaRetention, LayerRetention
from qlora_kit.formats.job import settings_of
from qlora_kit.formats.registry import find_format
from qlora_kit.formats.retention import record
from qlora_kit.schema.export import (
    AwqLayout,
    AwqTarget,
    BnbKind,
    BnbTarget,
    GgufMix,
    GgufTarget,
    GptqMethod,
    GptqTarget,
)

KEPT = LayerRetention("layers.0.q_proj.weight", 0.9, 0.1, 0.01, 1.0)
LOST = LayerRetention("layers.0.up_proj.weight", 0.2, 2.0, 0.01, 1.0)


def test_a_file_that_was_not_measured_has_no_entry() -> None:
    assert record(None) == {}


def test_the_entry_has_every_kind_and_what_the_user_was_told() -> None:
    entry = record(DeltaRetention((KEPT, LOST)))
    assert entry["worst"] == LOST.name and entry["worst_kept"] == LOST.kept
    assert entry["kinds"] == {
        "q_proj": {"kept": pytest.approx(0.9), "worst_kept": 0.9},
        "up_proj": {"kept": pytest.approx(0.2), "worst_kept": 0.2},
    }
    assert str(entry["warning"]).startswith("the file keeps")


def test_there_is_no_warning_where_all_is_well() -> None:
    assert record(DeltaRetention((KEPT,)))["warning"] == ""


@pytest.mark.parametrize(
    ("format_name", "target", "wanted", "never"),
    [
        ("gguf", GgufTarget(), "gguf_q8_0", "importance"),
        ("gguf", GgufTarget(imatrix=False), "imatrix: true", "GPTQ"),
        ("gptq", GptqTarget(), "group_size: 32", "method: gptq"),
        ("gptq", GptqTarget(group_size=32), "gptq_8bit", "group_size"),
        ("gptq", GptqTarget(method=GptqMethod.rounding), "method: gptq", "importance"),
        ("awq", AwqTarget(), "group_size: 32", "AWQ"),
        ("awq_gemv", AwqTarget(layout=AwqLayout.gemv), "gptq_8bit", "group_size"),
        ("bnb", BnbTarget(), "bnb_int8", "group_size"),
        ("bnb", BnbTarget(kind=BnbKind.int8), "merged_16bit", "bnb_int8"),
    ],
)
def test_the_advice_is_never_what_the_file_has_already(format_name, target, wanted, never) -> None:
    advice = find_format(format_name).remedies(settings_of(target))
    said = DeltaRetention((KEPT, LOST), remedies=advice).warning("it") or ""
    assert wanted in said and never not in said


def test_shares_past_their_ends_are_words() -> None:
    beyond = LayerRetention("layers.0.k_proj.weight", -1.44, 9.0, 0.01, 1.0)
    warning = DeltaRetention((beyond, beyond)).warning("it")
    assert warning is not None and warning.startswith("it keeps less than none of what was learned")
    assert "layers.0.k_proj.weight less than none" in warning and "-144%" not in warning
    assert [kept_share(value) for value in (-0.001, 1.24, 1.0, float("nan"))] == [
        "0%",
        "more than all",
        "100%",
        "not a number",
    ]


@pytest.mark.parametrize(
    ("mix", "told"),
    [
        (GgufMix.Q4_K_M, ("more bits (gguf_q6_k, gguf_q8_0)",)),
        (GgufMix.Q6_K, ("more bits (gguf_q8_0)",)),
        (GgufMix.Q8_0, ("16 bits (gguf_f16)",)),
        (GgufMix.F16, ()),
        (GgufMix.BF16, ()),
    ],
)
def test_a_gguf_file_is_sent_to_more_bits_than_it_has(mix, told):
    assert find_format("gguf").remedies(settings_of(GgufTarget(mix=mix))) == told
