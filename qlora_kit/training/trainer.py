"""TRL's trainer with the kit's order of rows and a held-out loss that is a mean over tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from qlora_kit.adapter.attach import train_in_fp32
from qlora_kit.adapter.saved import BaseName, name_base
from qlora_kit.core.errors import RunError
from qlora_kit.data.order import SamplerOrder
from qlora_kit.engine.head import enable_fused_head
from qlora_kit.engine.layer.fast import FastEngine
from qlora_kit.objectives.objective import Objective
from qlora_kit.objectives.sft.collate import CountingCollator
from qlora_kit.training.callbacks import MetricsCallback
from qlora_kit.training.checkpoint import whole_or_none
from qlora_kit.training.checkpoint_contents import told_as_foreign
from qlora_kit.training.epoch_sampler import EpochSampler
from qlora_kit.training.finite import refuse_weights_not_finite
from qlora_kit.training.halving import Halving
from qlora_kit.training.optimizers.flat import FlatOptimizer, flat
from qlora_kit.training.optimizers.groups import Groups
from qlora_kit.training.same_loss import refuse_another_loss


@dataclass(frozen=True)
class _Waiting:
    """What is to be logged of a step, on its way from the device.

    Attributes:
        values: float64 in the host's memory: loss, gradient norm, the objective's sums.
        arrived: when they are there; None on a CPU.
        steps: since the last log.
    """

    values: torch.Tensor
    arrived: torch.cuda.Event | None
    steps: int
    learning_rate: float
    start_time: float


class KitTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's trainer over rows that the kit prepared.

    Attributes:
        objective: what is learned.
        callback: sees every step.
        order: of the training items.
        undo: what takes off the model again what was put on it for training.
        engine: of the decoder layers; None where they run plain.
        logs_late: a step is logged while the next one runs.
        tells_counts: the model's forward takes `trained_tokens` of a batch.
        base: as saved adapters name it.
        groups: of trained weights with rates of their own; None where all learn at one.
    """

    _globalstep_last_logged: int

    def __init__(  # noqa: PLR0913  # what TRL's trainer takes, and what the kit adds
        self,
        model: PeftModel,
        settings: SFTConfig,
        objective: Objective,
        *,
        train: Dataset,
        held_out: Dataset | None,
        collator: CountingCollator,
        tokenizer: Any,
        callback: MetricsCallback,
        order: SamplerOrder,
        base: BaseName,
        groups: Callable[[PeftModel], Groups] | None = None,
        undo: Sequence[Callable[[], None]] = (),
        engine: FastEngine | None = None,
    ) -> None:
        """Build TRL's trainer, then put on the model what goes over TRL's own forward pass.

        Args:
            model: base with an adapter attached; attention and layers are what they shall be in training.
            undo: what puts the model's own attention and layers back.
        """
        self._modules: tuple[torch.nn.Module, ...] = ()  # as they were when the model was put into training mode
        self._waiting: _Waiting | None = None
        self._halving, self._unread_before = Halving(), 0
        self.objective = objective
        self.callback, self.order, self.base, self.groups, self.engine = callback, order, base, groups, engine
        self.logs_late = torch.cuda.is_available()
        super().__init__(
            model=model,
            args=settings,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[callback],
        )
        self.remove_callback(PrinterCallback)
        train_in_fp32(model)
        head = enable_fused_head(model.get_base_model())
        refuse_another_loss(model)
        self.tells_counts = head is not None
        self.undo: Sequence[Callable[[], None]] = [*undo, *([] if head is None else [head])]

    @cached_property
    def _unread(self) -> list[torch.Tensor]:
        """The objective's sums of each batch since the last log, on the device."""
        return []

    def create_model_card(self, *arguments: object, **settings: object) -> None:
        """Nothing: TRL's card of a checkpoint tells less than the run's own files do."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        name_base(Path(output_dir or str(self.args.output_dir)), self.base)

    def restore_model(self) -> None:
        """Take everything off the model that was put on it for training; for when the trainer is not needed again."""
        for undo in reversed(self.undo):
            undo()
        self.undo = ()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with told_as_foreign(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with told_as_foreign(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with told_as_foreign(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def take_up(self, checkpoint: Path) -> None:
        """Stand where a checkpoint does: its trained weights, and what was logged until then.

        Raises:
            NotFiniteError: one of its weights is not finite.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        refuse_weights_not_finite(self.model, self.state.global_step)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One micro-batch forward and backward; its loss, detached.

        transformers puts every module into training mode before every batch, and the GPU waits for that: 5 ms for the
        3,000 modules of an 8B model. Here that is done where a module is found in the other mode.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, FlatOptimizer) and self.accelerator.num_processes == 1:
            optimizer.lay_gradients()
        if num_items_in_batch is None or self.args.n_gpu > 1 or self._is_not_plain:
            done: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            self._log_what_waits()
            return done
        self._be_in_training_mode(model)
        inputs = self._prepare_inputs(inputs)

        def compute(batch: dict[str, Any]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss: torch.Tensor = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

        if self.accelerator.num_processes > 1:  # which would wait for each other's halves
            loss = compute(inputs)
        else:
            if self._halving.is_between_steps:
                self._unread_before = len(self._unread)
            loss = self._halving.run(inputs, compute, self._begin_step_anew, self.state.global_step + 1)
            if self.accelerator.sync_gradients:
                self._halving.end_step()
        self._log_what_waits()
        return loss

    def _begin_step_anew(self) -> None:
        """Let go of the gradients and sums of the step that runs, and of recordings."""
        del self._unread[self._unread_before :]
        self.model.zero_grad()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, FlatOptimizer):
            optimizer.lay_gradients()
        if self.engine is not None and self.engine.graphs is not None:
            self.engine.graphs.release()

    def _be_in_training_mode(self, model: torch.nn.Module) -> None:
        """Put every module into training mode, whoever left one in eval mode.

        The root says nothing of what is below it: under an adapter's new modules a base is as `from_pretrained` leaves
        it, in eval mode, in which nothing is checkpointed and nothing dropped out. Looking takes 0.2 ms of 3,000.

        Raises:
            RunError: a module stays in eval mode.
        """
        if self._modules and all(module.training for module in self._modules):
            return
        model.train()
        self._modules = tuple(model.modules())
        if left := [name for name, module in model.named_modules() if not module.training]:
            raise RunError(f"{len(left)} modules of the model cannot be put into training mode, such as {left[0]}")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate for a batch, six for each weight and token, with the weights counted once."""
        return 6 * int(inputs["input_ids"].numel()) * self._counted_weights

    @cached_property
    def _counted_weights(self) -> int:
        return int(self.model.get_base_model().num_parameters(exclude_embeddings=True))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The objective's loss, without waiting for the device.

        TRL reads its metrics off the device after every forward pass, and the backward pass waits for that; here they
        are read when they are logged.
        """
        count, tokens = inputs.pop("trained_tokens", None), inputs.pop("tokens", None)
        if return_outputs or not model.training or self._is_not_plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = {"trained_tokens": count} if self.tells_counts else {}
        outputs = model(**inputs, **counts, use_cache=False, fused_lm_head=True)
        found = self.objective.loss(outputs, {**inputs, "tokens": tokens}, num_items_in_batch)
        self._unread.append(found.sums)
        loss = found.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return loss

    @property
    def _is_not_plain(self) -> bool:
        """Whether the loss has a part that only TRL computes."""
        special = (self.compute_loss_func, self.label_smoother)
        return self.args.loss_type != "nll" or self.aux_loss_enabled or any(part is not None for part in special)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the objective's metrics and the tokens of all batches and processes since the last time."""
        if self._unread:
            seen = self.accelerator.reduce(torch.stack(self._unread).sum(dim=0), reduction="sum")
            self._unread.clear()
            self._count(seen.tolist())
        super().log(logs, start_time)

    def _count(self, sums: Sequence[float]) -> None:
        progress = self.objective.read(sums)
        self._total_train_tokens += progress.tokens
        for name, value in progress.metrics.items():
            self._metrics["train"][name] = [value]
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: torch.nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """As transformers does it, but what is logged is read while the next step runs.

        To read the loss, the host waits for the device, and then the device for the host to bring the next batch: 5 ms
        of each step of an 8B model on an H100.
        """
        self._log_what_waits()
        steps = self.state.global_step - self._globalstep_last_logged
        if self._can_log_late and self.control.should_log and steps > 0 and isinstance(grad_norm, torch.Tensor):
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            self._waiting = self._sent(tr_loss, grad_norm, steps, float(rate), start_time)
            tr_loss.zero_()
            self._globalstep_last_logged = self.state.global_step
            return
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    @property
    def _can_log_late(self) -> bool:
        """Whether there is another step to read the values in, and nothing that wants them now."""
        wanted = (self.control.should_evaluate, self.control.should_save, self.control.should_training_stop)
        return self.logs_late and self.accelerator.num_processes == 1 and bool(self._unread) and not any(wanted)

    def _sent(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor, steps: int, learning_rate: float, start_time: float
    ) -> _Waiting:
        seen = torch.stack(self._unread).sum(dim=0).double()
        self._unread.clear()
        values = torch.cat((torch.stack((tr_loss.double(), grad_norm.double().to(tr_loss.device))), seen))
        if not values.is_cuda:
            return _Waiting(values, None, steps, learning_rate, start_time)
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        arrived.record()
        return _Waiting(there, arrived, steps, learning_rate, start_time)

    def _log_what_waits(self) -> None:
        """Log the last step, once its values are here; nothing if that is done."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        if waiting.arrived is not None:
            waiting.arrived.synchronize()
        loss, grad_norm, *seen = waiting.values.tolist()
        self._total_loss_scalar += loss
        self._count(seen)
        self.store_flos()
        logs = {"loss": loss / waiting.steps, "grad_norm": grad_norm, "learning_rate": waiting.learning_rate}
        super().log(logs, waiting.start_time)  # self.log would count the step that is running

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save, and remove older ones; but not what the last update broke, which neither loss nor gradient told.

        Raises:
            NotFiniteError: a trained weight is not finite.
        """
        refuse_weights_not_finite(self.model, self.state.global_step)
        with whole_or_none(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimizer, over the groups that there are; one of bitsandbytes runs over flat buffers."""
        if self.groups is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer_cls_and_kwargs = (kind, settings | {"params": self.groups(self.model)})
        self.optimizer = flat(super().create_optimizer(model), self.model)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        items = len(self.train_dataset if train_dataset is None else train_dataset)
        return EpochSampler(self.order, items, lambda: int(self.state.epoch or 0))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        """Loss of one held-out batch; notes how many tokens it is the mean of."""
        score = super().prediction_step

        def sums(part: dict[str, Any]) -> torch.Tensor:
            return self.objective.held_out(score(model, part, prediction_loss_only, ignore_keys)[0], part)

        is_alone = self.accelerator.num_processes == 1  # others would wait for each other's parts
        found = self._halving.summed(inputs, sums) if is_alone else sums(inputs)
        self._held_out += found
        return found[0] / found[1].clamp(min=1), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over the loss tokens of all batches and processes.

        transformers 5.17 averages the means of the batches instead, so a token in a short batch would count more.
        """
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, tokens = self.accelerator.reduce(self._held_out, reduction="sum").tolist()
        if not tokens:
            raise RunError("the held-out rows hold no loss token, so there is no held-out loss")
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output
