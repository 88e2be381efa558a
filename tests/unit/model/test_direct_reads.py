"""Which linear modules have their weight read by the module around them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_kit.model.direct_reads import initialized_directly, read_directly
from qlora_kit.model.skeleton import skeleton
from qlora_kit.model.structure import kept_whole, not_adapted
from tests.families import build


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asked, self.handed_on, self.called = (nn.Linear(4, 4) for _ in range(3))
        self.called.weight.data.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.asked.weight.dtype) @ self.handed_on.weight
        out: torch.Tensor = self.called(self.asked(hidden))
        return out


def test_a_weight_that_is_handed_on_is_seen_and_one_that_is_only_asked_for_its_type_is_not() -> None:
    assert read_directly(nn.ModuleDict({"inner": Reads()})) == {"inner.handed_on": "Reads"}


class ReadsAtTimes(nn.Module):
    """As BLOOM does: only where a setting asks for it."""

    def __init__(self, ranks: int, exact: bool) -> None:
        super().__init__()
        self.ranks, self.exact = ranks, exact
        self.by_setting, self.otherwise, self.by_input, self.in_training = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.ranks > 1 and self.exact:
            hidden = hidden @ self.by_setting.weight
        else:
            hidden = -(hidden @ self.otherwise.weight)
            hidden = hidden.relu()
        if hidden.is_cuda or not self.exact:
            hidden = hidden @ self.by_input.weight
        return hidden @ self.in_training.weight if self.training else hidden


@pytest.mark.parametrize(
    ("ranks", "exact", "read"),
    [
        (1, True, {"otherwise", "by_input", "in_training"}),
        (2, True, {"by_setting", "by_input", "in_training"}),
        (2, False, {"otherwise", "by_input", "in_training"}),
    ],
)
def test_what_a_setting_rules_out_is_no_reading(ranks: int, exact: bool, read: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in read_directly(ReadsAtTimes(ranks, exact))} == read


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1"])
def test_the_output_of_state_space_layers_stays_whole_and_carries_no_lora(kind: str, tmp_path: Path) -> None:
    model = skeleton(build(kind, tmp_path))
    outputs = [name for name, module in model.named_modules() if name.endswith(("mixer.out_proj", "mamba.out_proj"))]
    assert len(outputs) == 2
    spared = not_adapted(model)
    assert all("reads its weight itself, past LoRA" in spared[name] for name in outputs)
    assert set(outputs) <= set(kept_whole(model))
    assert not any(name.endswith("in_proj") for name in spared)


def test_weights_that_a_models_code_fills_in_by_name_are_seen(tmp_path: Path) -> None:
    model = skeleton(build("mamba2", tmp_path / "states"))
    outputs = [name for name, module in model.named_modules() if name.endswith("mixer.out_proj")]
    assert len(outputs) == 2
    assert initialized_directly(model) == outputs
    assert initialized_directly(skeleton(build("falcon_h1", tmp_path / "hybrid"))) == []
