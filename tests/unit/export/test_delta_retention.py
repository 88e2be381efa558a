"""What is left of an update: known cases, and files of every layout read back weight by weight."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_kit.core.errors import RunError
from qlora_kit.export.delta_retention import (
    DeltaRetention,
    LayerRetention,
    quantization_noise,
    retained_fraction,
    survey,
)
from qlora_kit.formats.awq.layout import unpacked_weight
from qlora_kit.formats.awq.weights import without_factors
from qlora_kit.formats.gptq.write import write_gptq
from qlora_kit.formats.registry import find_format
from qlora_kit.schema.export import GptqMethod, GptqTarget
from qlora_kit.weights.reader import stored_tensors
from tests.dequantized import dequantized_weights
from tests.tiny_models import build_tiny_model

STEP = 0.1


def drawn(seed: int, size: float, *shape: int) -> Tensor:
    return size * torch.randn(*(shape or (256, 512)), generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor) -> Tensor:
    return (weight / STEP).round() * STEP


BETWEEN = drawn(0, 1.0)
ON_GRID = rounded(BETWEEN)


@pytest.mark.parametrize("base", [BETWEEN, ON_GRID])
def test_an_update_far_wider_than_the_steps_is_kept(base: Tensor) -> None:
    merged = base + drawn(1, 20 * STEP)
    assert retained_fraction(merged, base, rounded(merged)) == pytest.approx(1, abs=0.002)
    # A rounding error spread evenly over a step has the deviation step / sqrt(12).
    assert quantization_noise(merged, base, rounded(merged)) == pytest.approx(1 / 20 / 12**0.5, rel=0.02)


def test_a_small_update_of_a_base_on_the_grid_falls_back_to_it() -> None:
    merged = ON_GRID + drawn(1, 0.1 * STEP)
    assert retained_fraction(merged, ON_GRID, rounded(merged)) < 0.01
    assert quantization_noise(merged, ON_GRID, rounded(merged)) == pytest.approx(1, abs=0.01)


def test_the_same_small_update_is_kept_between_the_grid_s_values_under_loud_noise() -> None:
    merged = BETWEEN + drawn(1, 0.1 * STEP)
    # 131 072 weights, noise about three times the update: a standard error of 3 / sqrt(131 072).
    assert retained_fraction(merged, BETWEEN, rounded(merged)) == pytest.approx(1, abs=0.04)
    assert quantization_noise(merged, BETWEEN, rounded(merged)) == pytest.approx(10 / 12**0.5, rel=0.02)


def test_by_hand() -> None:
    base, merged = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [0.0, -2.0]])
    file = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # <Q - W, D> = 1 + 2 = 3; <D, D> = 9; E = (0, -1, 1, 2), ||E||^2 = 6.
    assert retained_fraction(merged, base, file) == pytest.approx(1 / 3)
    assert quantization_noise(merged, base, file) == pytest.approx((6 / 9) ** 0.5)
    assert retained_fraction(merged, base, merged) == 1
    assert retained_fraction(merged, base, base) == 0
    assert retained_fraction(base, base, file) != retained_fraction(base, base, file)


def test_many_rows_are_measured_in_pieces() -> None:
    base, merged = drawn(0, 1.0, 2500, 8), drawn(1, 1.0, 2500, 8)
    file = base.clone()
    file[2000:] = merged[2000:]
    update = (merged - base).square()
    assert retained_fraction(merged, base, file) == pytest.approx(float(update[2000:].sum() / update.sum()))


def folder_of(place: Path, tensors: dict[str, Tensor]) -> Path:
    place.mkdir()
    save_file(tensors, place / "model.safetensors")
    return place


def test_a_survey_weighs_layers_by_their_updates_and_reads_only_what_it_needs(tmp_path: Path) -> None:
    base = {"a.weight": torch.zeros(4, 4), "b.weight": torch.zeros(4, 4), "c.weight": torch.ones(4, 4)}
    merged = {"a.weight": torch.full((4, 4), 2.0), "b.weight": torch.ones(4, 4), "c.weight": torch.ones(4, 4)}
    file = {"a.weight": torch.full((4, 4), 2.0), "b.weight": torch.full((4, 4), 0.5), "c.weight": torch.zeros(4, 4)}
    folder = folder_of(tmp_path / "merged", merged | {"norm.weight": torch.ones(4), "frozen.weight": torch.ones(2, 2)})
    asked: list[str] = []

    def stored(name: str) -> Tensor | None:
        asked.append(name)
        return file.get(name)

    done: list[str] = []
    found = survey(folder, base.get, stored, done.append)
    assert [(layer.name, layer.kept, layer.noise) for layer in found.layers] == [
        ("a.weight", 1.0, 0.0),
        ("b.weight", 0.5, 0.5),
    ]
    # <D, D> is 64 and 16.
    assert found.kept == pytest.approx((64 * 1 + 16 * 0.5) / 80)
    assert found.noise == pytest.approx((16 * 0.25 / 80) ** 0.5)
    assert found.worst.name == "b.weight"
    assert "frozen.weight" not in asked
    assert done == ["a.weight", "b.weight", "c.weight"]


def test_a_survey_that_can_compare_nothing_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "merged", {"a.weight": torch.ones(4, 4)})
    with pytest.raises(RunError, match="no weight that the adapter changed could be compared"):
        survey(folder, lambda _: None, lambda _: None)
    with pytest.raises(RunError, match=r"'a.weight' has the shapes \(4, 4\) and \(4, 4\) and \(2, 8\)"):
        survey(folder, lambda _: torch.zeros(4, 4), lambda _: torch.zeros(2, 8))


def test_an_adapted_weight_that_the_file_lacks_is_no_detail(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "merged", {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)})
    held = {"a.weight": torch.ones(4, 4)}
    with pytest.raises(RunError, match=r"the file holds no weight for 'b\.weight', which the adapter changed"):
        survey(folder, lambda _: torch.zeros(4, 4), held.get)
    unread: list[str] = []
    found = survey(folder, lambda _: torch.zeros(4, 4), held.get, unread=unread)
    assert [one.name for one in found.layers] == ["a.weight"]
    assert unread == ["b.weight"]


def layer(name: str, kept: float) -> LayerRetention:
    return LayerRetention(name, kept, 1.0, 0.01, 1.0)


def test_the_warning_names_the_worst_layers_and_what_to_do() -> None:
    found = DeltaRetention((layer("a", 0.9), layer("b", 0.1), layer("c", 0.02), layer("d", 0.3), layer("e", 0.2)))
    warning = found.warning("q4")
    assert warning is not None
    assert warning.startswith("q4 keeps 30% of what was learned; 4 of 5 weights keep less than 50%: c 2%, b 10%, e 20%")
    for remedy in ("more bits", "group_size: 32", "export.merge_base=original", "adapter apart"):
        assert remedy in warning
    assert found.warning("q4", 0.01) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and the same with an update of rank 4 in every linear layer, both in bfloat16."""
    place = tmp_path_factory.mktemp("survival")
    base = build_tiny_model("llama", place / "base", dtype=torch.bfloat16)
    merged = build_tiny_model("llama", place / "merged", dtype=torch.bfloat16)
    tensors = load_file(merged / "model.safetensors")
    for seed, name in enumerate(sorted(tensors)):
        if name.endswith("proj.weight"):
            out_features, in_features = tensors[name].shape
            update = drawn(seed, 0.05, out_features, 4) @ drawn(seed + 100, 0.05, 4, in_features)
            tensors[name] = (tensors[name].float() + update).bfloat16()
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    return base, merged


