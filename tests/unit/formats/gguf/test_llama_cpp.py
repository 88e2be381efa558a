"""Scoring through llama.cpp: both ways agree, stop tokens end a generation, nothing is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.core.errors import RunError
from qlora_kit.formats.gguf import llama_library
from qlora_kit.formats.gguf.llama_cpp import LlamaCppModel
from qlora_kit.formats.gguf.writer import write_gguf
from tests.tiny_models import build_tiny_model, set_stop_tokens

IDS = list(range(3, 560, 2))  # 279 tokens: more than one pass of the C interface


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("llama_cpp") / "tiny")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    write_gguf(folder, folder.parent / "model.gguf", "F16")
    return folder.parent / "model.gguf"


def test_every_position_equals_transformers_across_passes(folder: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([IDS])).logits[0].double(), -1).numpy()
    with LlamaCppModel(file) as opened:
        found = opened.log_probabilities(IDS, range(len(IDS)))
    assert found.shape == (len(IDS), 640)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.05  # measured 0.015


def test_positions_may_come_in_any_order_and_twice(file: Path) -> None:
    with LlamaCppModel(file) as opened:
        ordered = opened.log_probabilities(IDS, [5, 9, 270])
        mixed = opened.log_probabilities(IDS, [270, 5, 270, 9])
    assert np.array_equal(mixed, ordered[[2, 0, 2, 1]])


def test_top_and_single_probabilities_are_those_of_the_full_rows(file: Path) -> None:
    with LlamaCppModel(file) as opened:
        rows = opened.log_probabilities(IDS, [7, 20])
        tops = opened.top_logprobs(IDS, [7, 20], top=4)
        outside = int(rows[0].argmin())
        assert opened.logprob_of(IDS, 7, outside) == pytest.approx(float(rows[0, outside]))
    for row, top in zip(rows, tops, strict=True):
        assert list(top) == list(np.argsort(-row)[:4])
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_server_and_c_interface_agree(file: Path) -> None:
    with LlamaCppModel(file) as direct, LlamaCppModel(file, through_server=True) as served:
        assert direct.is_native and not served.is_native
        assert served.vocabulary_size == direct.vocabulary_size == 640
        short = IDS[:40]
        difference = direct.log_probabilities(short, [0, 20, 39]) - served.log_probabilities(short, [0, 20, 39])
        assert np.abs(difference).max() < 0.05  # measured 0.002
        assert served.generate(short, 12) == direct.generate(short, 12)
        for text in ("Größe 🚀\r\n", "<|im_start|>user"):
            for special in (True, False):
                expected = direct.tokenize(text, add_special=special, parse_special=special)
                assert served.tokenize(text, add_special=special, parse_special=special) == expected


def test_generation_is_greedy_and_counts_its_speed(folder: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reply = model.generate(torch.tensor([IDS[:30]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with LlamaCppModel(file) as opened:
        assert opened.tokens_per_second == 0.0
        assert opened.generate(IDS[:30], 8) == reply[0, 30:].tolist()
        assert opened.tokens_per_second > 0


@pytest.mark.parametrize("through_server", [False, True])
def test_a_stop_token_of_the_generation_config_ends_generation(
    folder: Path, file: Path, tmp_path: Path, through_server: bool
) -> None:
    with LlamaCppModel(file) as opened:
        free = opened.generate(IDS[:30], 8)
    assert len(free) == 8
    stop = next(token for token in free[2:] if token not in free[:2])
    stopped = build_tiny_model("llama", tmp_path / "stopped")
    set_stop_tokens(stopped, [602, stop])
    write_gguf(stopped, tmp_path / "stopped.gguf", "F16")
    with LlamaCppModel(tmp_path / "stopped.gguf", through_server=through_server) as opened:
        assert opened.generate(IDS[:30], 8) == free[: free.index(stop)]


def test_template_is_rendered_by_llama_cpp(file: Path) -> None:
    with LlamaCppModel(file) as opened:
        prompt = opened.apply_template([{"role": "user", "content": "Hé"}])
    assert prompt == "<|im_start|>user\nHé<|im_end|>\n<|im_start|>assistant\n"


def test_nothing_is_printed(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCppModel(file) as opened:
        opened.generate(IDS[:10], 3)
        opened.apply_template([{"role": "user", "content": "x"}])
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_position_outside_the_text_is_refused(file: Path) -> None:
    with LlamaCppModel(file) as opened:
        for positions in ([len(IDS)], [-1], []):
            with pytest.raises(RunError, match="positions"):
                opened.log_probabilities(IDS, positions)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no GGUF file"):
        LlamaCppModel(tmp_path / "absent.gguf")
    (tmp_path / "broken.gguf").write_text(json.dumps("not a model"))
    with pytest.raises(RunError, match="cannot load"):
        LlamaCppModel(tmp_path / "broken.gguf")


def test_another_layout_falls_back_to_the_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "_CONTEXT_DEFAULTS", (1, 2, 3, 4))
    llama_library.library.cache_clear()
    try:
        with LlamaCppModel(file) as opened:
            assert not opened.is_native
    finally:
        llama_library.library.cache_clear()


@pytest.mark.slow
def test_a_server_that_is_closed_at_once_ends(file: Path) -> None:
    # Its threads get little time, so that it is often told to end before it has begun.
    opened_and_closed = (
        "import sys\nfrom pathlib import Path\nfrom qlora_kit.formats.gguf.llama_server import ServerEngine\n"
        "for _ in range(20):\n    ServerEngine(Path(sys.argv[1]), 1).close()\n"
    )
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        subprocess.run([sys.executable, "-c", opened_and_closed, str(file)], check=True, timeout=90)
    finally:
        for process in busy:
            process.kill()
            process.wait()
