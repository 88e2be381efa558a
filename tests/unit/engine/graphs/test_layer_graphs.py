"""When layers are recorded, and what a recording depends on."""

import gc

import pytest
import torch

from qlora_kit.engine.graphs.capture_schedule import AGAIN, MOST_SHAPES, REPEATS, CaptureSchedule
from qlora_kit.engine.graphs.captured_layer import CapturedLayer, GraphMemory
from qlora_kit.engine.graphs.layer_graphs import (
    MOST_MISFITS,
    CapturableLayer,
    LayerGraphs,
    shape_of,
)
from qlora_kit.engine.graphs.recording_room import LEFT_FREE, Beside
from tests.unrecorded_graphs import stand_in_for_cuda


@pytest.fixture
def cuda(monkeypatch):
    return stand_in_for_cuda(monkeypatch)


def due(turns, shape, times, **given):
    return [turns.is_due(shape, **given) for _ in range(times)]


def test_the_first_shape_is_recorded_once_kernels_are_there():
    turns = CaptureSchedule()
    assert due(turns, "a", REPEATS + 2) == [False] * REPEATS + [True, True]


def test_another_shape_is_recorded_when_it_comes_again_or_at_once_where_it_is_expected():
    turns = CaptureSchedule()
    due(turns, "a", REPEATS + 1)
    assert due(turns, "b", AGAIN + 1) == [False] * AGAIN + [True]
    assert due(turns, "c", 1, is_expected=True) == [True]
    assert turns.is_due("a")


def test_the_first_batches_may_be_of_any_shape():
    turns = CaptureSchedule()
    found = [turns.is_due(number, is_expected=True) for number in range(REPEATS + 2)]
    assert found == [False] * REPEATS + [True, True]


def test_there_are_so_many_shapes_and_no_more():
    turns = CaptureSchedule()
    found = [turns.is_due(number, is_expected=True) for number in range(REPEATS + MOST_SHAPES + 5)]
    assert found == [False] * REPEATS + [True] * MOST_SHAPES + [False] * 5
    assert turns.is_due(REPEATS)


def test_shapes_that_never_repeat_are_never_due():
    turns = CaptureSchedule()
    assert not any(turns.is_due(number) for number in range(100))
    assert due(turns, "a", AGAIN + 1)[-1]


def test_a_recording_may_fail_once():
    turns = CaptureSchedule()
    assert [turns.fails_again(shape) for shape in "aabb"] == [False, True, False, True]


def test_what_cannot_be_recorded_is_never_due():
    assert not any(due(CaptureSchedule(), None, 10))
    turns = CaptureSchedule()
    due(turns, "a", REPEATS + 1)
    turns.leave("a")
    assert not any(due(turns, "a", 10))


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


def not_recordable(cuda):
    """Doubles, and fails while it is being recorded."""

    def compute(hidden, settings):
        if cuda.graphs and cuda.graphs[-2].calls == ["begin in a pool"]:
            cuda.graphs[-2].calls.append("failed")
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return hidden * 2

    return compute


def failing_once(cuda):
    """Doubles, and fails the first time that it is recorded."""
    fails, failed = not_recordable(cuda), []

    def compute(hidden, settings):
        if failed:
            return hidden * 2
        try:
            return fails(hidden, settings)
        except RuntimeError:
            failed.append(True)
            raise

    return compute


def test_a_layer_that_cannot_be_recorded_is_computed_then_and_from_then_on(cuda, capsys):
    layer = DOUBLE._replace(compute=not_recordable(cuda))
    made, h = LayerGraphs(), torch.ones(1, 2, 3)
    for _ in range(2 * REPEATS + 2):
        for place in (0, 1):
            assert torch.equal(made.run(place, layer, h, {}), h * 2)
        assert not made.captured
    assert not made.shapes
    # what failed first is told, once, and not that a recording that has failed cannot be ended
    assert capsys.readouterr().err.count("not recorded as CUDA graphs: operation not permitted when stream is") == 1
    assert [graph.calls for graph in cuda.graphs] == 2 * [["begin in a pool", "failed", "end"], []]
    # the generator would refuse to draw until a recording ends well
    assert cuda.generator.graphsafe_set_state.call_args_list == 2 * [((cuda.generator.clone_state(),),)]


