"""Windows of a text, and its perplexity against one computed by transformers' own loss."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation import perplexity
from qlora_kit.evaluation.perplexity import text_fit, text_windows
from qlora_kit.evaluation.torch_scorer import TorchScorer
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizers import TRAINING_TEXT

TEXT = "\n\n".join(TRAINING_TEXT[:3] * 4)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text, **settings):
        assert settings["add_special_tokens"] is False
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij", encoding="utf-8")
    return tmp_path / "text.txt"


def read_back(rows):
    return ["".join(chr(i) if i else "^" for i in row.input_ids) for row in rows]


def counted(rows):
    """The characters that are predicted, position 0 having nothing before it."""
    return ["".join(chr(i) for i, t in list(zip(r.input_ids, r.trained, strict=True))[1:] if t) for r in rows]


def test_windows_lie_side_by_side(place):
    rows = text_windows(place, Letters(), None, 4)
    assert read_back(rows) == ["abcd", "efgh", "ij"]
    assert counted(rows) == ["bcd", "fgh", "j"]
    assert [(row.file, row.line) for row in rows] == [(str(place), number) for number in (1, 2, 3)]


def test_bos_opens_every_window_so_that_every_token_counts(place):
    rows = text_windows(place, Letters(), 0, 4)
    assert read_back(rows) == ["^abc", "^def", "^ghi", "^j"]
    assert "".join(counted(rows)) == "abcdefghij"


@pytest.mark.parametrize(("bos", "stride"), [(None, 1), (None, 2), (None, 3), (0, 1), (0, 2), (0, 4)])
def test_overlapping_windows_count_each_token_once(place, bos, stride):
    rows = text_windows(place, Letters(), bos, 5, stride)
    assert "".join(counted(rows)) == ("bcdefghij" if bos is None else "abcdefghij")
    assert all(text.lstrip("^") in "abcdefghij" and len(text) <= 5 for text in read_back(rows))


def test_a_last_window_of_one_token_has_nothing_to_predict(tmp_path):
    (tmp_path / "t").write_text("abcde")
    assert read_back(text_windows(tmp_path / "t", Letters(), None, 4)) == ["abcd"]
    assert read_back(text_windows(tmp_path / "t", Letters(), None, 5)) == ["abcde"]


def test_no_more_than_the_wanted_windows_and_no_more_text_than_they_need(tmp_path, monkeypatch):
    (tmp_path / "long").write_text("abcdefgh" * 100_000)
    asked = []
    read = perplexity._read
    monkeypatch.setattr(perplexity, "_read", lambda path, size: asked.append(size) or read(path, size))
    rows = text_windows(tmp_path / "long", Letters(), None, 4, most=3)
    assert read_back(rows) == ["abcd", "efgh", "abcd"]
    assert asked == [12 * 8]


def test_more_is_read_where_tokens_are_long(tmp_path):
    class Words(Letters):
        def __call__(self, text, **settings):
            return {"input_ids": [len(word) for word in text.split()]}

    (tmp_path / "long").write_text("a" * 50 + " " + ("b" * 40 + " ") * 2000)
    rows = text_windows(tmp_path / "long", Words(), None, 6, most=2)
    assert [row.input_ids for row in rows] == [(50, 40, 40, 40, 40, 40), (40,) * 6]


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "t").write_bytes(b"a\r\nb")
    assert read_back(text_windows(tmp_path / "t", Letters(), None, 9)) == ["a\r\nb"]


def test_a_text_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read .*absent.txt: No such file") as caught:
        text_windows(tmp_path / "absent.txt", Letters(), None, 4)
    assert "eval.text_file=null" in str(caught.value)
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(RecipeError, match="not UTF-8 text: byte 3 of what was read is 0xe9"):
        text_windows(tmp_path / "latin", Letters(), None, 4)
    (tmp_path / "short").write_text("a")
    with pytest.raises(RecipeError, match="holds 1 token, too few to predict one"):
        text_windows(tmp_path / "short", Letters(), None, 4)


def test_a_stride_that_skips_text_is_refused(place):
    with pytest.raises(RecipeError, match="text_stride=4 is longer than a window's 3 tokens") as caught:
        text_windows(place, Letters(), 0, 4, stride=4)
    assert "eval.text_stride=3" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_is_that_of_transformers_loss(tmp_path, stride):
    folder = build_tiny_model("llama", tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "t").write_text(TEXT, encoding="utf-8")
    windows = text_windows(tmp_path / "t", tokenizer, None, 48, stride)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]

    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride or 48):
        piece = torch.tensor([ids[begin : begin + 48]])
        labels = piece.clone()
        labels[:, : max(done - begin, 0)] = -100
        done = begin + piece.shape[1]
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            with torch.no_grad():
                total += float(model(piece, labels=labels).loss) * predicted
            count += predicted
        if done == len(ids):
            break
    fit = text_fit(TorchScorer(model, 0), windows)
    assert (fit.tokens, fit.windows) == (count, len(windows))
    assert fit.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert fit.interval is not None
    assert fit.interval[0] < fit.perplexity < fit.interval[1]


def test_one_window_is_scored_at_a_time():
    class Watched:
        def score(self, rows, ids, top_tokens):
            assert len(rows) == 1 and ids is None and top_tokens == 1
            return type("Scores", (), {"target": torch.full((len(rows[0].input_ids) - 1,), -math.log(7.0))})

        def answer(self, *_):
            raise NotImplementedError

        def close(self):
            raise NotImplementedError

    rows = [TokenRow((1, 2, 3), (False, True, True), "t", 1)] * 2
    assert text_fit(Watched(), rows).perplexity == pytest.approx(7)
