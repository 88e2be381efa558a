"""What quantize_8b.py times: a 16-bit folder in, a quantized folder out, by the kit and by libraries as they advise.

The libraries' settings are those of their own examples: llmcompressor's GPTQ (`GPTQModifier`, W4A16), AWQ
(`AWQModifier(duo_scaling="both")` before a W4A16_ASYM `QuantizationModifier`) and FP8_DYNAMIC; gptqmodel's
`QuantizeConfig(bits=4, group_size=128)`. Rows are the caller's for all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[int]]
Run = Callable[[Path, Path, Rows], None]


def kit_gptq(folder: Path, out: Path, rows: Rows) -> None:
    """`export=gptq`, which is gptqmodel and the layout's own writing."""
    from qlora_kit.formats.gptq.write import write_gptq
    from qlora_kit.schema.export import GptqTarget

    write_gptq(folder, out, GptqTarget(), rows)


def kit_awq(folder: Path, out: Path, rows: Rows) -> None:
    """`export=awq`, the kit's own."""
    from qlora_kit.formats.awq.write import write_awq
    from qlora_kit.schema.export import AwqTarget

    write_awq(folder, out, AwqTarget(), rows)


def kit_compressed(scheme: str) -> Run:
    """`export=compressed`, which is llmcompressor and the layout's own writing."""

    def run(folder: Path, out: Path, rows: Rows) -> None:
        from qlora_kit.formats.compressed.write import write_compressed
        from qlora_kit.schema.export import CompressedScheme, CompressedTarget

        write_compressed(folder, out, CompressedTarget(scheme=CompressedScheme[scheme]), rows)

    return run


def llmcompressor(target: str) -> Run:
    """One of llmcompressor's example recipes."""

    def run(folder: Path, out: Path, rows: Rows) -> None:
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        data = {}
        if target != "fp8":
            data = {"dataset": _dataset(rows), "num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
        oneshot(model=model, processor=AutoTokenizer.from_pretrained(folder), recipe=_recipe(target), **data)
        model.save_pretrained(out, save_compressed=True)

    return run


def _recipe(target: str) -> list[Any]:
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if target == "gptq":
        return [GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])]
    if target == "fp8":
        return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])]
    quantize = QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])
    return [AWQModifier(duo_scaling="both"), quantize]


def _dataset(rows: Rows) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def gptqmodel(folder: Path, out: Path, rows: Rows) -> None:
    """gptqmodel's example."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    where = {} if torch.cuda.is_available() else {"device": "cpu"}
    model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=128), **where)
    batch = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(batch, batch_size=1)
    model.save(str(out))


# In the order in which they are run: what is compared stands together, the cheapest first.
STACKS: dict[tuple[str, str], Run] = {
    ("qlora_kit", "fp8"): kit_compressed("FP8_DYNAMIC"),
    ("llmcompressor", "fp8"): llmcompressor("fp8"),
    ("qlora_kit", "gptq"): kit_gptq,
    ("gptqmodel", "gptq"): gptqmodel,
    ("llmcompressor", "gptq"): llmcompressor("gptq"),
    ("qlora_kit", "w4a16"): kit_compressed("W4A16"),
    ("qlora_kit", "awq"): kit_awq,
    ("llmcompressor", "awq"): llmcompressor("awq"),
}


def import_libraries(stack: str, target: str) -> None:
    """Load what the run imports, which is not what is timed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import LlamaForCausalLM  # noqa: F401

    import qlora_kit.formats.awq.model  # noqa: F401

    if stack == "gptqmodel" or (stack, target) == ("qlora_kit", "gptq"):
        from qlora_kit.formats.gptqmodel_settings import set_up_gptqmodel

        set_up_gptqmodel()
        import gptqmodel  # noqa: F401
    elif (stack, target) != ("qlora_kit", "awq"):
        import llmcompressor  # noqa: F401
