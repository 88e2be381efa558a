"""Secrets of the surroundings are masked; what only looks alike stays."""

import pytest

from qlora_kit.core.secrets import masked

NAMES = ["HF_TOKEN", "wandb_api_key", "MY_SECRET_2", "DB_PASSWORD", "X_PASSWD", "AWS_CREDENTIALS"]


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_a_variable_with_such_a_name_is_masked_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, "hunter2222")
    assert masked("a=hunter2222, [hunter2222]") == "a=***, [***]"


def test_values_of_other_variables_and_short_ones_stay(monkeypatch):
    monkeypatch.setenv("PLACE", "hunter2222")
    monkeypatch.setenv("USE_TOKEN", "seven77")
    monkeypatch.setenv("NO_KEY", "")
    assert masked("hunter2222 seven77") == "hunter2222 seven77"


def test_a_secret_that_holds_another_leaves_nothing_of_itself(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert masked("abcdefgh-and-more abcdefgh") == "*** ***"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("HF_TOKEN=hf_x qlora-kit train", "HF_TOKEN=*** qlora-kit train"),
        ("env API_KEY='two words' run", "env API_KEY=*** run"),
        ('env API_KEY="two words" run', "env API_KEY=*** run"),
        ("max_tokens=64 key=a", "max_tokens=64 key=a"),
        ("tracker.url=https://me:pass@host.example/a@b", "tracker.url=https://***@host.example/a@b"),
        ("https://host.example/@me", "https://host.example/@me"),
        ("me@host.example", "me@host.example"),
    ],
)
def test_assignments_and_users_of_addresses(line, shown):
    assert masked(line) == shown
