"""An input is on its way back from the host before its layer's turn has come."""

import pytest
import torch

from qlora_kit.engine.graphs.hidden_places import HiddenPlaces
from qlora_kit.engine.graphs.host_passage import HostPassage
from tests.unrecorded_graphs import stand_in_for_cuda


@pytest.fixture
def passage(monkeypatch):
    stand_in_for_cuda(monkeypatch)
    return HostPassage(torch.zeros(2, 3), HiddenPlaces())


def test_an_input_comes_back_while_the_layer_behind_it_runs(passage):
    inputs = [passage.add() for _ in range(3)]
    for number, one in enumerate(inputs):
        one.take(torch.full((2, 3), float(number)))
    first, second, third = inputs
    assert first.start is third.start and first.start is not second.start
    third.bring_back()
    assert (third.start == 2).all() and (second.start == 1).all()  # both still lay there
    second.bring_back()
    assert (first.start == 0).all() and (second.start == 1).all()


def test_an_input_that_was_written_over_is_brought_back_at_its_turn(passage):
    first, _, third = (passage.add() for _ in range(3))
    first.take(torch.ones(2, 3))
    third.take(torch.zeros(2, 3))
    first.bring_back()
    assert (first.start == 1).all()


def test_hidden_states_of_another_shape_or_format_need_another_passage(passage):
    assert passage.fits(torch.ones(2, 3))
    assert not passage.fits(torch.ones(3, 2))
    assert not passage.fits(torch.ones(2, 3, dtype=torch.bfloat16))
