"""What bitsandbytes asks of a model."""

from collections.abc import Iterator

from qlora_kit.core.errors import Problem
from qlora_kit.export.checks.fault import Fault, with_fixes
from qlora_kit.export.checks.form import ModelForm, no_linear_layers


def bnb_problems(path: str, form: ModelForm) -> Iterator[Problem]:
    """What is wrong with a bitsandbytes file of this model."""
    faults = [] if form.blocks else [Fault("kind", no_linear_layers("bitsandbytes", form))]
    if form.experts:
        what = "readers of bitsandbytes folders know linear layers alone, so this family's experts would stay in 16 bit"
        elsewhere = "" if form.strange_experts else "; gptq_4bit, awq_4bit, w4a16 and w8a16 hold them one by one"
        faults.append(Fault("kind", what + elsewhere))
    yield from with_fixes(path, faults, lambda _: (), lambda _: faults)