def test_a_layer_with_a_plain_part_is_recorded_without_it_where_that_cannot_be(cuda, capsys):
    made, h = LayerGraphs(), torch.ones(1, 2, 3, requires_grad=True)
    for _ in range(2 * REPEATS + 2):
        for place in (0, 1):
            layer = DOUBLE if made.in_part else DOUBLE._replace(compute=not_recordable(cuda), has_plain_part=True)
            made.run(place, layer, h, {})
    assert made.in_part
    assert len(made.captured) == 2
    assert capsys.readouterr().err.count("without the part that runs plain: operation not permitted") == 1


def test_layers_that_never_fit_their_recordings_are_left_alone(cuda, capsys):
    two = torch.tensor(2.0, requires_grad=True)
    layer = CapturableLayer(lambda hidden, settings: hidden * two, [two], lambda of_input, of_parameters: None)
    layers, h = LayerGraphs(), torch.ones(1, 2, 3)
    for turn in range(10 * REPEATS):
        layers.run(0, layer, h, {})
        found = layers.run(1, layer, h, {"longest": turn})
    assert torch.equal(found, h * 2)
    assert not layers.captured
    forward_and_backward, both_layers = 2, 2
    assert len(cuda.graphs) == forward_and_backward * both_layers * (MOST_MISFITS + 1)
    assert capsys.readouterr().err.count("called with other settings from step to step") == 1


def test_what_a_pass_compiles_is_recorded_in_the_next(cuda, capsys):
    layer = DOUBLE._replace(compute=failing_once(cuda))
    graphs, h = LayerGraphs(), torch.ones(1, 2, 3, requires_grad=True)
    found = []
    for _ in range(REPEATS + 3):
        assert torch.equal(graphs.run(0, layer, h, {}), h * 2) or graphs.captured
        found.append(len(graphs.captured))
    assert found == [0] * REPEATS + [0, 1, 1]
    assert "kernel by kernel" not in capsys.readouterr().err


def test_nothing_is_collected_while_a_layer_is_recorded(cuda):
    seen = []

    def compute(hidden, settings):
        seen.append(gc.isenabled())
        return hidden * 2

    graphs, h = LayerGraphs(), torch.ones(1, 2, 3, requires_grad=True)
    for _ in range(REPEATS + 1):
        graphs.run(0, DOUBLE._replace(compute=compute), h, {})
    assert seen == [True] * REPEATS + [False] and gc.isenabled()


def test_how_many_layers_are_recorded_is_told_once(cuda, capsys):
    layers, h = LayerGraphs(), torch.ones(1, 2, 3, requires_grad=True)
    for _ in range(2):  # an evaluation between, after which all are recorded anew
        for _ in range(REPEATS + 3):
            for place in (0, 1):
                layers.run(place, DOUBLE, h, {})
        layers.release()
    assert capsys.readouterr().err.count("2 layers are started as CUDA graphs") == 1


def test_a_recording_is_fed_an_input_that_is_trained_and_is_no_recordings_result(cuda):
    """As behind an embedding that is trained too."""
    layers = LayerGraphs()
    for turn in range(REPEATS + 2):
        h = torch.full((1, 2, 3), float(turn), requires_grad=True)
        layers.run(0, DOUBLE, h, {})
    assert torch.equal(layers.captured[0].start, h)


def replays(known, weight):
    """Have the recording of a layer that multiplies do what a GPU would when it is started."""

    def forward():
        known.output.copy_(known.start.detach() * weight)

    def backward():  # as if made again from the input, which is what a recording reads
        of_weight = (known.gradient * known.start.detach()).sum()
        known.gradient.mul_(weight.detach())
        known.gradients[0].copy_(of_weight)

    known.forward_graph.replay, known.backward_graph.replay = forward, backward


