"""The page stands alone, shows all that was found, and lets no text of a row act as HTML."""

import dataclasses
import re

import numpy as np
import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.audit.audit import audit
from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.audit.oddities import Oddity
from qlora_kit.data.audit.shown_tokens import ShownRow, ShownToken, shown_row, token_texts
from qlora_kit.data.packing import pack
from qlora_kit.data.tokens import TokenRow
from qlora_kit.report.histogram import histogram
from qlora_kit.report.inspect_page import InspectPage, inspect_page, verdict
from qlora_kit.report.page import text, write_page
from tests.html_reader import read
from tests.stored_rows import StoredData, stored_rows
from tests.tiny_models import FAMILIES
from tests.tiny_tokenizers import smollm_tokenizer

TOKENIZER = smollm_tokenizer()
NASTY = '</style><script>alert("x")</script>&amp;\'"\t\n\x00\x1b\x93\ud800<img src=//evil.example/x onerror=1>'


@pytest.fixture
def content(tmp_path):
    ids = TOKENIZER("<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answers = [TOKENIZER(f"well {number * 7919}<|im_end|>")["input_ids"] for number in range(20)]
    rows = [([*ids, *answer], [False] * len(ids) + [True] * len(answer)) for answer in answers]
    bits = [int(Oddity.LATIN)] * 19 + [int(Oddity.LATIN | Oddity.MARKUP | Oddity.CONTROL)]
    data = StoredData(stored_rows(tmp_path / "train", rows, oddities=bits), stored_rows(tmp_path / "held", rows[:2]))
    found = audit(data, TOKENIZER, 64, frozenset(), packing=pack(data.train.lengths, 64), batch_size=4)
    shown = [shown_row(data.train[index], TOKENIZER, 1000) for index in range(2)]
    return InspectPage("my_recipe", ["train.jsonl", "held.jsonl"], data.summary, found, shown)


def test_the_page_is_whole_and_needs_nothing_else(content):
    html = inspect_page(content)
    reader = read(html)
    tags = [tag for tag, _ in reader.tags]
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not [name for _, given in reader.tags for name in given if name in ("src", "href") or name.startswith("on")]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in reader.tags
    assert tags.count("h1") == tags.count("main") == 1
    assert "my_recipe" in reader.text and "held.jsonl" in reader.text


def test_the_page_has_a_greatest_width_and_wide_tables_scroll_in_their_box(content):
    html = inspect_page(content)
    assert re.search(r"main \{[^}]*max-width: \d+rem", html)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", html)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", html.replace("\n", " "))
    tables = html.count("<table>")
    assert tables == html.count('<div class="scroll" tabindex="0"><table>') == 2
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"[^-]width: \d{3,}px", html)


def test_every_finding_is_there_with_its_level_as_a_word(content):
    findings = (Finding(Level.error, "broken", "it broke", ("a.jsonl:7",), 1, "mend=it"), *content.audit.findings)
    changed = dataclasses.replace(content, audit=dataclasses.replace(content.audit, findings=findings))
    reader = read(inspect_page(changed))
    assert {"text_markup", "text_control", "packing", "pad_is_eos"} < {found.name for found in findings}
    for found in findings:
        assert found.what[1:] in reader.text
        assert all(place in reader.text for place in found.places)
        assert found.fix in reader.text
    badges = [given["class"] for tag, given in reader.tags if "badge" in (given.get("class") or "")]
    assert badges == [f"badge {found.level.name}" for found in findings]
    words = {"Error", "Warning", "Note"}
    assert words == {word for word in reader.texts if word in words}


@pytest.mark.parametrize(
    ("fix", "shown"),
    [
        ("data.max_tokens=64", "Fix: <code>data.max_tokens=64</code>"),
        ("look at the rows, or data.max_tokens=64", "Do: look at the rows, or data.max_tokens=64"),
        ("data.train_file=<file>", "Do: data.train_file=&lt;file&gt;"),
    ],
)
def test_only_a_line_is_shown_as_one(content, fix, shown):
    findings = (Finding(Level.error, "broken", "it broke", (), 1, fix),)
    changed = dataclasses.replace(content, audit=dataclasses.replace(content.audit, findings=findings))
    assert f'<p class="fix">{shown}</p>' in inspect_page(changed)


def test_text_of_rows_cannot_act_as_html(content):
    tokens = (ShownToken(1, NASTY, True, False), ShownToken(2, NASTY, False, True))
    finding = Finding(Level.warning, NASTY, NASTY, (NASTY,), 1, NASTY)
    fact = dataclasses.replace(content.audit.tokens[0], token=NASTY, said=NASTY)
    source = dataclasses.replace(content.summary.train.sources[0], name=NASTY)
    train = dataclasses.replace(content.summary.train, sources=[source])
    changed = InspectPage(
        NASTY,
        [NASTY],
        dataclasses.replace(content.summary, train=train),
        dataclasses.replace(content.audit, findings=(finding,), tokens=(fact,)),
        [ShownRow(NASTY, tokens, 2, 1)],
    )
    html = inspect_page(changed)
    reader = read(html)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in reader.tags)
    assert html.count("<style>") == html.count("</style>") == 1
    assert not [name for _, given in reader.tags for name in given if name.startswith("on")]
    assert "alert(" in reader.text
    html.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


