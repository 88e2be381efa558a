"""Loads a folder in vLLM or SGLang, asks one question, and prints the answer as one line; run as a child process.

python -m qlora_kit.evaluation.servers.child vllm <folder>
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module

ANSWER_MARK = "qlora-kit answer: "  # in front of the line that holds the answer

_TURNS = [{"role": "user", "content": "Hello"}]
_TOKENS = 8
_CONTEXT = 512
_SHARE_OF_MEMORY = 0.5


def answer_of_vllm(folder: str) -> str:
    """A short greedy answer from vLLM's offline engine."""
    vllm = import_module("vllm")
    model = vllm.LLM(model=folder, max_model_len=_CONTEXT, enforce_eager=True, gpu_memory_utilization=_SHARE_OF_MEMORY)
    outputs = model.chat(_TURNS, vllm.SamplingParams(max_tokens=_TOKENS, temperature=0))
    return str(outputs[0].outputs[0].text)


def answer_of_sglang(folder: str) -> str:
    """A short greedy answer from SGLang's offline engine."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    engine = import_module("sglang").Engine(
        model_path=folder, context_length=_CONTEXT, mem_fraction_static=_SHARE_OF_MEMORY, disable_cuda_graph=True
    )
    try:
        settings = {"max_new_tokens": _TOKENS, "temperature": 0}
        return str(engine.generate(input_ids=ids, sampling_params=settings)["text"])
    finally:
        engine.shutdown()


_ANSWERS: dict[str, Callable[[str], str]] = {"vllm": answer_of_vllm, "sglang": answer_of_sglang}


def main(arguments: list[str]) -> None:
    """Print the answer of the named server for a folder."""
    module, folder = arguments
    print(ANSWER_MARK + json.dumps(_ANSWERS[module](folder)), flush=True)


if __name__ == "__main__":  # vLLM and SGLang start workers that import this module again
    main(sys.argv[1:])