def test_inputs_on_the_host_come_back_although_all_layers_read_in_one_place(cuda):
    weights = [torch.tensor(value, requires_grad=True) for value in (2.0, 4.0, 8.0, 16.0, 32.0)]

    def layer(place):
        def compute(hidden, settings):
            return hidden * weights[place]

        from_host = compute if place < 4 else None
        return CapturableLayer(compute, [weights[place]], lambda of_input, of_parameters: None, from_host=from_host)

    graphs = LayerGraphs()

    def run(h):
        seen = [h]
        for place in range(5):
            seen.append(graphs.run(place, layer(place), seen[-1], {}))
        return seen

    for _ in range(REPEATS + 1):
        run(torch.ones(1, 2, 3, requires_grad=True))
    layers = [graphs.captured[place] for place in range(5)]
    starts = [known.start.data_ptr() for known in layers]
    assert starts[0] == starts[2] != starts[1] == starts[3] and starts[4] not in starts[:4]
    assert len({known.output.data_ptr() for known in layers[:4]}) == 1
    for known, weight in zip(layers, weights, strict=True):
        replays(known, weight)
    for _ in range(2):
        h = torch.randn(1, 2, 3, requires_grad=True)
        seen = run(h)
        kept = [hidden.detach().clone() for hidden in seen]
        for hidden, factor in zip(seen, (1, 2, 8, 64, 1024, 32768), strict=True):
            assert torch.equal(hidden, h * factor)  # none has been written over
        (to_h,) = torch.autograd.grad(seen[-1].sum(), h)
        assert torch.equal(to_h, torch.full_like(h, 32768.0))
        for known, start, after in zip(layers, kept, (16384, 4096, 512, 32, 1), strict=False):
            torch.testing.assert_close(known.gradients[0], after * start.sum())


def scaled(weights):
    """Layers that multiply by a weight each."""

    def layer(weight):
        return CapturableLayer(lambda hidden, settings: hidden * weight, [weight], lambda of_input, of_parameters: None)

    return [layer(weight) for weight in weights]


def test_recordings_of_several_shapes_lie_in_one_memory_and_give_each_its_own_results(cuda):
    weights = [torch.tensor(value, requires_grad=True) for value in (2.0, 4.0, 8.0)]
    graphs, layers = LayerGraphs(), scaled(weights)
    graphs.largest = 2 * 9 * 3
    shapes = [(2, 9, 3), (2, 5, 3), (1, 7, 3)]

    def run(h):
        for place, layer in enumerate(layers):
            h = graphs.run(place, layer, h, {})
        return h

    known = {}
    for _ in range(REPEATS + 1):
        for shape in shapes:
            run(torch.ones(shape, requires_grad=True))
            known[shape] = dict(graphs.captured)
    assert graphs.shapes == len(shapes) and all(len(one) == 3 for one in known.values())
    for place in range(3):
        of_place = [known[shape][place] for shape in shapes]
        assert len({one.output.data_ptr() for one in of_place}) == 1
        assert len({one.start.data_ptr() for one in of_place}) == 1
        assert len({one.gradients[0].data_ptr() for one in of_place}) == 1
        for one in of_place:
            replays(one, weights[place])
    assert not any(one._kept for shape in shapes[:-1] for one in known[shape].values())
    assert known[shapes[0]][0]._kept == [] and len(cuda.graphs) == 3 * 3 * 2
    for shape in [*shapes, *reversed(shapes)]:
        h = torch.randn(shape, requires_grad=True)
        found = run(h)
        assert torch.equal(found, h * 64)
        for weight in weights:
            weight.grad = None
        (to_h,) = torch.autograd.grad(found.sum(), h, retain_graph=False)
        assert torch.equal(to_h, torch.full_like(h, 64.0))
        torch.testing.assert_close(weights[0].grad, 32 * h.sum())


@pytest.mark.parametrize("grows", [False, True])
def test_memory_grows_for_a_larger_shape_where_it_can_or_is_made_anew(cuda, monkeypatch, grows):
    pool = [{"segment_pool_id": (0, 1), "is_expandable": grows}, {"segment_pool_id": (0, 0), "is_expandable": False}]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pool)
    weights = [torch.tensor(2.0, requires_grad=True)]
    graphs, (layer,) = LayerGraphs(), scaled(weights)
    small, large = torch.ones(1, 4, 3, requires_grad=True), torch.ones(1, 9, 3, requires_grad=True)
    for h in [small] * (REPEATS + 1):
        graphs.run(0, layer, h, {})
    assert graphs.shapes == 1
    graphs.expected = frozenset({9})
    graphs.run(0, layer, large, {})
    assert graphs.shapes == 1 + grows and graphs.captured[0].start.shape == large.shape
    graphs.run(0, layer, small, {})
    assert graphs.shapes == 2 and graphs.captured[0].start.shape == small.shape


