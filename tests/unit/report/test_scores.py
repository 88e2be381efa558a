"""The table of scores: one line an artifact, intervals where there is room, any version of eval.json."""

import pytest

from qlora_kit.report.scores import print_scores

FIT = {
    "loss": 0.5,
    "perplexity": 1.64872,
    "mean_kl": 0.0125,
    "p99_kl": 0.25,
    "same_top": 0.97,
    "positions": 500,
    "rows": 10,
    "loss_interval": (0.45, 0.55),
    "mean_kl_interval": (0.0, 0.03),
    "same_top_interval": (0.95, 0.98),
    "loss_change": 0.004,
    "loss_change_interval": (0.001, 0.007),
}
ROW = {
    "name": "gguf_q4_k_m",
    "size_bytes": 105_500_000,
    "fidelity": FIT,
    "exact_match": 0.5,
    "answered": 40,
    "tokens_per_second": 44.4,
    "rejected": False,
    "exact_match_interval": (0.352, 0.648),
    "stops": 1.0,
    "stops_interval": (0.912, 1.0),
    "text_perplexity": 17.2,
    "text_perplexity_interval": (16.1, 18.3),
    "lm_eval": {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.02, "acc_norm,none": 0.3}},
}
OLD = {
    "name": "base",
    "size_bytes": 1000,
    "fidelity": {name: FIT[name] for name in ("loss", "perplexity", "mean_kl", "p99_kl", "same_top", "positions")},
    "exact_match": None,
    "answered": 0,
    "tokens_per_second": 0.0,
    "rejected": False,
}


def lines(capsys, rows, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_scores("outputs/x", rows, "adapter", "the trained model (base in 8 bit + adapter)")
    return capsys.readouterr().out.splitlines()


def test_files_of_a_base_are_compared_with_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    change = {"loss_change": 0.0, "loss_change_interval": (0.0, 0.0)}
    print_scores("x", [{**ROW, "name": "base", "fidelity": {**FIT, **change}}, ROW], "base", "the base as it is stored")
    title, head, base, file = capsys.readouterr().out.splitlines()
    assert title == "x: KL in nats against the base as it is stored"
    assert "to base" in head and "to adapter" not in head
    assert "+0.0040" in file and file.rstrip().endswith("worse than the base")
    assert "+0.0000" not in base and "worse" not in base


def test_a_wide_terminal_shows_intervals(capsys, monkeypatch):
    title, head, row = lines(capsys, [ROW], 250, monkeypatch)
    assert title == (
        "outputs/x: KL in nats against the trained model (base in 8 bit + adapter), with 95% intervals by row"
    )
    assert head.split("  ")[0].startswith("artifact")
    for part in (
        "105.5 MB",
        "0.5000 ±0.0500",
        "+0.0040 ±0.0030",
        "1.649",
        "0.01250 0.00000..0.03000",
        "0.2500",
        "97.0% 95.0..98.0",
        "50.0% ±14.8",
        "100.0% 91.2..100.0",
        "17.200 ±1.100",
        "0.2500",
        " 44 ",
        "worse than the adapter",
    ):
        assert part in row
    names = ("size", "loss", "to adapter", "perplexity", "mean KL", "p99 KL", "same top", "exact match", "stops")
    places = [head.index(name) for name in (*names, "text perplexity", "tokens/s", "arc acc")]
    assert places == sorted(places)


def test_a_narrow_terminal_shows_the_numbers_alone_on_one_line_each(capsys, monkeypatch):
    title, _, row = lines(capsys, [ROW], 80, monkeypatch)
    assert "±" not in row and ".." not in row and "interval" not in title
    assert row.split()[:6] == ["gguf_q4_k_m", "105.5", "MB", "0.5000", "+0.0040", "1.649"]


def test_what_nobody_asked_for_takes_no_column(capsys, monkeypatch):
    _, head, row = lines(capsys, [OLD], 200, monkeypatch)
    assert head.split() == ["artifact", "size", "loss", "perplexity", "mean", "KL", "p99", "KL", "same", "top", "note"]
    assert row.split() == ["base", "1.0", "kB", "0.5000", "1.649", "0.01250", "0.2500", "97.0%"]
    _, head, *rows = lines(capsys, [OLD, ROW], 80, monkeypatch)
    assert rows[0].split()[:6] == ["base", "1.0", "kB", "0.5000", "-", "1.649"]
    assert head.split()[:4] == ["artifact", "size", "loss", "to"]


def test_rejected_files_say_so(capsys, monkeypatch):
    *_, row = lines(capsys, [{**ROW, "rejected": True}], 80, monkeypatch)
    assert row.rstrip().endswith("REJECTED")


@pytest.mark.parametrize(("name", "interval"), [("base", (0.1, 0.2)), ("gptq", (-0.1, 0.2)), ("gptq", None)])
def test_only_a_file_that_is_worse_beyond_noise_is_called_so(capsys, monkeypatch, name, interval):
    row = {**ROW, "name": name, "fidelity": {**FIT, "loss_change_interval": interval}}
    assert "worse" not in lines(capsys, [row], 80, monkeypatch)[-1]


def test_the_adapter_is_not_measured_against_itself(capsys, monkeypatch):
    _, _, adapter, other = lines(capsys, [{**ROW, "name": "adapter"}, ROW], 250, monkeypatch)
    assert adapter.split()[:8] == ["adapter", "105.5", "MB", "0.5000", "±0.0500", "-", "1.649", "0.01250"]
    assert "97.0% 95.0..98.0" in other and "97.0% 95.0..98.0" not in adapter
