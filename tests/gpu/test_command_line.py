"""What a user types, on a GPU: padded rows of mixed length, a checkpoint on disk, and the memory that was planned."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny_tokenizers import smollm_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WORDS = ["lamp", "door", "fan", "clock", "radio", "oven", "shade", "bell"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A random Llama of 0.7 B weights with `rows.jsonl` of mixed length."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = smollm_tokenizer()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(200):
            text = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(5, 250))) for _ in range(2)]
            turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), text, strict=True)]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("data=rows",),
        ("data=rows", "trainer.gradient_checkpointing=false"),
        ("data=rows", "engine=fast", "engine.recompute=all"),
        ("data=rows", "engine=fast", "engine.recompute=none", "engine.cached_weights=none"),
        ("data=packed",),
        ("data=packed", "engine=fast"),
    ],
    ids=" ".join,
)
def test_the_memory_that_was_planned_is_what_a_run_needs(workshop, tmp_path, words):
    line = [
        *("train", f"model.source={workshop / 'base'}", f"data.train_file={workshop / 'rows.jsonl'}"),
        *("data.max_tokens=2048", "data.eval_rows=8", "trainer.batch_size=8", "trainer.max_steps=8", *words),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit", *line],
        cwd=tmp_path,
        env=os.environ | {"QLORA_KIT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    print(f"planned {result['planned_memory_bytes'] / 1e9:.2f} needed {result['peak_memory_bytes'] / 1e9:.2f} GB")
    assert result["planned_memory_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.1)