def test_a_shape_that_has_no_room_is_left_alone_where_smaller_ones_had(cuda, monkeypatch, capsys):
    layer = scaled([torch.tensor(2.0, requires_grad=True)])[0]
    graphs = LayerGraphs()
    small, large = torch.ones(1, 4, 3, requires_grad=True), torch.ones(1, 9, 3, requires_grad=True)
    for _ in range(REPEATS + 2):
        graphs.run(0, layer, small, {})
    assert graphs.shapes == 1
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * 10**9)  # more than there is
    of_fixed_size = [{"segment_pool_id": "a pool", "is_expandable": False}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: of_fixed_size)
    for _ in range(2):
        graphs.run(0, layer, large, {})
        assert not graphs.captured
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    graphs.run(0, layer, small, {})
    assert graphs.shapes == 1 and graphs.captured
    assert capsys.readouterr().err.count("batches of one more shape are started kernel by kernel") == 1


def test_recordings_give_way_to_a_batch_that_has_no_room_beside_them(cuda, monkeypatch):
    layer = scaled([torch.tensor(2.0, requires_grad=True)])[0]
    graphs = LayerGraphs()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 10**8)  # of a step of nine tokens
    for _ in range(REPEATS + 1):
        graphs.run(0, layer, torch.ones(1, 9, 3, requires_grad=True), {})
    for tokens, free, shapes in ((4, 4 * 10**8, 1), (8, 2 * 10**8, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**9))
        graphs.run(0, layer, torch.ones(1, tokens, 3, requires_grad=True), {"cache": object()})
        assert graphs.shapes == shapes


def test_lists_of_kernels_leave_memory_free(cuda, monkeypatch, capsys):
    """What they take is known by the first of them, beside what torch holds."""
    layer = scaled([torch.tensor(2.0, requires_grad=True)])[0]
    graphs, free = LayerGraphs(), [LEFT_FREE + 4 * 10**8]
    graphs.expected = frozenset(range(1, 10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 10**9))
    for tokens in (9, 9, 9, 8, 7, 9):  # 100 MB each
        before = graphs.shapes
        graphs.run(0, layer, torch.ones(1, tokens, 3, requires_grad=True), {})
        free[0] -= 10**8 * (graphs.shapes - before)
    assert graphs.shapes == 3 and free[0] == LEFT_FREE + 10**8
    graphs.run(0, layer, torch.ones(1, 6, 3, requires_grad=True), {})
    assert graphs.shapes == 3 and not graphs.captured
    said = "one more shape are started kernel by kernel, not as CUDA graphs: recordings take 100.0 MB each"
    assert capsys.readouterr().err.count(said) == 1


def test_masks_of_recordings_lie_in_one_place(cuda):
    layer = scaled([torch.tensor(2.0, requires_grad=True)])[0]
    graphs, places = LayerGraphs(), set()
    for tokens in (9, 5, 7):
        for _ in range(REPEATS + 1):
            h, mask = torch.ones(1, tokens, 3, requires_grad=True), torch.ones(1, 1, tokens, tokens)
            graphs.run(0, layer, h, {"mask": mask, "angles": (mask[0], mask[0])})
        places.add(tuple(one.data_ptr() for one in graphs.captured[0].fixed.values()))
    assert graphs.shapes == 3 and len(places) == 1


def test_a_layer_that_comes_later_is_not_recorded_into_memory_that_others_may_use(cuda, capsys):
    weights = [torch.tensor(value, requires_grad=True) for value in (2.0, 4.0)]
    graphs, (first, second), h = LayerGraphs(), scaled(weights), torch.ones(1, 2, 3, requires_grad=True)
    for _ in range(REPEATS + 1):
        graphs.run(0, first, h, {})
    assert len(graphs.captured) == 1
    after = graphs.run(0, first, h, {})
    assert torch.equal(graphs.run(1, second, h, {}), h * 4)
    assert len(graphs.captured) == 1 and after is not None
    graphs.run(0, first, h, {})
    graphs.run(1, second, h, {})
    assert len(graphs.captured) == 2  # anew, both


