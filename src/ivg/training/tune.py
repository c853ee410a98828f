"""The guide pair and the reward model, by TRL: supervised fine-tuning, DPO, Bradley-Terry reward modelling.

Thin: TRL's trainers get rows in tokens (``training.encoding``), so that prompts are rendered, and responses end, as they do at
inference. Full or LoRA (PEFT), whose adapter is merged at the end and kept in ``adapter/``. Each function returns the metrics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivg.diagnostics.pairs import is_tie
from ivg.errors import ConfigError
from ivg.settings.train import TrainSettings
from ivg.training import encoding
from ivg.training.common import (
    RunDir,
    arguments,
    build_request,
    drop_timing_metrics,
    first_process,
    load_for_training,
    lora,
    no_rows_error,
    write_card,
)
from ivg.training.data import Preference, SFTExample, held_out

Sources = Sequence[str | Path]
"""Where the data came from, for the card."""


def sft(
    model: str | Path,
    rows: Sequence[SFTExample],
    out: str | Path,
    options: TrainSettings,
    *,
    sources: Sources = (),
    loss: str = "response",
) -> dict[str, Any]:
    """Supervised fine-tuning (TRL's SFTTrainer).

    Args:
        model: causal language model, directory or hub id.
        rows: what to imitate.
        out: folder of the run.
        options: settings.
        sources: named in the card.
        loss: on the tokens of the ``response`` only, or on ``all``.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    if loss not in ("response", "all"):
        raise ConfigError(f"loss must be response or all, got {loss!r}")
    run = RunDir(out, build_request("sft", model, sources, rows, options, loss=loss))
    if run.metrics is not None:
        return run.metrics
    set_seed(options.seed)
    network, tokenizer = load_for_training(AutoModelForCausalLM, model, "model", options.trust_remote_code, options.mode)
    train, test, trained = _encoded(rows, options, lambda part: encoding.encode_sft(part, tokenizer, options.template, options.max_length))
    args = arguments(SFTConfig, options, run, evaluate=bool(test), max_length=None, packing=False, completion_only_loss=loss == "response")
    trainer = (SFTTrainer if torch.cuda.is_available() else _plain_loss(SFTTrainer))(
        model=network,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test) if test else None,
        processing_class=tokenizer,
        peft_config=lora(options, "CAUSAL_LM"),
    )
    use = "Load it with transformers; as a base (`--base`), or as the untuned guide (`--untuned`) of a pair."
    metrics = {"rows": len(train), "rows_left_out": len(rows) - len(train) - len(test)}
    return _train(trainer, run, tokenizer, metrics, trained, "Supervised fine-tuning", use)


