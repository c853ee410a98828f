"""Supervised fine-tuning, DPO and reward modelling, by TRL.

TRL's trainers get tokenised rows (:mod:`ivg.training.encoding`), so that prompts are rendered, and responses end, as at inference. LoRA
adapters (PEFT) are merged at the end and kept in ``adapter/``. Each function returns the metrics of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from ivg.diagnostics.pairs import is_tie
from ivg.errors import ConfigError
from ivg.settings.train import DPOSettings, SFTSettings, TrainSettings
from ivg.training import encoding
from ivg.training.data import SFTExample
from ivg.training.run_dir import RunDir, first_process, open_run, process_count, run_provenance
from ivg.training.trainer import drop_timing_metrics, load_for_training, lora_config, split_rows, trainer_arguments
from ivg.types import Preference
from ivg.values.reward import RewardModel

Sources = Sequence[str | Path]
"""Where the rows come from; named in the model card."""


def sft(
    model: str | Path,
    rows: Sequence[SFTExample],
    out: str | Path,
    settings: SFTSettings,
    *,
    sources: Sources = (),
) -> dict[str, Any]:
    """Supervised fine-tuning (TRL's ``SFTTrainer``).

    Args:
        model: causal language model, directory or hub id.
        rows: prompts and responses.
        out: folder of the run.
        settings: of the trainer.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: no usable row, or ``out`` holds another run.
    """
    with open_run(out, run_provenance("sft", model, sources, rows, settings)) as run:
        if run.metrics is not None:
            return run.metrics
        network, tokenizer = _load(AutoModelForCausalLM, model, settings)
        task = _Task(
            SFTTrainer if torch.cuda.is_available() else _PlainLossSFTTrainer,
            SFTConfig,
            "CAUSAL_LM",
            lambda part: encoding.encode_sft(part, tokenizer, settings.template, settings.max_length),
            {"packing": False, "completion_only_loss": settings.loss == "response"},
        )
        card = "Supervised fine-tuning", "Load it with transformers; as a base (`--base`), or as the untuned guide (`--untuned`) of a pair."
        return _train(run, network, tokenizer, rows, settings, task, card)


def dpo(model: str | Path, rows: Sequence[Preference], out: str | Path, settings: DPOSettings, *, sources: Sources = ()) -> dict[str, Any]:
    """Direct preference optimisation (Rafailov et al. 2023; TRL's ``DPOTrainer``): from the untuned guide ``model`` to the tuned one.

    Args:
        model: the initial policy and the reference: directory or hub id.
        rows: preferences; those whose two responses are the same are left out.
        out: folder of the run.
        settings: of the trainer. Liu et al. 2024 (arXiv 2409.17819) use for IMDb 3 epochs, learning rate 5e-4, batch size 32, weight
            decay 0.05, warm-up 0.25.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: no usable row, or ``out`` holds another run.
    """
    with open_run(out, run_provenance("dpo", model, sources, rows, settings)) as run:
        if run.metrics is not None:
            return run.metrics
        rows, ties = _without_ties(rows)
        network, tokenizer = _load(AutoModelForCausalLM, model, settings)
        task = _Task(
            _TokenisedDPOTrainer,
            DPOConfig,
            "CAUSAL_LM",
            lambda part: encoding.encode_preferences(part, tokenizer, settings.template, settings.max_length),
            {
                "beta": settings.beta,
                "precompute_ref_log_probs": process_count() == 1,  # TRL's cache of them lives in one process
                "precompute_ref_batch_size": 2 * settings.per_device_train_batch_size,
            },
            {"ties_left_out": ties},
        )
        card = "DPO-tuned guide", f"The tuned guide of a pair: `--tuned THIS --untuned {model}`."
        return _train(run, network, tokenizer, rows, settings, task, card)


def reward(
    model: str | Path, rows: Sequence[Preference], out: str | Path, settings: TrainSettings, *, sources: Sources = ()
) -> dict[str, Any]:
    """A reward model with the Bradley-Terry loss (TRL's ``RewardTrainer``): its one logit is the reward of prompt and response.

    Args:
        model: any model on which transformers can put a sequence classifier.
        rows: preferences; those whose two responses are the same are left out.
        out: folder of the run.
        settings: of the trainer.
        sources: where the rows come from; named in the model card.

    Raises:
        ConfigError: settings out of range, no usable row, or ``out`` holds another run.
    """
    with open_run(out, run_provenance("reward", model, sources, rows, settings)) as run:
        if run.metrics is not None:
            return run.metrics
        rows, ties = _without_ties(rows)
        network, tokenizer = _load(AutoModelForSequenceClassification, model, settings, num_labels=1)
        network.config.pad_token_id = tokenizer.pad_token_id
        network.config.ivg_template = settings.template
        reader = RewardModel(network, tokenizer, settings.template)
        task = _Task(
            RewardTrainer,
            RewardConfig,
            "SEQ_CLS",
            lambda part: encoding.encode_for_reward(part, reader, settings.max_length),
            counts={"ties_left_out": ties},
        )
        return _train(
            run, network, tokenizer, rows, settings, task, ("Reward model", "As a reward: `--reward THIS`, or `gold` of `ivg eval`.")
        )


@dataclass(frozen=True)
class _Task:
    """A trainer of TRL, and what it needs.

    Attributes:
        trainer: its class.
        config: the class of its arguments.
        task_type: for PEFT.
        encode: rows to the columns that the trainer reads.
        arguments: further fields of ``config``.
        counts: further metrics.
    """

    trainer: Any
    config: Any
    task_type: str
    encode: Callable[[Sequence[Any]], list[Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


class _PlainLossSFTTrainer(SFTTrainer):
    """With the model's own loss. TRL computes it from a float32 head in tiles, for GPUs; on a CPU that takes most of the time."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)


class _TokenisedDPOTrainer(DPOTrainer):
    """For tokenised rows: TRL would add an end of sequence to responses that were cut at their length limit."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def _load(auto_class: Any, model: str | Path, settings: TrainSettings, **kwargs: Any) -> tuple[Any, Any]:
    if settings.mode == "head":
        raise ConfigError("mode head trains the head of a value\n  expected full or lora")
    set_seed(settings.seed)
    return load_for_training(auto_class, model, "model", settings.trust_remote_code, settings.mode, **kwargs)


def _without_ties(rows: Sequence[Preference]) -> tuple[list[Preference], int]:
    """(pairs of different responses, number of the others, from which no loss could learn).

    Raises:
        ConfigError: no pair of different responses.
    """
    kept = [row for row in rows if not is_tie(row)]
    if rows and not kept:
        raise ConfigError(f"in all {len(rows)} pairs chosen and rejected are the same text\n  expected two different responses to a prompt")
    return kept, len(rows) - len(kept)


def _train(
    run: RunDir, network: Any, tokenizer: Any, rows: Sequence[Any], settings: TrainSettings, task: _Task, card: tuple[str, str]
) -> dict[str, Any]:
    """Train, evaluate, save; ``card``: title and usage of the model card."""
    split = split_rows(rows, settings, task.encode)
    network.train()
    trainer = task.trainer(
        model=network,
        args=trainer_arguments(task.config, settings, run, evaluate=bool(split.test), **{**task.arguments, "max_length": None}),
        train_dataset=Dataset.from_list(split.train),
        eval_dataset=Dataset.from_list(split.test) if split.test else None,
        processing_class=tokenizer,
        peft_config=lora_config(settings, task.task_type),
    )
    run.train(trainer)
    metrics: dict[str, Any] = {**split.counts, **task.counts}
    if split.test:
        metrics["held_out"] = drop_timing_metrics(trainer.evaluate())
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(trained, "merge_and_unload"):
        if first_process():
            trained.save_pretrained(run.path / "adapter")
            trained.merge_and_unload().save_pretrained(run.path)
    else:
        trainer.save_model(str(run.path))  # by all processes: it gathers what ZeRO or FSDP spread over them
    if first_process():
        (run.path / "training_args.bin").unlink(missing_ok=True)
        tokenizer.save_pretrained(run.path)
    return run.finish(metrics, *card, split.rows)
