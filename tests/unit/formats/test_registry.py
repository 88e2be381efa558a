"""Every target of a recipe has one format, which is asked without loading torch."""

import subprocess
import sys
from pathlib import Path

from qlora_kit.adapter.saved import BaseName
from qlora_kit.formats.job import ExportSource
from qlora_kit.formats.registry import FORMATS, export_jobs, requested
from qlora_kit.schema.export import (
    AdapterFormat,
    AdapterTarget,
    AwqLayout,
    AwqTarget,
    BnbTarget,
    CompressedTarget,
    ExportConfig,
    Fp8BlockTarget,
    GgufTarget,
    GptqTarget,
    MergedTarget,
)

ALL = ExportConfig(
    gguf={"file": GgufTarget()},
    gptq={"four": GptqTarget(bits_budget=3.5)},
    awq={"gemv": AwqTarget(layout=AwqLayout.gemv), "gemm": AwqTarget()},
    merged={"sixteen": MergedTarget()},
    compressed={"w4": CompressedTarget()},
    bnb={"nf4": BnbTarget()},
    fp8_block={"blocks": Fp8BlockTarget()},
    adapter={"lora": AdapterTarget(AdapterFormat.gguf), "peft": AdapterTarget()},
    bits_budget=4.5,
)


def test_each_target_has_the_format_of_its_group_and_form() -> None:
    assert [(one.path, one.format.name) for one in requested(ALL)] == [
        ("export.gguf.file", "gguf"),
        ("export.gptq.four", "gptq"),
        ("export.awq.gemv", "awq_gemv"),
        ("export.awq.gemm", "awq"),
        ("export.merged.sixteen", "merged"),
        ("export.compressed.w4", "compressed"),
        ("export.bnb.nf4", "bnb"),
        ("export.fp8_block.blocks", "fp8_block"),
        ("export.adapter.lora", "adapter_gguf"),
        ("export.adapter.peft", "adapter"),
    ]
    assert {one.format.name for one in requested(ALL)} == set(FORMATS)


def test_a_shared_budget_is_the_targets_that_has_none() -> None:
    assert {one.name: getattr(one.target, "bits_budget", None) for one in requested(ALL)}["file"] == 4.5
    assert {one.name: getattr(one.target, "bits_budget", None) for one in requested(ALL)}["four"] == 3.5


def test_quick_ones_are_written_first_and_those_of_a_group_in_their_order(tmp_path: Path) -> None:
    jobs = export_jobs(ALL, ExportSource(tmp_path, tmp_path, BaseName("x"), "mine", []))
    assert [(job.name, job.file) for job in jobs] == [
        ("lora", "mine.adapter.gguf"),
        ("peft", "."),
        ("sixteen", "."),
        ("nf4", "."),
        ("blocks", "."),
        ("file", "mine.Q4_K_M-4.5bits.gguf"),
        ("w4", "."),
        ("four", "."),
        ("gemv", "."),
        ("gemm", "."),
    ]


def test_asking_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from qlora_kit.export.serving.commands import Served\n"
        "from qlora_kit.formats.registry import FORMATS\n"
        "assert all(one.serve_commands(Served('m')) and one.remedies({}) is not None for one in FORMATS.values())\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"
