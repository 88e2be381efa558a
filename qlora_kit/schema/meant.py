"""What was meant by a key that is no field: its name in other tools, the same name elsewhere, or a near spelling."""

import difflib
from dataclasses import dataclass
from typing import Any

from qlora_kit.schema import walk
from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import groups

# The names of TRL, axolotl, LLaMA-Factory, Unsloth and their users
NAMES_ELSEWHERE = {
    "optim.learning_rate": ("lr", "learningrate", "peak_lr"),
    "optim.warmup_fraction": ("warmup_ratio", "warmup"),
    "optim.schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "optim.max_grad_norm": ("gradient_clipping", "clip", "grad_clip"),
    "optim.beta1": ("adam_beta1",),
    "optim.beta2": ("adam_beta2",),
    "trainer.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "epoch"),
    "trainer.max_steps": ("num_steps", "steps", "max_iters"),
    "trainer.batch_size": (
        *("per_device_train_batch_size", "per_device_batch_size", "micro_batch_size", "train_batch_size", "bs"),
    ),
    "trainer.gradient_accumulation": ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "trainer.save_every_steps": ("save_steps",),
    "trainer.log_every_steps": ("logging_steps", "log_steps"),
    "trainer.eval_every_steps": ("eval_steps",),
    "trainer.keep_checkpoints": ("save_total_limit",),
    "trainer.seed": ("seed", "random_seed", "random_state"),
    "lora.r": ("lora_r", "lora_rank", "rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.targets": ("target_modules", "lora_target_modules", "lora_target", "lora_targets"),
    "lora.modules_to_save": ("lora_modules_to_save",),
    "data.max_tokens": (
        *("max_seq_length", "max_seq_len", "max_length", "sequence_len", "seq_length", "seq_len", "cutoff_len"),
        *("model_max_length", "context_length"),
    ),
    "data.train_file": ("dataset", "dataset_path", "data_path", "data_file", "data_files", "train_data", "train_path"),
    "data.eval_file": ("val_file", "validation_file", "eval_data", "eval_dataset", "test_file"),
    "data.eval_share": ("val_set_size", "val_size", "eval_size", "test_size", "validation_split"),
    "model.source": ("model_name_or_path", "model_name", "base_model", "model_id", "model_path"),
    "model.attention": ("attn_implementation",),
    "quant.double_quant": ("bnb_4bit_use_double_quant", "double_quantization"),
    "quant.compute_dtype": ("bnb_4bit_compute_dtype", "torch_dtype", "dtype"),
    "quant.kind": ("bnb_4bit_quant_type",),
    "name": ("run_name",),
    "export.calibration_rows": ("calibration_samples", "num_calibration_samples"),
    "eval.max_new_tokens": ("max_tokens",),
}
# Settings elsewhere whose values are words of ours: key -> value in lower case -> override
WORDS_ELSEWHERE = {
    "load_in_4bit": {"true": "quant=nf4_double", "false": "quant=none"},
    "load_in_8bit": {"true": "quant=int8"},
    "bf16": {"true": "quant.compute_dtype=bfloat16"},
    "fp16": {"true": "quant.compute_dtype=float16"},
    "packing": {"true": "data.batching=packed", "false": "data.batching=padded"},
    "sample_packing": {"true": "data.batching=packed", "false": "data.batching=padded"},
    "group_by_length": {"true": "data.batching=by_length"},
    "train_on_inputs": {"true": "data.train_on=everything", "false": "data.train_on=assistant"},
    "excess_length_strategy": {
        "drop": "data.overflow=drop",
        "truncate": "data.overflow=truncate_end",
        "raise": "data.overflow=error",
    },
    "truncation_mode": {"keep_start": "data.overflow=truncate_end"},
    "flash_attention": {"true": "model.attention=flash_attention_2"},
    "report_to": {"none": "tracker=jsonl", **{name: f"tracker={name}" for name in ("wandb", "mlflow", "tensorboard")}},
}
OPTIONS_ELSEWHERE = {
    "quant": {
        **dict.fromkeys(("4bit", "int4", "4", "qlora", "true"), "nf4_double"),
        **dict.fromkeys(("8bit", "8"), "int8"),
        **dict.fromkeys(("16bit", "bf16", "bfloat16", "fp16", "16", "false"), "none"),
    },
    "optim": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"},
    "tracker": {"none": "jsonl"},
}
# What has no field of its own
HINTS = {
    "warmup_steps": "warming up is a share of all steps here, optim.warmup_fraction",
    "output_dir": "a run is written below outputs/, into the folder that name says",
    "resume_from_checkpoint": "a run goes on with qlora-kit train resume=latest",
    **dict.fromkeys(
        ("early_stopping", "early_stopping_patience"),
        "training does not stop early; trainer.eval_every_steps shows the held-out loss on the way",
    ),
    "packing_length": "rows are packed into bins of data.max_tokens",
}
NEAR_WORD = 0.8
NEAR_OPTION = 0.6


@dataclass(frozen=True)
class Meant:
    """A field or group that a wrong key stood for, the override that says so, and what to know where there is none."""

    name: str = ""
    line: str = ""
    hint: str = ""


def meant(root: type[Sealed], path: str, value: object) -> Meant:
    """What a key that is no field stood for; nothing where that is a guess."""
    last = path.rsplit(".", 1)[-1].lower().replace("-", "_")
    if line := WORDS_ELSEWHERE.get(last, {}).get(str(value).lower(), ""):
        return Meant(line.split("=")[0], line) if _is_known(root, line.split("=")[0]) else Meant()
    if last in WORDS_ELSEWHERE or last in HINTS:
        return Meant(hint=HINTS.get(last, ""))
    for field in (*_named_elsewhere(last), *_same_name(root, path, last)):
        if _is_known(root, field):
            return Meant(field, walk.example(root, field, value))
    if "." not in path and (option := _near_group(root, path, value)):
        return option
    near = _near_field(root, path, value)
    return Meant(near, walk.example(root, near, value)) if near else Meant()


def nearest_option(group: str, option: str) -> str | None:
    """The option of a group that a wrong one stood for, if one can be told."""
    known = groups().get(group, [])
    usual = OPTIONS_ELSEWHERE.get(group, {}).get(option.lower())
    if usual in known:
        return usual
    close = difflib.get_close_matches(option, known, n=1, cutoff=NEAR_OPTION)
    return close[0] if close else None


def beside(root: type[Sealed], path: str) -> list[str]:
    """Fields of the group that a dotted path would be in; of the recipe where there is no such group."""
    parent = path.rpartition(".")[0]
    group = walk.group_class(walk.type_at(root, parent)) if parent else root
    return list(walk.fields_of(group or root))


def _is_known(root: type[Sealed], path: str) -> bool:
    return walk.find_path(root, path)


def _named_elsewhere(last: str) -> list[str]:
    return [field for field, names in NAMES_ELSEWHERE.items() if last in names]


def _same_name(root: type[Sealed], path: str, last: str) -> list[str]:
    """Fields of that very name in other groups: the only one, or the one nearest to the root."""
    same = [known for known, _, _ in walk.schema_paths(root) if "*" not in known and known.split(".")[-1] == last]
    least = min((known.count(".") for known in same), default=0)
    nearest = [known for known in same if known.count(".") == least]
    group = path.rsplit(".", 1)[0] if "." in path else ""
    close = difflib.get_close_matches(f"{group}.{last}", nearest, n=1, cutoff=NEAR_WORD)
    return nearest if len(nearest) == 1 else close


def _near_group(root: type[Sealed], path: str, value: object) -> Meant | None:
    for group in difflib.get_close_matches(path, list(groups()), n=3, cutoff=0.7):
        if str(value) in groups()[group] and (group in walk.fields_of(root) or group in ("experiment", "launcher")):
            return Meant(group, f"{group}={value}")
    return None


def _near_field(root: type[Sealed], path: str, value: object) -> str | None:
    """A field with nearly the same last word: in the same group, else in another one that takes the value."""
    group, _, last = path.rpartition(".")
    fields = [(known, kind) for known, kind, _ in walk.schema_paths(root) if "*" not in known]
    here = _near_words(last, [one for one in fields if one[0].rpartition(".")[0] == group], is_started=True)
    anywhere = _near_words(last, fields, is_started=False)
    takers = [known for known, kind in (*here, *anywhere) if value is ... or walk.takes(kind, value)]
    return next(iter([*takers, *(known for known, _ in here)]), None)


def _near_words(word: str, fields: list[tuple[str, Any]], *, is_started: bool) -> list[tuple[str, Any]]:
    """Fields whose last word is nearly this one, or may be `is_started` by it; the nearest first."""

    def nearness(field: tuple[str, Any]) -> float:
        name = field[0].rpartition(".")[2]
        if is_started and len(word) > 3 and name.startswith(word):
            return 1.0 - len(name) / 100
        if len(name) <= 2:  # r
            return float(word == name * 2)
        return difflib.SequenceMatcher(None, word, name).ratio()

    return sorted((one for one in fields if nearness(one) >= NEAR_WORD), key=nearness, reverse=True)
