"""Random checkpoints of published shapes, as a hub would give them, for benchmarks that go through the command line."""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INDEX = "model.safetensors.index.json"
TEMPLATE = "first"
SPREAD = 0.02  # standard deviation of a matrix


@dataclass(frozen=True)
class Shape:
    """A published architecture.

    Attributes:
        config: of so many layers.
        layers: of the whole.
        period: layers after which their kinds repeat.
    """

    config: "Callable[[int], PreTrainedConfig]"
    layers: int
    period: int = 1


def shapes() -> dict[str, Shape]:
    """Published shapes by name."""
    import transformers as T  # noqa: N812

    def made(cls: Any, settings: dict[str, Any], layers: int) -> "PreTrainedConfig":
        config: PreTrainedConfig = cls(**settings, num_hidden_layers=layers)
        return config

    of_llama = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_attention_heads": 32}
    of_llama |= {"num_key_value_heads": 8}
    llama_8b = of_llama | {"hidden_size": 4096, "intermediate_size": 14336}
    llama_1b = of_llama | {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True}
    of_qwen = {"vocab_size": 151936, "max_position_embeddings": 40960, "num_attention_heads": 32, "head_dim": 128}
    qwen_8b = of_qwen | {"hidden_size": 4096, "intermediate_size": 12288, "num_key_value_heads": 8}
    qwen_30b_a3b = of_qwen | {"hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4}
    qwen_30b_a3b |= {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    qwen_30b_a3b |= {"norm_topk_prob": True}
    gemma_4b = {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8}
    gemma_4b |= {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "tie_word_embeddings": True}
    hybrid_4b = {"vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16}
    hybrid_4b |= {"num_key_value_heads": 4, "head_dim": 256, "linear_num_value_heads": 32, "tie_word_embeddings": True}
    hybrid_4b |= {"linear_num_key_heads": 16}
    return {
        "llama_8b": Shape(partial(made, T.LlamaConfig, llama_8b), 32),
        "llama_1b": Shape(partial(made, T.LlamaConfig, llama_1b), 16),
        "qwen_8b": Shape(partial(made, T.Qwen3Config, qwen_8b), 36),
        "gemma_4b": Shape(partial(made, T.Gemma3TextConfig, gemma_4b), 34, 6),
        "30b_a3b": Shape(partial(made, T.Qwen3MoeConfig, qwen_30b_a3b), 48),
        "30b_a3b_12_layers": Shape(partial(made, T.Qwen3MoeConfig, qwen_30b_a3b), 12),
        "gpt_oss_20b": Shape(partial(made, T.GptOssConfig, {"num_local_experts": 32, "num_experts_per_tok": 4}), 24, 2),
        "qwen3_5_4b": Shape(partial(made, T.Qwen3_5TextConfig, hybrid_4b), 32, 4),
    }


def write_base(shape: Shape, tokenizer: Path, place: Path, jobs: int = 1) -> None:
    """Write a random checkpoint in bf16 with the tokenizer, unless it is there.

    One period of layers is built and saved by transformers, so that names are as a hub's, and stands for all the
    others with other values: a mixture of 30 billion weights would not fit beside its own copy.

    Args:
        jobs: processes that write files side by side.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (place / INDEX).exists():
        return
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = shape.config(shape.layers)
    first = shape.config(shape.period)
    for one in (config, first):
        one.dtype = torch.bfloat16
        one.bos_token_id, one.eos_token_id, one.pad_token_id = (
            words.bos_token_id,
            words.eos_token_id,
            words.pad_token_id,
        )
    torch.manual_seed(0)
    with torch.device(_device()):
        model = AutoModelForCausalLM.from_config(first, dtype=torch.bfloat16)
    model.save_pretrained(place / TEMPLATE, max_shard_size="100GB")
    architectures = list(model.config.architectures or [])
    del model
    files = -(-shape.layers // shape.period)
    parts = [range(job, files, jobs) for job in range(min(jobs, files))]
    write = partial(_write_files, place, shape.layers, shape.period)
    if jobs == 1:
        written = [write(part) for part in parts]
    else:
        with ProcessPoolExecutor(len(parts), get_context("spawn")) as pool:
            written = list(pool.map(write, parts))
    weight_map = {name: file for part in written for name, file in part.items()}
    shutil.rmtree(place / TEMPLATE)
    config.architectures = architectures
    config.save_pretrained(place)
    words.save_pretrained(place)
    size = sum((place / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (place / INDEX).write_text(json.dumps(index), encoding="utf-8")
    if _device() == "cuda":
        torch.cuda.empty_cache()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_files(place: Path, layers: int, period: int, numbers: Sequence[int]) -> dict[str, str]:
    """Write some of the files from the template; the file of each tensor's name."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(place / TEMPLATE / "model.safetensors", _device())
    weight_map: dict[str, str] = {}
    files = -(-layers // period)
    for number in numbers:
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        torch.manual_seed(number)
        found = {}
        for name, tensor in tensors.items():
            other = renumbered(name, number * period, layers)
            if other is None or (other == name and number):
                continue
            drawn = torch.empty_like(tensor).normal_(std=SPREAD) if tensor.ndim > 1 and number else tensor
            found[other] = drawn.cpu().contiguous()
        save_file(found, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(found, file)
    return weight_map


def renumbered(name: str, further: int, layers: int) -> str | None:
    """A tensor's name so many layers further on; the same outside of layers, None beyond the last."""
    parts = name.split(".")
    place = next((place + 1 for place, part in enumerate(parts) if part == "layers"), None)
    if place is None:
        return name
    number = int(parts[place]) + further
    return None if number >= layers else ".".join([*parts[:place], str(number), *parts[place + 1 :]])