def dpo(
    model: str | Path, rows: Sequence[Preference], out: str | Path, options: TrainSettings, *, sources: Sources = (), beta: float = 0.1
) -> dict[str, Any]:
    """Direct preference optimisation (Rafailov et al. 2023; TRL's DPOTrainer): the tuned guide of ``model``, the untuned one.

    Args:
        model: where it starts, and its reference: directory or hub id.
        rows: preferences.
        out: folder of the run.
        options: settings; the paper's for IMDb are 3 epochs, lr 5e-4, batch 32, weight decay 0.05, warm-up 0.25 (METHOD, section 5).
        sources: named in the card.
        beta: strength of the KL term.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Rows come in tokens: TRL would add an end of sequence to responses that were cut at their length limit."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    if not 0 < beta < math.inf:
        raise ConfigError(f"beta of DPO must be positive and finite, got {beta}")
    run = RunDir(out, build_request("dpo", model, sources, rows, options, beta=beta))
    if run.metrics is not None:
        return run.metrics
    rows, ties = without_ties(rows)
    set_seed(options.seed)
    network, tokenizer = load_for_training(AutoModelForCausalLM, model, "model", options.trust_remote_code, options.mode)
    train, test, trained = _encoded(
        rows, options, lambda part: encoding.encode_preferences(part, tokenizer, options.template, options.max_length)
    )
    args = arguments(
        DPOConfig,
        options,
        run,
        evaluate=bool(test),
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=int(os.environ.get("WORLD_SIZE", "1")) == 1,  # TRL's cache of them lives in one process
        precompute_ref_batch_size=2 * options.batch_size,
    )
    trainer = Tokenised(
        model=network,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test) if test else None,
        processing_class=tokenizer,
        peft_config=lora(options, "CAUSAL_LM"),
    )
    use = f"The tuned guide of a pair: `--tuned THIS --untuned {model}`."
    metrics = {"rows": len(train), "rows_left_out": len(rows) - len(train) - len(test), "ties_left_out": ties}
    return _train(trainer, run, tokenizer, metrics, trained, "DPO-tuned guide", use)


def reward(
    model: str | Path, rows: Sequence[Preference], out: str | Path, options: TrainSettings, *, sources: Sources = ()
) -> dict[str, Any]:
    """A reward model by Bradley and Terry (TRL's RewardTrainer): one label, whose logit is the reward of prompt + response.

    Args:
        model: any model that transformers can put a sequence classifier on.
        rows: preferences.
        out: folder of the run.
        options: settings.
        sources: named in the card.
    """
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, set_seed
    from trl import RewardConfig, RewardTrainer

    from ivg.values.reward import RewardModel

    run = RunDir(out, build_request("reward", model, sources, rows, options, template=options.template))
    if run.metrics is not None:
        return run.metrics
    rows, ties = without_ties(rows)
    set_seed(options.seed)
    network, tokenizer = load_for_training(
        AutoModelForSequenceClassification, model, "model", options.trust_remote_code, options.mode, num_labels=1
    )
    network.config.pad_token_id = tokenizer.pad_token_id
    network.config.ivg_template = options.template
    reader = RewardModel(network, tokenizer, options.template)
    train, test, trained = _encoded(rows, options, lambda part: encoding.encode_for_reward(part, reader, options.max_length))
    network.train()
    args = arguments(RewardConfig, options, run, evaluate=bool(test), max_length=None)
    trainer = RewardTrainer(
        model=network,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(test) if test else None,
        processing_class=tokenizer,
        peft_config=lora(options, "SEQ_CLS"),
    )
    metrics = {"rows": len(train), "rows_left_out": len(rows) - len(train) - len(test), "ties_left_out": ties}
    use = "As a reward: `--reward THIS`, or `gold` of `ivg eval`."
    return _train(trainer, run, tokenizer, metrics, trained, "Reward model", use)


def without_ties(rows: Sequence[Preference]) -> tuple[list[Preference], int]:
    """(pairs of different responses, how many had the same text twice, which no loss could learn from).

    Raises:
        ConfigError: all had.
    """
    kept = [row for row in rows if not is_tie(row)]
    if rows and not kept:
        raise ConfigError(f"in all {len(rows)} pairs chosen and rejected are the same text\n  expected two different responses to a prompt")
    return kept, len(rows) - len(kept)


def _plain_loss(trainer: Any) -> Any:
    """``trainer`` with the model's own loss.

    TRL computes it from a float32 head in tiles, with entropies, made for GPUs. On a CPU that took most of the time.
    """
    from transformers import Trainer

    class PlainLoss(trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    return PlainLoss


def _encoded(
    rows: Sequence[Any], options: TrainSettings, encode: Callable[[Sequence[Any]], list[Any]]
) -> tuple[list[Any], list[Any], list[Any]]:
    """(training rows in tokens, evaluation rows in tokens, the training rows as they came).

    Raises:
        ConfigError: no row is short enough.
    """
    if options.mode == "head":
        raise ConfigError("mode head trains the head of a value; here give full or lora")
    first, last = held_out(rows, options.eval_share)
    train, test = encode(first), encode(last)
    if not train:
        raise no_rows_error(len(rows), options)
    return train, test, first


def _train(
    trainer: Any, run: RunDir, tokenizer: Any, counts: Mapping[str, int], rows: Sequence[Any], kind: str, use: str
) -> dict[str, Any]:
    run.train(trainer)
    metrics: dict[str, Any] = dict(counts)
    if trainer.eval_dataset is not None:
        metrics["held_out"] = drop_timing_metrics(trainer.evaluate())
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(trained, "merge_and_unload"):
        if first_process():
            trained.save_pretrained(run.out / "adapter")
            trained.merge_and_unload().save_pretrained(run.out)
    else:
        trainer.save_model(str(run.out))  # by all processes: it gathers what ZeRO or FSDP spread over them
    if first_process():
        (run.out / "training_args.bin").unlink(missing_ok=True)
        tokenizer.save_pretrained(run.out)
    return run.finish(metrics, write_card(kind, run, metrics, use), rows)
