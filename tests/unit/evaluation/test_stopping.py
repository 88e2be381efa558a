"""An answer that ends by itself is told from one that was cut."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.evaluation.stopping import ended_early, stop_tokens, until_stop
from qlora_kit.evaluation.torch_scorer import TorchScorer
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.writer import write_gguf
from tests.tiny_models import build_tiny_model, set_stop_tokens

PROMPTS = [list(range(3, 20)), list(range(40, 47)), list(range(100, 130, 3))]


@pytest.mark.parametrize(("given", "stops"), [(2, [2]), ([2, 7], [2, 7]), ((2, 7), [2, 7]), (None, [])])
def test_stop_tokens_are_those_of_the_generation_config(given, stops):
    assert stop_tokens(SimpleNamespace(eos_token_id=given)) == stops


@pytest.mark.parametrize(
    ("ids", "kept", "stopped"),
    [([4, 5, 2, 0, 0], [4, 5], True), ([4, 5, 6], [4, 5, 6], False), ([7, 4], [], True), ([4, 2], [4], True)],
)
def test_an_answer_ends_before_its_stop_token(ids, kept, stopped):
    assert until_stop(ids, [2, 7]) == (kept, stopped)


def test_an_answer_that_fills_the_limit_was_cut():
    assert ended_early([[1, 2, 3], [1, 2], []], 3) == [False, True, True]


def test_torch_tells_which_answers_stopped(tmp_path):
    folder = build_tiny_model("llama", tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    free = TorchScorer(model, 0).answer(PROMPTS, 6, batch_size=2)
    assert free.stopped == [False, False, False]
    assert [len(answer) for answer in free.token_ids] == [6, 6, 6]

    # The first prompt's last free token: it ends that answer at the limit itself, and so by itself.
    stop = free.token_ids[0][5]
    set_stop_tokens(folder, [639, stop])
    stopping = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = TorchScorer(stopping, 0).answer(PROMPTS, 6, batch_size=2)
    for was, found, stopped in zip(free.token_ids, answers.token_ids, answers.stopped, strict=True):
        assert stopped is (stop in was)
        assert found == (was[: was.index(stop)] if stopped else was)
    assert answers.stopped[0] and not all(answers.stopped)


@pytest.mark.parametrize("through_server", [False, True])
def test_llama_cpp_fills_the_limit_unless_the_answer_stops(tmp_path, through_server):
    """The stop token comes third: cut at two tokens, stopped at three and at more."""
    folder = build_tiny_model("llama", tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    free = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    stop = int(free[0, -1])
    assert stop not in free[0, -3:-1]
    set_stop_tokens(folder, [stop])
    write_gguf(folder, tmp_path / "m.gguf", "F16")
    with LlamaCppModel(tmp_path / "m.gguf", through_server=through_server) as opened:
        stopped = [ended_early([opened.generate(PROMPTS[0], limit)], limit) for limit in (2, 3, 8)]
    assert stopped == [[False], [True], [True]]
