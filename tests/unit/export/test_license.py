"""The base's license is read and goes along."""

from pathlib import Path

import pytest

from qlora_kit.export.license import License, copy_license, read_license


def test_the_cards_own_words(base: Path) -> None:
    assert read_license(base) == License("other", "tiny-license", "LICENSE")
    assert read_license(base).shown == "tiny-license"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004\n", License("apache-2.0")),
        ("MIT License\n\nPermission is hereby granted, free of charge", License("mit")),
        ("Some terms", License()),
    ],
)
@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\nlicense: [1]\n---\n"])
def test_without_a_card_the_license_file_tells(base: Path, text: str, expected: License, card: str | None) -> None:
    (base / "README.md").unlink()
    if card is not None:
        (base / "README.md").write_text(card)
    (base / "LICENSE").write_text(text)
    assert read_license(base) == expected


@pytest.mark.parametrize("head", ["license: mit\ntags: [a", "license: !x mit", "- " * 3000 + "license"])
def test_a_damaged_card_states_nothing_and_stops_nothing(base: Path, head: str) -> None:
    for path in base.glob("LICENSE*"):
        path.unlink()
    (base / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")
    assert read_license(base) == License()


def test_every_license_file_is_copied_and_nothing_else(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert copy_license(base, out) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    assert (out / "LICENSE").read_text() == "all of it"


def test_a_base_that_states_nothing() -> None:
    assert License().shown == "not stated by the base"
