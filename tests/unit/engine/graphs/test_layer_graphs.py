"""When layers are recorded, and what a recording depends on."""

import pytest
import torch

from qlora_kit.engine.graphs import layer_graphs as graphs
from qlora_kit.engine.graphs.captured_layer import CapturedLayer, GraphMemory, _capture
from qlora_kit.engine.graphs.layer_graphs import (
    MOST_MISFITS,
    REPEATS,
    CapturableLayer,
    CaptureSchedule,
    LayerGraphs,
    shape_of,
)


def due(turns, shape, times):
    return [turns.is_due(shape) for _ in range(times)]


def test_a_shape_is_recorded_once_it_came_often_enough_in_a_row():
    turns = CaptureSchedule()
    assert due(turns, "a", REPEATS + 2) == [False] * REPEATS + [True, True]


def test_a_shape_that_did_not_stay_makes_the_next_wait_longer():
    turns = CaptureSchedule()
    due(turns, "a", REPEATS + 1)
    assert due(turns, "b", 2 * REPEATS + 1) == [False] * 2 * REPEATS + [True]


def test_shapes_that_never_repeat_are_never_due_and_cost_no_patience():
    turns = CaptureSchedule()
    assert not any(turns.is_due(number) for number in range(100))
    assert due(turns, "a", REPEATS + 1)[-1]


def test_what_cannot_be_recorded_is_never_due():
    assert not any(due(CaptureSchedule(), None, 10))


def test_evaluation_costs_no_patience():
    turns = CaptureSchedule()
    due(turns, "a", REPEATS + 1)
    turns.start_over()
    assert due(turns, "a", REPEATS + 1)[-1]


def test_a_recording_depends_on_shapes_settings_and_addresses_but_not_on_values():
    h, mask, weight = torch.zeros(2, 5, 4), torch.ones(2, 5), torch.ones(3)

    def found(h=h, weight=weight, **settings):
        return shape_of(h, {"mask": mask, "longest": 5, "angles": (mask, mask)} | settings, [weight])

    assert found() == found(mask=torch.zeros(2, 5))
    others = [
        found(h=torch.zeros(2, 6, 4)),
        found(h=torch.zeros(2, 5, 4, requires_grad=True)),
        found(mask=torch.ones(2, 6)),
        found(mask=None),
        found(longest=6),
        found(angles=(mask, torch.ones(1))),
        found(weight=torch.ones(3)),
    ]
    assert all(other is not None and other != found() for other in others)


def test_a_cache_or_a_trained_setting_cannot_be_recorded():
    h = torch.zeros(2, 5, 4)
    assert shape_of(h, {"past_key_values": object()}) is None
    assert shape_of(h, {"bias": torch.zeros(3, requires_grad=True)}) is None


DOUBLE = CapturableLayer(lambda hidden, settings: hidden * 2, [], lambda of_input, of_parameters: None)


def without_cuda(monkeypatch, recorded):
    def opened(self, h):
        self._memory, self.gradient = object(), torch.empty_like(h)
        return True

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(graphs, "CapturedLayer", recorded)
    monkeypatch.setattr(LayerGraphs, "_open", opened)


class Fails:
    """A recording that CUDA refuses half-way."""

    def __init__(self, *_):
        pass

    def capture(self, *_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_layer_that_cannot_be_recorded_is_computed_then_and_from_then_on(monkeypatch, capsys):
    without_cuda(monkeypatch, Fails)
    made, h = LayerGraphs(), torch.ones(1, 2, 3)
    for _ in range(2 * REPEATS + 2):
        for place in (0, 1):
            assert torch.equal(made.run(place, DOUBLE, h, {}), h * 2)
        assert not made.captured
    assert made.gradient is None
    assert capsys.readouterr().err.count("not recorded as CUDA graphs: operation not permitted") == 1


class Misfit:
    """A recording that fits no later pass."""

    def __init__(self, *_):
        self.shape = "another"

    def capture(self, *_):
        made.append(self)


made = []


def test_layers_that_never_fit_their_recordings_are_left_alone(monkeypatch, capsys):
    without_cuda(monkeypatch, Misfit)
    layers, h = LayerGraphs(), torch.ones(1, 2, 3)
    for _ in range(10 * REPEATS):
        assert torch.equal(layers.run(0, DOUBLE, h, {}), h * 2)
    assert len(made) == MOST_MISFITS + 1
    assert capsys.readouterr().err.count("called with other settings from step to step") == 1


class FakeGraph:
    """Ends as CUDA does: with an error of its own once something has failed."""

    def __init__(self):
        self.calls = []

    def capture_begin(self, **settings):
        self.calls.append("begin")

    def capture_end(self):
        self.calls.append("end")
        if "failed" in self.calls:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_failed_recording_tells_what_failed():
    graph = FakeGraph()
    with pytest.raises(RuntimeError, match="not permitted"), _capture(graph, GraphMemory(None, None)):
        graph.calls.append("failed")
        raise RuntimeError("operation not permitted when stream is capturing")
    assert graph.calls == ["begin", "failed", "end"]
    graph = FakeGraph()
    with pytest.raises(RuntimeError, match="previous error"), _capture(graph, GraphMemory(None, None)):
        graph.calls.append("failed")
    graph = FakeGraph()
    with _capture(graph, GraphMemory(None, None)):
        pass
    assert graph.calls == ["begin", "end"]


def test_a_backward_pass_is_recorded_as_a_step_runs_it_without_autocast():
    seen = []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return 2 * grad

    recorded = CapturedLayer.__new__(CapturedLayer)  # its graphs need a GPU
    start = torch.ones(3, requires_grad=True)
    recorded.gradient, recorded.gradients, recorded.needs_input, recorded._wanted = torch.ones(3), [], True, [start]
    with torch.autocast("cpu", torch.bfloat16):
        recorded._capture_backward(Layer.apply(start))
    assert seen == [False] and recorded.gradient.tolist() == [2, 2, 2]