ROWS = [[(7 * step * step + 13 * row) % 600 for step in range(48)] for row in range(6)]


def gptq_file(merged: Path, out: Path) -> Path:
    out.mkdir()
    write_gptq(merged, out, GptqTarget(4, 64), ROWS)
    return out


def rounding_file(merged: Path, out: Path, bits: int = 8) -> Path:
    out.mkdir()
    write_gptq(merged, out, GptqTarget(bits, 64, method=GptqMethod.rounding), [])
    return out


def awq_file(layout: str) -> Callable[[Path, Path], Path]:
    def write(merged: Path, out: Path) -> Path:
        from qlora_kit.formats.awq.write import write_awq
        from qlora_kit.schema.export import AwqLayout, AwqTarget

        out.mkdir()
        write_awq(merged, out, AwqTarget(group_size=64, layout=AwqLayout[layout]), ROWS)
        return out

    return write


def gguf_file(mix: str) -> Callable[[Path, Path], Path]:
    def write(merged: Path, out: Path) -> Path:
        from qlora_kit.formats.gguf.writer import write_gguf

        write_gguf(merged, out.with_suffix(".gguf"), mix)
        return out.with_suffix(".gguf")

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "noise"),
    [
        (gptq_file, 10),
        (rounding_file, 0.3),
        (awq_file("gemm"), 10),
        (awq_file("gemv"), 10),
        (gguf_file("Q8_0"), 0.3),
        (gguf_file("Q4_K_M"), 5),
        (lambda merged, _: merged, 1e-9),
    ],
    ids=["gptq", "rounding", "awq", "awq_gemv", "q8_0", "q4_k_m", "16_bit"],
)
def test_files_of_every_layout_keep_the_update(
    write: Callable[[Path, Path], Path], noise: float, made: tuple[Path, Path], tmp_path: Path
) -> None:
    base, merged = made
    artifact = write(merged, tmp_path / "out")
    found = survey(merged, stored_tensors(base), dequantized_weights(artifact, merged))
    assert len(found.layers) == 14
    assert found.kept == pytest.approx(1, abs=0.1)
    assert found.worst.kept > 0.6
    assert found.noise < noise
    assert found.warning("file") is None
    # The same file, asked about a base whose file it is not: nothing is kept of an update that it has not.
    none = survey(merged, stored_tensors(base), dequantized_weights(write(base, tmp_path / "other"), base))
    assert none.kept < 0.2
    assert none.warning("file") is not None


