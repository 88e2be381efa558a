"""The base's licence is read and goes along."""

from pathlib import Path

import pytest

from qlora_kit.export.licence import Licence, copy_licence, read_licence


def test_the_cards_own_words(base: Path) -> None:
    assert read_licence(base) == Licence("other", "tiny-licence", "LICENSE")
    assert read_licence(base).shown == "tiny-licence"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004\n", Licence("apache-2.0")),
        ("MIT License\n\nPermission is hereby granted, free of charge", Licence("mit")),
        ("Some terms", Licence()),
    ],
)
@pytest.mark.parametrize("card", [None, "# no front matter\n", "---\nlicense: [1]\n---\n"])
def test_without_a_card_the_licence_file_tells(base: Path, text: str, expected: Licence, card: str | None) -> None:
    (base / "README.md").unlink()
    if card is not None:
        (base / "README.md").write_text(card)
    (base / "LICENSE").write_text(text)
    assert read_licence(base) == expected


def test_every_licence_file_is_copied_and_nothing_else(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert copy_licence(base, out) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    assert (out / "LICENSE").read_text() == "all of it"


def test_a_base_that_states_nothing() -> None:
    assert Licence().shown == "not stated by the base"
