"""The importance matrix: how large the inputs of every linear layer are on calibration rows.

llama.cpp fits the blocks of a row to the error of the layer's output rather than of its weights; for that it wants the
mean squared input of each column (`tools/imatrix` in llama.cpp). The merged model is read and run one layer at a time;
one of a family that the kit has no rules for is run by llama.cpp, from the 16-bit file of its converter.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.bar import each
from qlora_kit.core.errors import RunError
from qlora_kit.formats.gguf.activations import mean_squared_inputs_in_llama_cpp
from qlora_kit.formats.gguf.architectures import find_architecture, has_own_rules
from qlora_kit.formats.gguf.llama_cpp import default_threads
from qlora_kit.formats.gguf.llama_library import LibraryUnusable
from qlora_kit.formats.gguf.metadata import read_full_config
from qlora_kit.formats.gguf.tensors import gguf_names
from qlora_kit.formats.gguf.whole_file import whole_gguf
from qlora_kit.weights.float_rows import find_tensors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from qlora_kit.formats.gguf.converter.convert import Conversion

Means = Mapping[str, "npt.NDArray[np.float32]"]


class ImportanceMatrix:
    """Mean squared inputs of a model's linear layers, measured when first asked for and kept.

    Args:
        model_dir: Hugging Face folder with 16- or 32-bit weights.
        rows: token ids of the calibration rows.
        conversion: of the folder; needed for families that the kit has no rules for.
    """

    def __init__(self, model_dir: Path, rows: Sequence[Sequence[int]], conversion: "Conversion | None" = None) -> None:
        self.model_dir = model_dir
        self.rows = rows
        self._conversion = conversion
        self.unseen: dict[str, int] = {}
        """How many experts of a tensor no row was given to, by its GGUF name; filled in with `means`."""

    @cached_property
    def means(self) -> Means:
        """By GGUF tensor name, float32 of shape [width], or [experts, width]; all above zero.

        Raises:
            RunError: an activation is not finite, or llama.cpp's library cannot be used where it is needed.
        """
        config = read_full_config(self.model_dir)
        if self._conversion is not None and not has_own_rules(config):
            return self._means_in_llama_cpp(self._conversion.file)
        found = mean_squared_inputs(self.model_dir, self.rows)
        names = gguf_names(found, find_architecture(config).name, config["num_hidden_layers"])
        return {names[source]: _usable(names[source], values.cpu().numpy()) for source, values in found.items()}

    def _means_in_llama_cpp(self, file: Path) -> Means:
        try:
            found = mean_squared_inputs_in_llama_cpp(file, self.rows, default_threads())
        except LibraryUnusable as error:
            raise RunError(f"no importance matrix can be measured: {error}", fix="imatrix: false") from error
        self.unseen = {name: count for name, values in found.items() if (count := _unseen(values))}
        means = {name: _of_experts(values) if values.ndim > 1 else values for name, values in found.items()}
        return {name: _usable(name, values) for name, values in means.items()}

    def add_metadata(self, writer: Any) -> None:
        """Say in a file's metadata what its blocks were fitted to, in the words of llama.cpp's quantizer."""
        writer.add_string("quantize.imatrix.dataset", "training rows and general text")
        writer.add_uint32("quantize.imatrix.entries_count", len(self.means))
        writer.add_uint32("quantize.imatrix.chunks_count", len(self.rows))

    def write(self, out_file: Path) -> None:
        """Write llama.cpp's own imatrix file, as `llama-quantize --imatrix` reads it; complete or absent."""
        import numpy as np

        tokens = sum(len(row) for row in self.rows)
        with whole_gguf(out_file, "", "writing an importance matrix") as writer:
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", ["training rows and general text"])
            writer.add_uint32("imatrix.chunk_count", len(self.rows))
            writer.add_uint32("imatrix.chunk_size", tokens // len(self.rows))
            for name, values in self.means.items():
                each_matrix = np.atleast_2d(values)
                writer.add_tensor(f"{name}.in_sum2", each_matrix * np.float32(tokens))
                writer.add_tensor(f"{name}.counts", np.full((len(each_matrix), 1), tokens, dtype=np.float32))


def _unseen(means: "npt.NDArray[np.float32]") -> int:
    """Experts that no calibration row was given to."""
    import numpy as np

    return int(np.isnan(means[:, 0]).sum()) if means.ndim > 1 else 0


def _of_experts(means: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    """Means of experts, those that no calibration row was given to taken from all the others."""
    import numpy as np

    unseen: npt.NDArray[np.bool_] = np.isnan(means[:, 0])
    if not unseen.any():
        return means
    if unseen.all():
        return np.ones_like(means)
    return np.where(unseen[:, None], means[~unseen].mean(axis=0), means)


def _usable(name: str, means: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    """Means without zeros: a column that no calibration row uses must still be representable.

    Raises:
        RunError: a mean is not finite.
    """
    import numpy as np

    if not np.isfinite(means).all():
        raise RunError(f"the inputs of {name} are not finite on the calibration rows")
    positive = means[means > 0]
    floor = positive.min() if len(positive) else np.float32(1.0)
    return np.maximum(means, floor)


def mean_squared_inputs(model_dir: Path, rows: Sequence[Sequence[int]]) -> "dict[str, Tensor]":
    """Mean over all tokens of the squared input of each linear layer inside the decoder layers.

    Only the embeddings, one layer and the rows' hidden states are in memory at a time, in 32 bits.

    Returns:
        name of the weight (`model.layers.0.mlp.up_proj.weight`) to float32 [width].
    """
    import torch
    from torch import nn

    from qlora_kit.export.layer_inputs import decoder_layers, first_inputs, run_layer
    from qlora_kit.export.streamed_model import empty_model, fill_weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored, model = find_tensors(model_dir), empty_model(model_dir)
    prefix, layers = decoder_layers(model)
    inside = f"{prefix}."
    fill_weights(model, (name for name in stored if not name.startswith(inside)), stored, torch.device("cpu"))
    means: dict[str, Tensor] = {}
    with torch.no_grad():
        calls = first_inputs(model, rows, device)
        for index in each(range(len(layers)), "importance matrix", "layer"):
            name, layer = f"{inside}{index}", layers[index]
            fill_weights(model, (source for source in stored if source.startswith(f"{name}.")), stored, device)
            watch = _SquareSums(layer)
            for call in calls:
                call.hidden = run_layer(layer, call, index)
            means |= {f"{name}.{linear}.weight": mean for linear, mean in watch.finish()}
            layers[index] = nn.Identity()
    return means


class _SquareSums:
    """Sums of squared inputs of a layer's linear modules, while it watches."""

    def __init__(self, layer: "nn.Module") -> None:
        from torch import nn

        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        self.handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in linears]

    def finish(self) -> "list[tuple[str, Tensor]]":
        """Stop watching; mean squares by module name."""
        for handle in self.handles:
            handle.remove()
        return [(name, (total / self.tokens[name]).float()) for name, total in self.sums.items()]

    def _hook(self, name: str) -> "Callable[[nn.Module, tuple[Tensor, ...]], None]":
        def hook(_: "nn.Module", inputs: "tuple[Tensor, ...]") -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares = rows.square().sum(0).double()
            self.sums[name] = self.sums[name] + squares if name in self.sums else squares
            self.tokens[name] = self.tokens.get(name, 0) + len(rows)

        return hook