@pytest.mark.slow
def test_what_the_warning_advises_keeps_more_where_the_base_lies_on_the_grid(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = made
    on_grid = dequantized_weights(rounding_file(source, tmp_path / "grid", bits=4), source)
    base, merged = (build_tiny_model("llama", tmp_path / name) for name in ("base", "merged"))
    for folder, size in ((base, 0.0), (merged, 0.0005)):
        tensors = load_file(folder / "model.safetensors")
        for seed, name in enumerate(sorted(tensors)):
            if name.endswith("proj.weight") and (weight := on_grid(name)) is not None:
                out_features, in_features = weight.shape
                tensors[name] = weight + size * drawn(seed, 1, out_features, 4) @ drawn(seed + 100, 1, 4, in_features)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = {}
    for name, write in {
        "rounding": lambda out: rounding_file(merged, out, bits=4),
        "gptq": lambda out: gptq_file(merged, out),
        "8 bit": lambda out: rounding_file(merged, out),
    }.items():
        found = survey(merged, stored_tensors(base), dequantized_weights(write(tmp_path / name), merged))
        assert (found.warning(name) is not None) == (name != "8 bit")
        kept[name] = found.kept
    assert kept["rounding"] < 0.3
    assert kept["gptq"] > kept["rounding"] + 0.05  # measured: 0.22 and 0.13
    assert kept["8 bit"] > 0.9


def test_fitted_factors_are_the_ones_that_were_multiplied_in() -> None:
    weight, noise = drawn(0, 1.0), drawn(1, 0.05)
    rows, columns = drawn(2, 1.0, 256, 1).exp(), drawn(3, 1.0, 1, 512).exp()
    columns[0, 0] = 0
    found = without_factors((weight + noise) * rows * columns, weight)
    # A factor fitted to n weights is off by the noise over the root of n: a sixteenth of it here.
    assert float((found - weight - noise)[:, 1:].norm() / noise.norm()) < 0.15
    assert torch.equal(found[:, 0], torch.zeros(256))


@pytest.mark.slow
def test_awq_s_factors_are_taken_out(tmp_path: Path) -> None:
    merged = build_tiny_model("llama", tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    for name in tensors:
        if name.endswith("layernorm.weight"):
            # Channels that are worth a factor.
            tensors[name][::16] *= 20
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    artifact = awq_file("gemm")(merged, tmp_path / "out")
    read, packed = dequantized_weights(artifact, merged), stored_tensors(artifact)
    left_in = []
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.1.{name}"
        ours, source = read(f"{module}.weight"), tensors[f"{module}.weight"]
        assert ours is not None
        # 4 bits in groups of 64 cost about a tenth, and a little more where a factor favors other channels.
        assert float((ours - source).norm() / source.norm()) < 0.25
        kinds = {kind: packed(f"{module}.{kind}") for kind in ("qweight", "qzeros", "scales")}
        raw = unpacked_weight({kind: tensor for kind, tensor in kinds.items() if tensor is not None}, 64)
        left_in.append(float((raw - source).norm() / source.norm()))
    assert max(left_in) > 0.4


@pytest.mark.parametrize("name", ["merged", "compressed", "adapter", "adapter_gguf"])
def test_formats_whose_weights_are_not_read_back(tmp_path: Path, name: str) -> None:
    assert find_format(name).dequantized_weights(tmp_path, tmp_path) is None


def test_weights_are_taken_together_by_kind() -> None:
    layers = [
        LayerRetention(f"model.layers.{number}.self_attn.{kind}.weight", kept, 0.0, 0.01, 1.0)
        for number, kept in enumerate((0.9, 0.5))
        for kind in ("q_proj", "o_proj")
    ]
    kinds = DeltaRetention(tuple(layers)).by_kind()
    assert list(kinds) == ["q_proj", "o_proj"]
    assert [layer.name for layer in kinds["q_proj"].layers] == [layers[0].name, layers[2].name]
    assert kinds["o_proj"].worst == layers[3]


def test_the_other_base_is_advised_where_it_is_another() -> None:
    lost = DeltaRetention((LayerRetention("q_proj.weight", 0.1, 0.0, 0.01, 1.0),))
    assert "export.merge_base=original" in str(lost.warning("q4"))
    advice = str(replace(lost, is_on_original=True).warning("q4"))
    assert "export.merge_base" not in advice and "  or       keep the adapter apart" in advice
