"""Recorded layers give the numbers of layers that are started kernel by kernel, and never those of another batch."""

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.packed import enable_packed_attention
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.graphs.capture_schedule import REPEATS
from qlora_kit.engine.graphs.captured_layer import GraphMemory, _capture, _keep_random_state
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.model.load import load_base
from qlora_kit.objectives.sft.collate import Collator, PackedCollator, StaticBatchShape, feature
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import Attention
from qlora_kit.schema.quant import QuantConfig
from tests.drawn_rows import drawn_rows
from tests.tiny_models import FAMILIES, WIRED, build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 6  # more than two, so that the memory of one layer is reused by others
# Of those layers, where not all are: what mixes tokens in the place of attention is none of them, nor is a layer with
# an input of its own, or with an MLP that the engine does not know.
RECORDED = {"qwen3_5": 1, "lfm2": 3, "granite_hybrid": 3, "gemma4_e": 0, "apertus": 0}
LENGTHS = [93, 41, 70, 12, 88, 93, 20, 55, 93, 30, 61, 5]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "store", LENGTHS, seed=3)


@pytest.fixture(scope="module", params=[*FAMILIES, *WIRED])
def family(request):
    torch.compiler.reset()  # each family compiles its own shapes, and a process keeps eight of a function
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    place = tmp_path_factory.mktemp(family) / "base"
    return build_tiny_model(family, place, spread=0.05, dtype=torch.bfloat16, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama") / "base"
    return build_tiny_model("llama", place, spread=0.05, dtype=torch.bfloat16, num_hidden_layers=LAYERS)


def load(folder):
    model = attach_lora(load_base(folder, QuantConfig()), LoraConfig(r=16, alpha=16)).train()
    train_in_fp32(model)
    generator = torch.Generator().manual_seed(1)
    for part in model.parameters():
        if part.requires_grad:
            part.data = (torch.randn(part.shape, generator=generator) / part.shape[-1] ** 0.5).to(part.device)
    return model


def engine_of(model, **settings):
    return patch_model(model, EngineConfig(mode=EngineMode.fast, **settings))


def on_gpu(batch):
    return {name: part.to("cuda") if isinstance(part, torch.Tensor) else part for name, part in batch.items()}


def padded(rows, indices):
    return on_gpu(Collator(0)([feature(rows, [index]) for index in indices]))


def loss_of(model, batch):
    batch = dict(batch)
    labels = batch.pop("labels")
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(**batch, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return torch.cat([part.grad.flatten() for part in model.parameters() if part.requires_grad])


def record(model, engine, batch, family="llama"):
    for _ in range(REPEATS + 1):
        gradients(model, batch)
    assert_recorded(engine, family)


def assert_recorded(engine, family="llama"):
    assert len(engine.graphs.captured) == RECORDED.get(family, LAYERS)


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def same(found, expected):
    assert off(found, expected) < 1e-3


BATCHES = [[0, 1, 2, 3], [5, 4, 6, 7], [8, 9, 10, 11], [0, 4, 5, 8]]  # each 93 tokens wide


# The last: inputs of the first layers lie on the host, and where they lay, others are written meanwhile.
@pytest.mark.parametrize("policies", [[0] * LAYERS, [1] * LAYERS, [2] * LAYERS, [3] * LAYERS, [3, 3, 3, 2, 2, 0]])
def test_other_rows_of_the_same_shape_give_the_gradients_that_they_give_unrecorded(family, folder, rows, policies):
    model = load(folder)
    batches = [padded(rows, indices) for indices in BATCHES]
    engine = engine_of(model, cuda_graphs=False)
    engine.set_policies(policies)
    expected = [gradients(model, batch) for batch in batches]
    engine.undo()
    engine = engine_of(model)
    engine.set_policies(policies)
    record(model, engine, batches[0], family)
    for batch, wanted in zip(batches, expected, strict=True):
        same(gradients(model, batch), wanted)
    assert_recorded(engine, family)


@pytest.mark.parametrize("compute", [Compute.fp8_backward, Compute.fp8])
def test_fp8_is_recorded_too(llama, rows, compute):
    model = load(llama)
    batches = [padded(rows, indices) for indices in BATCHES]
    engine = engine_of(model, cuda_graphs=False, compute=compute)
    expected = [gradients(model, batch) for batch in batches]
    engine.undo()
    engine = engine_of(model, compute=compute)
    record(model, engine, batches[0])
    for batch, wanted in zip(batches, expected, strict=True):
        same(gradients(model, batch), wanted)


def test_gradients_add_up_over_micro_batches_and_weights_may_change(llama, rows):
    model = load(llama)
    batches = [padded(rows, indices) for indices in BATCHES]
    engine = engine_of(model)
    record(model, engine, batches[0])
    first, second = gradients(model, batches[1]), gradients(model, batches[2])
    model.zero_grad()
    for batch in batches[1:3]:
        loss_of(model, batch).backward()
    same(torch.cat([part.grad.flatten() for part in model.parameters() if part.requires_grad]), first + second)
    with torch.no_grad():
        for part in model.parameters():
            if part.requires_grad:
                part.mul_(1.5)
    moved = gradients(model, batches[1])
    engine.undo()
    engine_of(model, cuda_graphs=False)
    same(moved, gradients(model, batches[1]))


def test_gradients_that_stay_from_step_to_step_are_added_to_in_place(family, folder, rows):
    model = load(folder)
    batches = [padded(rows, indices) for indices in BATCHES]
    engine = engine_of(model, cuda_graphs=False)
    expected = sum(gradients(model, batch) for batch in batches[1:3])
    engine.undo()
    engine = engine_of(model)
    places = {part: torch.zeros_like(part) for part in model.parameters() if part.requires_grad}

    def accumulated(some):
        for part, place in places.items():
            part.grad = place.zero_()
        for batch in some:
            loss_of(model, batch).backward()
        assert all(part.grad is place for part, place in places.items())
        return torch.cat([place.flatten() for place in places.values()])

    for _ in range(REPEATS + 1):
        accumulated(batches[:1])
    assert_recorded(engine, family)
    same(accumulated(batches[1:3]), expected)


def test_shapes_that_come_again_are_recorded_each_in_the_memory_of_the_largest(llama, rows):
    model = load(llama)
    batches = [padded(rows, indices) for indices in ([0, 1, 2, 3], [1, 3, 7], [10, 11], [2, 9])]
    engine = engine_of(model, cuda_graphs=False)
    expected = [gradients(model, batch) for batch in batches]
    engine.undo()
    engine = engine_of(model)
    engine.graphs.largest = 4 * 93 * model.config.hidden_size
    record(model, engine, batches[0])
    alone = torch.cuda.memory_allocated()
    for _ in range(2):
        for batch, wanted in zip(batches, expected, strict=True):
            same(gradients(model, batch), wanted)
    assert engine.graphs.shapes == len(batches)
    print(f"{torch.cuda.memory_allocated() / alone:.3f} of the memory with one shape")
    assert torch.cuda.memory_allocated() < 1.05 * alone
    for batch, wanted in zip(reversed(batches), reversed(expected), strict=True):
        same(gradients(model, batch), wanted)
        assert_recorded(engine)


def test_shapes_that_grow_are_recorded_in_one_memory(llama, rows):
    model = load(llama)
    batches = [padded(rows, indices) for indices in ([11], [2, 9], [1, 3, 7], [0, 1, 2, 3])]
    engine = engine_of(model, cuda_graphs=False)
    expected = [gradients(model, batch) for batch in batches]
    engine.undo()
    engine = engine_of(model)
    for _ in range(REPEATS + 2):
        for batch, wanted in zip(batches, expected, strict=True):
            same(gradients(model, batch), wanted)
    assert engine.graphs.shapes == len(batches)


def test_a_shape_that_cannot_be_recorded_leaves_the_others_as_they_are(llama, rows):
    model = load(llama)
    batches = [padded(rows, indices) for indices in ([0, 1, 2, 3], [10, 11], [1, 3, 7])]
    engine = engine_of(model, cuda_graphs=False)
    expected = [gradients(model, batch) for batch in batches]
    engine.undo()
    engine = engine_of(model)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    third = engine.layers[2]
    whole = third._fast

    def waits(hidden, settings, **more):
        if len(hidden) == 2 and torch.cuda.is_current_stream_capturing():
            hidden.sum().item()
        return whole(hidden, settings, **more)

    vars(third)["_fast"] = waits
    record(model, engine, batches[0])
    for _ in range(4):  # it comes, fails, fails again and takes the others with it, and is left
        for batch, wanted in zip(batches, expected, strict=True):
            same(gradients(model, batch), wanted)
    assert engine.graphs.shapes == 2
    model.zero_grad()
    engine.graphs.release()
    torch.cuda.empty_cache()
    print(f"{(torch.cuda.memory_reserved() - before) / 2**20:.0f} MiB more than before")
    assert torch.cuda.memory_reserved() < before + 2**26


def test_evaluation_gives_the_memory_back(llama, rows):
    model = load(llama)
    engine = engine_of(model)
    batch = padded(rows, BATCHES[0])
    wanted = gradients(model, batch)
    record(model, engine, batch)
    same(gradients(model, batch), wanted)
    model.eval()
    with torch.no_grad():
        loss_of(model, batch)
    assert not engine.graphs.captured


def test_a_backward_pass_after_another_forward_pass_is_refused(llama, rows):
    model = load(llama)
    engine = engine_of(model)
    batch = padded(rows, BATCHES[0])
    record(model, engine, batch)
    first = loss_of(model, batch)
    loss_of(model, padded(rows, BATCHES[1]))
    with pytest.raises(RuntimeError, match=r"the backward pass of an earlier forward pass.*engine\.cuda_graphs=false"):
        first.backward()


def test_packed_batches_of_other_samples_are_one_shape(family, folder, rows):
    model = load(folder)
    enable_packed_attention(model.get_base_model(), Attention.sdpa)
    bins = [[0, 1, 2], [5, 4, 6], [8, 9, 10, 11], [3, 7]]
    plain = [on_gpu(PackedCollator()([feature(rows, indices)])) for indices in bins]
    if family == "gemma2":  # its scores have a cap, which keeps no samples apart
        with pytest.raises(RunError, match="softcap"):
            gradients(model, plain[0])
        return
    collate = PackedCollator(256, 0, StaticBatchShape(8, 93))
    same_shape = [on_gpu(collate([feature(rows, indices)])) for indices in bins]
    engine = engine_of(model, cuda_graphs=False)
    masked = [gradients(model, batch) for batch in plain]
    engine.undo()
    enable_row_attention(model.get_base_model())
    engine = engine_of(model, cuda_graphs=False)
    expected = [gradients(model, batch) for batch in plain]
    spread = max(map(off, [gradients(model, batch) for batch in plain], expected))  # flash sums in any order
    engine.undo()
    engine = engine_of(model)
    record(model, engine, same_shape[0], family)
    for batch, wanted, by_mask in zip(same_shape, expected, masked, strict=True):
        found = gradients(model, batch)
        print(f"{family}: {off(found, wanted):.5f}, spread {spread:.5f}, by a mask {off(found, by_mask):.5f}")
        assert off(found, wanted) < max(5e-3, 2 * spread)  # sums over more tokens, which are zeros
        assert off(found, by_mask) < 2e-2
    assert_recorded(engine, family)


def test_after_a_failed_recording_random_numbers_go_on():
    torch.cuda.manual_seed(3)
    expected = torch.rand(5, device="cuda")
    memory = GraphMemory(torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    found = torch.zeros(1, device="cuda")
    torch.cuda.manual_seed(3)
    with (
        torch.cuda.stream(memory.stream),
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        _keep_random_state(),
        _capture(torch.cuda.CUDAGraph(), memory),
    ):
        found.item()
    assert torch.equal(torch.rand(5, device="cuda"), expected)
