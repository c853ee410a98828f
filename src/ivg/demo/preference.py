"""The guide pair: preference pairs by Bradley and Terry from gold rewards, and `tuned` from `untuned` by TRL's DPO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DPOSettings:
    """The paper's hyperparameters for IMDb (METHOD, section 5), but for the epochs, which the CPU shortens."""

    epochs: float = 2.0
    lr: float = 5e-4
    batch: int = 32
    beta: float = 0.1
    weight_decay: float = 0.05
    warmup: float = 0.25
    seed: int = 3


def pairs(rows: Iterable[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Two successive rollouts of one prompt as chosen and rejected: P(first is chosen) = sigmoid(r_1 - r_2)."""
    rng = np.random.default_rng(seed)
    out, waiting = [], None
    for row in rows:
        if waiting is None or waiting["prompt"] != row["prompt"]:
            waiting = row
            continue
        first, second = waiting, row
        waiting = None
        if rng.random() >= 1 / (1 + np.exp(second["score"] - first["score"])):
            first, second = second, first
        out.append(
            {
                "prompt": first["prompt"],
                "chosen": first["response"],
                "rejected": second["response"],
                "chosen_score": first["score"],
                "rejected_score": second["score"],
            }
        )
    return out


def tune(untuned: Path, preferences: list[dict[str, Any]], folder: Path, settings: DPOSettings) -> None:
    """DPO (Rafailov et al. 2023) with TRL; the result, with its tokenizer, lands in ``folder/final``; resumes checkpoints."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from ivg.demo.pretrain import native_bfloat16

    tokenizer = AutoTokenizer.from_pretrained(untuned)
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_list([{c: row[c] for c in columns} for row in preferences])
    steps = int(len(data) * settings.epochs / settings.batch)
    args = DPOConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch,
        beta=settings.beta,
        weight_decay=settings.weight_decay,
        warmup_steps=int(steps * settings.warmup),
        lr_scheduler_type="cosine",
        seed=settings.seed,
        max_length=96,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=128,
        gradient_checkpointing=False,
        bf16=native_bfloat16(),
        use_cpu=True,
        logging_steps=10,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(untuned, dtype="float32")
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    trainer.save_model(str(folder / "final"))
    tokenizer.save_pretrained(folder / "final")


def pair_accuracy(scores: list[tuple[float, float]]) -> float:
    """Share of (score of the better, score of the worse) in the right order; ties count half."""
    return float(np.mean([0.5 if a == b else float(a > b) for a, b in scores]))
