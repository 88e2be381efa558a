"""How much the loss cares for each weight: the diagonal of the Fisher information on calibration rows.

An error e in the weights raises the loss by about half the sum of F e^2, F being the mean squared gradient of a weight
(Hassibi & Stork 1992; for rounding, Kim et al. 2023). The labels are drawn from the model's own predictions: then F is
the curvature of the KL divergence from the model, whatever rows it was trained on; of rows that it knows by heart, the
true labels would leave no gradient at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.core.console.bar import Bar, bar
from qlora_kit.core.console.lines import log
from qlora_kit.export.layer_inputs import Call, decoder_layers, first_inputs, layers_answered, run_layer
from qlora_kit.export.streamed_model import drop_weights, empty_model, fill_head, fill_weights, weights_by_model_names
from qlora_kit.weights.float_rows import FloatRows

MOST_STATE_BYTES = 2 << 30
_STATE_BYTES = 2  # a number of a hidden state, kept in bfloat16
_SEED = 0


@dataclass(frozen=True)
class MeasuredLinear:
    """A linear layer: its name, its weight and the Fisher information of each, float32 [out_features, in_features].

    `fisher` is per predicted token, so that half its product with squared errors is in nats a token. `moment` is the
    mean product of two inputs, float32 [in_features, in_features], where it was asked for.
    """

    name: str
    weight: Tensor
    fisher: Tensor
    moment: Tensor | None = None


class Fisher:
    """Measures the linear layers inside a model's decoder layers, last layer first.

    The weights of one layer are in memory at a time, in 32 bits, with as many numbers of Fisher information; beside
    them the embeddings, the head, and what flowed between the layers: at most 2 GiB, for which rows are left out, and
    said to be, where there are more.

    Args:
        model_dir: Hugging Face folder with 16- or 32-bit weights.
        rows: token ids of the calibration rows.
        with_moments: measure the inputs too; their moments are held for one layer at a time.
    """

    def __init__(self, model_dir: Path, rows: Sequence[Sequence[int]], *, with_moments: bool = False) -> None:
        self.with_moments = with_moments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = empty_model(model_dir)
        self.stored: dict[str, FloatRows] = weights_by_model_names(self.model, model_dir)
        self.prefix, self.layers = decoder_layers(self.model)
        inside = f"{self.prefix}."
        outer = (name for name in self.stored if not name.startswith(inside))
        fill_weights(self.model, outer, self.stored, torch.device("cpu"))
        text = self.model.config.get_text_config()
        self.rows = fitting_rows(rows, _STATE_BYTES * text.hidden_size * len(self.layers))

    def linears(self) -> Iterator[MeasuredLinear]:
        """Every linear layer once."""
        tokens = sum(len(row) for row in self.rows)
        with bar("bits budget", 2 * len(self.layers), "layer") as one:
            calls, states = self._forward(one)
            gradients = self._head_gradients(calls)
            for index in reversed(range(len(self.layers))):
                layer = self._filled(index)
                sums = {name: _Sums(module, self.with_moments) for name, module in _linears(layer)}
                _run_backward(layer, index, calls, states[index], gradients, sums)
                for name, module in _linears(layer):
                    moment = sums[name].moment
                    yield MeasuredLinear(
                        f"{self.prefix}.{index}.{name}",
                        module.weight,
                        sums[name].squares / tokens,
                        None if moment is None else moment / tokens,
                    )
                drop_weights(layer)
                one.advance()

    @torch.no_grad()
    def _forward(self, one: Bar) -> tuple[list[Call], list[list[Tensor]]]:
        """Run all layers; the calls hold the last hidden states, the lists those that each layer was given."""
        calls = first_inputs(self.model, self.rows, self.device)
        states: list[list[Tensor]] = []
        for index in range(len(self.layers)):
            layer = self._filled(index)
            states.append([call.hidden.to("cpu", torch.bfloat16) for call in calls])
            for call in calls:
                call.hidden = run_layer(layer, call, index)
            drop_weights(layer)
            one.advance()
        return calls, states

    def _filled(self, index: int) -> nn.Module:
        inside = f"{self.prefix}.{index}."
        fill_weights(self.model, (n for n in self.stored if n.startswith(inside)), self.stored, self.device)
        return self.layers[index]

    def _head_gradients(self, calls: Sequence[Call]) -> list[Tensor]:
        """Of each row's loss, summed over its tokens, by the hidden states that leave the last layer."""
        generator = torch.Generator(self.device).manual_seed(_SEED)
        fill_head(self.model, self.stored, self.device)
        found: list[Tensor] = []
        leaves = [call.hidden.detach().requires_grad_() for call in calls]
        with layers_answered(self.layers, lambda _, __: leaves[len(found)], in_tuple=calls[0].in_tuple):
            self.model.to(device=self.device, dtype=torch.float32)
            for row, leaf in zip(self.rows, leaves, strict=True):
                ids = torch.tensor([list(row)], device=self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
                found.append(torch.autograd.grad(loss, leaf)[0])
        return found


def fitting_rows(rows: Sequence[Sequence[int]], bytes_per_token: int) -> list[Sequence[int]]:
    """The rows, or so many of them, evenly taken, that their hidden states stay within 2 GiB; one at least."""
    share = MOST_STATE_BYTES / max(1, bytes_per_token * sum(len(row) for row in rows))
    if share >= 1:
        return list(rows)
    count = max(1, int(len(rows) * share))
    log.info(f"bits budget: measured on {count} of {len(rows)} calibration rows, to stay within 2 GiB of hidden states")
    return [rows[index * len(rows) // count] for index in range(count)]


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


class _Sums:
    """What is added up over rows for one linear layer: squared gradients of its weight, products of its inputs."""

    def __init__(self, module: nn.Linear, with_moment: bool) -> None:
        width = module.in_features
        self.squares = torch.zeros_like(module.weight)
        self.moment = module.weight.new_zeros(width, width) if with_moment else None
        self.handle = module.register_forward_hook(self._hook)

    def _hook(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0].detach().flatten(0, -2)
        if self.moment is not None:
            self.moment.addmm_(given.T, given)

        def backward(gradient: Tensor) -> None:
            of_weight = gradient.flatten(0, -2).T @ given
            self.squares.addcmul_(of_weight, of_weight)

        output.register_hook(backward)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _run_backward(
    layer: nn.Module,
    index: int,
    calls: Sequence[Call],
    states: Sequence[Tensor],
    gradients: list[Tensor],
    sums: Mapping[str, _Sums],
) -> None:
    """Run a layer forward and backward over all rows; `gradients` of its outputs become those of its inputs."""
    try:
        for row, call in enumerate(calls):
            call.hidden = states[row].to(gradients[row]).requires_grad_()
            with torch.enable_grad():
                output = run_layer(layer, call, index)
            gradients[row] = torch.autograd.grad(output, call.hidden, gradients[row])[0]
            call.hidden = call.hidden.detach()
    finally:
        for each in sums.values():
            each.handle.remove()
