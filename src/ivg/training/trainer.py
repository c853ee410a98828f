"""What TRL's trainers and the value trainer share: arguments, LoRA, loading, held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import accelerate  # noqa: F401  (transformers' Trainer needs it, and says so only after the rows are read and the model is loaded)
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ivg.errors import ConfigError, ModelError
from ivg.models.loading import LoadOptions, load_network, load_tokenizer
from ivg.models.placement import pick_dtype
from ivg.models.shared_prompts import shared_length
from ivg.settings.train import Mode, TrainSettings
from ivg.training.encoding import Encoded, as_texts
from ivg.training.run_dir import RunDir
from ivg.training.split import held_out

T = TypeVar("T")
CHECKPOINTED = 50_000_000
"""Parameters up to which a network on a GPU keeps its activations: faster, and they fit."""


@dataclass(frozen=True)
class Split(Generic[T]):
    """Training rows (as they came, and encoded) and encoded evaluation rows.

    Attributes:
        rows: the training rows.
        train: the same, encoded, without those that are too long.
        test: rows held out for evaluation, encoded.
        left_out: rows that are too long.
    """

    rows: Sequence[Any]
    train: list[T]
    test: list[T]
    left_out: int

    @property
    def counts(self) -> dict[str, int]:
        """For the metrics of the run."""
        return {"rows": len(self.train), "rows_held_out": len(self.test), "rows_left_out": self.left_out}


def split_rows(rows: Sequence[Any], settings: TrainSettings, encode: Callable[[Sequence[Any]], list[T]]) -> Split[T]:
    """Hold out ``eval_share`` of the prompts and encode both parts.

    Raises:
        ConfigError: no row is left to train on.
    """
    return encode_split(held_out(rows, settings.eval_share), settings, encode)


def encode_split(
    parts: tuple[Sequence[Any], Sequence[Any]], settings: TrainSettings, encode: Callable[[Sequence[Any]], list[T]]
) -> Split[T]:
    """Encode (training rows, rows held out for evaluation).

    Raises:
        ConfigError: no row is left to train on.
    """
    first, last = parts
    train, test = encode(first), encode(last)
    count = len(first) + len(last)
    if not train:
        raise ConfigError(
            f"no row is left to train on: {count} rows, at most {settings.max_length} tokens each, {settings.eval_share:.0%} of the"
            " prompts held out\n  raise --max-length, give more prompts, or lower --eval-share"
        )
    return Split(first, train, test, count - len(train) - len(test))


def trainer_arguments(kind: Any, settings: TrainSettings, run: RunDir, network: Any, *, evaluate: bool, **fixed: Any) -> Any:
    """``kind`` (transformers' ``TrainingArguments`` or a subclass); ``settings.trainer_args`` has the last word.

    Args:
        kind: the class.
        settings: those with the name of a field of ``kind`` are passed on.
        run: where checkpoints go.
        network: what is trained; on a GPU large ones recompute activations (gradient checkpointing) to save memory.
        evaluate: are there held-out rows?
        fixed: further fields.

    Raises:
        ConfigError: ``trainer_args`` names a field that ``kind`` lacks.
    """
    # the field's new name is unknown to transformers 5.16, which the package allows
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(settings.trainer_args) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no field {', '.join(unknown)}\n  expected any field of transformers' and TRL's arguments")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    during = evaluate and settings.evaluations > 1  # one more evaluation follows training
    arguments: dict[str, Any] = {
        **{f.name: getattr(settings, f.name) for f in fields(settings) if f.name in known},
        "output_dir": str(run.checkpoints),
        "per_device_eval_batch_size": settings.per_device_train_batch_size,
        "lr_scheduler_type": "cosine",
        "bf16": pick_dtype("auto", device) == torch.bfloat16,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda and sum(p.numel() for p in network.parameters()) > CHECKPOINTED,
        "dataloader_pin_memory": cuda,
        "logging_steps": 0.02,
        "save_total_limit": 1,
        "ddp_timeout": 86_400,  # while the first process measures a ranking, which may take long, the others wait
        "eval_strategy": "steps" if during else "no",
        "eval_steps": 1 / settings.evaluations if during else None,
        "disable_tqdm": True,
        **fixed,
        **settings.trainer_args,
    }
    return kind(**arguments)


class GroupedByLength:
    """A trainer whose ``train_sampling_strategy=group_by_length`` knows our rows; transformers' own knows ``input_ids`` only."""

    args: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        strategy, rows = self.args.train_sampling_strategy, self.train_dataset if train_dataset is None else train_dataset
        if strategy == "batch_rebalance" and "input_ids" not in getattr(rows, "column_names", ()):
            raise ConfigError(
                "train_sampling_strategy=batch_rebalance is for ivg train sft\n  expected random, sequential or group_by_length"
            )
        if strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        return _by_length(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return _by_length(eval_dataset, self.args.eval_batch_size, self.args.seed)


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' sampler with an order that depends on seed and epoch alone, so that a resumed run skips the rows that it has read."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers and accelerate before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


def _by_length(rows: Any, batch_size: int, seed: int) -> EpochLengthSampler:
    return EpochLengthSampler(batch_size, [row_length(row) for row in rows], seed)


def row_length(row: Any) -> int:
    """Tokens of a row as a trainer pads it: of a pair those of its longer text."""
    if isinstance(row, Encoded):
        return len(row.ids)
    if isinstance(row, tuple):
        return shared_length(as_texts(row))
    columns = {name: len(row[name]) for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in row}
    longer = max(columns.pop("chosen_ids", 0), columns.pop("rejected_ids", 0))
    return sum(columns.values()) + longer


def lora_config(settings: TrainSettings, task_type: str) -> Any:
    """PEFT's ``LoraConfig`` of rank ``lora_r`` on all linear layers; None unless the mode is ``lora``.

    Raises:
        ConfigError: PEFT is not installed.
    """
    if settings.mode != "lora":
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("LoRA needs PEFT\n  pip install 'ivg[train]'") from None
    r, whole = settings.lora_r, ["score"] if task_type == "SEQ_CLS" else None
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type=task_type, modules_to_save=whole)


def body_dtype(mode: Mode) -> str:
    """The dtype of a network in training: float32; on a machine with a GPU bfloat16 where the body is frozen (``lora``, ``head``)."""
    return "bfloat16" if mode != "full" and torch.cuda.is_available() else "float32"


def load_for_training(
    auto_class: Any, name: str | Path, what: str, trust_remote_code: bool = False, mode: Mode = "full", **kwargs: Any
) -> tuple[Any, Any]:
    """Load a network on the CPU and its tokenizer, which gets a padding token.

    The dtype is :func:`body_dtype`; a head that is trained is in float32.

    Raises:
        ModelError: no usable model at ``name``.
    """
    from transformers import AutoModelForSequenceClassification

    classifies = auto_class is AutoModelForSequenceClassification
    options = LoadOptions(device="cpu", dtype=body_dtype(mode), trust_remote_code=trust_remote_code, extra=kwargs)
    network = load_network(name, auto_class, options, what, new_head=classifies)
    for part, module in network.named_children() if classifies else ():
        if part != network.base_model_prefix:
            module.float()
    tokenizer = tokenizer_for_training(name, trust_remote_code, what)
    config = network.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def tokenizer_for_training(name: str | Path, trust_remote_code: bool = False, what: str = "model") -> Any:
    """The tokenizer of ``name`` with a padding token.

    Raises:
        ModelError: no tokenizer, or one without a token to pad with.
    """
    tokenizer = load_tokenizer(name, LoadOptions(trust_remote_code=trust_remote_code), what)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name} has neither a padding nor an end-of-sequence token\n  add one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def drop_timing_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of an evaluation without times and rates, which differ from run to run."""
    timing = ("runtime", "per_second", "preparation_time", "total_flos", "num_tokens")
    return {k: v for k, v in sorted(metrics.items()) if k != "epoch" and not any(part in k for part in timing)}