def test_a_shape_that_memory_is_short_for_leaves_the_others_recorded(cuda, capsys):
    weight = torch.tensor(2.0, requires_grad=True)

    def compute(hidden, settings):
        if hidden.shape[1] > 2 and cuda.graphs and cuda.graphs[-2].calls == ["begin in a pool"]:
            cuda.graphs[-2].calls.append("failed")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return hidden * weight

    layer = CapturableLayer(compute, [weight], lambda of_input, of_parameters: None)
    graphs = LayerGraphs()
    for _ in range(REPEATS + 2):
        for tokens in (2, 5):
            h = torch.ones(1, tokens, 3, requires_grad=True)
            for place in (0, 1):
                found = graphs.run(place, layer, h, {})
                assert tokens == 2 or torch.equal(found, h * 2)
    assert graphs.shapes == 1
    said = capsys.readouterr().err
    assert said.count("one more shape are started kernel by kernel, not as CUDA graphs: CUDA out of memory") == 1


@pytest.mark.parametrize(("records_all", "taken"), [(True, "head"), (False, "layer")])
def test_what_is_not_recorded_needs_memory_of_its_own(cuda, capsys, records_all, taken):
    free, h = torch.cuda.mem_get_info()[0], torch.ones(1, 2, 3, requires_grad=True)
    for more, count in ((0, 1), (1, 0)):
        layers = LayerGraphs()
        layers.records_all, layers.beside = records_all, Beside()._replace(**{taken: free + more})
        for _ in range(REPEATS + 2):
            layers.run(0, DOUBLE, h, {})
        assert len(layers.captured) == count
    assert "what is not recorded 1.0 GB, and 1.0 GB are free" in capsys.readouterr().err


def captured(cuda, compute):
    """A layer of three numbers, recorded."""
    start = torch.ones(3, requires_grad=True)
    layer = CapturedLayer(None, {}, start, torch.empty(3), [], torch.ones(3))
    layer.capture(compute, GraphMemory("a pool", cuda.stream), lambda of_input, of_parameters: None)
    return layer


def test_both_passes_are_recorded(cuda):
    layer = captured(cuda, lambda x: 2 * x)
    assert [graph.calls for graph in cuda.graphs] == [["begin in a pool", "end"]] * 2
    assert layer.output.tolist() == layer.gradient.tolist() == [2, 2, 2]


def test_an_error_that_only_the_end_of_a_recording_tells_is_told(cuda):
    def compute(x):
        cuda.graphs[0].calls.append("failed")
        return 2 * x

    with pytest.raises(RuntimeError, match="previous error"):
        captured(cuda, compute)
    assert [graph.calls for graph in cuda.graphs] == [["begin in a pool", "failed", "end"], []]


def test_a_backward_pass_is_recorded_as_a_step_runs_it_without_autocast(cuda):
    seen = []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return 2 * grad

    with torch.autocast("cpu", torch.bfloat16):
        assert captured(cuda, Layer.apply).gradient.tolist() == [2, 2, 2]
    assert seen == [False]


def captured_weight(cuda, gradient):
    """A layer that doubles a weight, recorded while that has a gradient or none."""
    weight = torch.ones(3, requires_grad=True)
    weight.grad = gradient
    start, gradient = torch.zeros(3, requires_grad=True), torch.zeros(3)
    layer = CapturedLayer("a shape", {}, start, torch.empty(3), [weight], gradient)
    memory = GraphMemory("a pool", cuda.stream)
    layer.capture(lambda h: h + 2 * weight, memory, lambda of_input, of_parameters: None)
    return weight, layer


def test_gradients_that_stay_are_added_to_where_they_are(cuda):
    own = torch.zeros(3)
    weight, layer = captured_weight(cuda, own)
    assert layer.gradients[0] is own  # no second memory of its size
    own.fill_(1)
    layer.keep_gradients()
    assert weight.grad is own
    assert own.tolist() == [1, 1, 1]
    weight.grad = torch.full((3,), 4.0)
    layer.keep_gradients()
    assert weight.grad is own
    assert own.tolist() == [4, 4, 4]
    weight.grad = None
    layer.keep_gradients()
    assert weight.grad is own
    assert own.tolist() == [0, 0, 0]
    assert layer.hand_over() == [None]


def test_gradients_of_a_parameter_that_has_none_are_handed_over(cuda):
    weight, layer = captured_weight(cuda, None)
    assert layer.hand_over() == [None]
    assert weight.grad is layer.gradients[0]
    layer.keep_gradients()  # those of a micro-batch before this one
    assert weight.grad is not layer.gradients[0]


def test_several_processes_are_given_the_gradients(cuda, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    _, layer = captured_weight(cuda, torch.zeros(3))
    (given,) = layer.hand_over()
    assert given is layer.gradients[0]