def test_each_token_shows_its_id_its_place_and_whether_it_is_trained(content):
    row = content.rows[0]
    reader = read(inspect_page(dataclasses.replace(content, rows=[row])))
    spans = [given for tag, given in reader.tags if tag == "span" and "title" in given]
    assert [span["title"] for span in spans] == [
        f"id {token.id}, position {index}" for index, token in enumerate(row.tokens)
    ]
    assert [" trained" in span["class"] for span in spans] == [token.is_trained for token in row.tokens]
    assert [" special" in span["class"] for span in spans].count(True) == 4
    assert "↵" in reader.text and "·" in reader.text


@pytest.mark.parametrize(
    ("given", "inside", "after"),
    [
        ("a b", "a<wbr><i>·</i>b", ""),
        ("a\n", "a<i>↵</i>", "\n"),
        ("\n\n", "<i>↵</i>\n<i>↵</i>", "\n"),
        ("\t\r", "<i>→</i>\t<i>␍</i>", ""),
        ("", "<i>⋯</i>", ""),
    ],
)
def test_white_space_is_shown_and_an_id_stays_on_the_line_of_its_token(content, given, inside, after):
    html = inspect_page(
        dataclasses.replace(content, rows=[ShownRow("a:1", (ShownToken(7, given, True, False),), 1, 1)])
    )
    start = '<div class="tokens"><span class="t trained" title="id 7, position 0">'
    assert f'{start}{inside}<span class="id" aria-hidden="true">7</span>{after}</span></div>' in html


def test_trained_tokens_differ_by_more_than_color(content):
    assert re.search(r"\.trained[^}]*border-bottom-color: var\(--accent\)", inspect_page(content))


def test_a_long_row_says_how_much_is_left_out(content):
    row = TokenRow(tuple(range(5, 25)), (True,) * 20, "a.jsonl", 3)
    html = inspect_page(dataclasses.replace(content, rows=[shown_row(row, TOKENIZER, 8)]))
    assert "… and 12 tokens more" in html


@pytest.mark.parametrize("capacity", [None, 1, 20, 64, 100_000])
def test_the_longest_row_allowed_is_marked_where_it_lies(content, capacity):
    html = inspect_page(dataclasses.replace(content, audit=dataclasses.replace(content.audit, capacity=capacity)))
    read(html)
    if capacity is not None:
        assert f"max_tokens {capacity:,}" in html
    assert ("beyond" in html) is (capacity is not None and capacity >= content.audit.lengths.edges[-1])


def test_the_verdict_counts_each_level(content):
    assert verdict(dataclasses.replace(content.audit, findings=())) == "No errors."
    error, note = Finding(Level.error, "a", ""), Finding(Level.note, "b", "")
    assert verdict(dataclasses.replace(content.audit, findings=(error, note, note))) == (
        "1 error, 2 notes; training would not start."
    )


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "gemma3", "qwen2"])
def test_tokens_joined_are_the_text(family):
    tokenizer = FAMILIES[family][1]()
    sentence = "Größe, naïve: 你好 🚀 emoji\n\tdone  twice"
    ids = tokenizer(sentence)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert any(" " in piece for piece in texts)


def test_control_characters_become_pictures():
    assert text("a\x00\x1b\x7f\x85\t\n<&\"'") == "a␀␛␡\ufffd\t\n&lt;&amp;&#34;&#39;"


def test_a_page_replaces_pages_alone(tmp_path, content):
    place = tmp_path / "new" / "inspect.html"
    write_page(place, inspect_page(content))
    write_page(place, inspect_page(dataclasses.replace(content, name="second")))
    assert "second" in place.read_text(encoding="utf-8")
    other = tmp_path / "mine.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(RecipeError) as refused:
        write_page(other, "third")
    assert refused.value.problems[0].fix == f"page={tmp_path / 'mine-inspect.html'}"
    assert other.read_text() == "<html>mine</html>"
    with pytest.raises(RecipeError, match="is a folder"):
        write_page(tmp_path, "fourth")


def test_bars_on_the_terminal_are_as_long_as_their_counts(content):
    lines = [line.plain for line in histogram(content.audit.lengths, mark="#")]
    counts = content.audit.lengths.counts
    assert len(lines) == len(counts)
    bars = np.array([line.count("#") for line in lines])
    assert bars.max() == 40 and (bars[np.array(counts) == 0] == 0).all()
    assert [int(line.split()[-1]) for line, count in zip(lines, counts, strict=True) if count] == [
        c for c in counts if c
    ]
