"""`gold`: the sentiment classifier that scores texts of the embedded models. For evaluation and labels only, never for guidance.

A two-layer bidirectional encoder over mean-pooled tokens (ModernBERT's architecture), trained on crops of reviews, so that
it also works on texts of twenty words. The unlabelled reviews are labelled by a linear model (TF-IDF of words and word
pairs): a small network cannot learn its bigrams from the 25 000 labelled reviews alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivg.utils.jsonl import to_json
from recipes.embedded_models.corpus import Review
from recipes.embedded_models.pretrain import mixed_precision

POSITIONS = 1024


@dataclass(frozen=True)
class GoldConfig:
    """Sizes and budget: ``examples`` crops of ``shortest`` to ``longest`` tokens."""

    hidden: int = 96
    examples: int = 200_000
    batch: int = 64
    shortest: int = 16
    longest: int = 320
    lr: float = 2e-3
    seed: int = 2


def teacher_probabilities(labelled: Sequence[Review], texts: Sequence[str]) -> np.ndarray:
    """P(positive) of ``texts`` by logistic regression on TF-IDF of words and pairs of words; [texts]."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, max_features=200_000, dtype=np.float32)
    x = features.fit_transform([r.text for r in labelled])
    model = LogisticRegression(C=8.0, solver="liblinear").fit(x, [r.label for r in labelled])
    return model.predict_proba(features.transform(texts))[:, 1]


def build(config: GoldConfig, vocabulary: int) -> Any:
    """A fresh classifier with labels NEG (0) and POS (1)."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(config.seed)
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=vocabulary,
            hidden_size=config.hidden,
            intermediate_size=2 * config.hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            # Full attention everywhere. transformers 5.16 requires layers of both kinds, so one has a window as long as the context.
            layer_types=["full_attention", "sliding_attention"],
            local_attention=2 * POSITIONS,
            rope_parameters={kind: {"rope_type": "default", "rope_theta": 160_000.0} for kind in ("full_attention", "sliding_attention")},
            classifier_pooling="mean",
            num_labels=2,
            id2label={0: "NEG", 1: "POS"},
            label2id={"NEG": 0, "POS": 1},
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            cls_token_id=0,
            sep_token_id=0,
            embedding_dropout=0.1,
            mlp_dropout=0.1,
            classifier_dropout=0.1,
        )
    )


def train(reviews: Sequence[Review], targets: np.ndarray, tokenizer: Any, config: GoldConfig, folder: Path) -> Any:
    """Fit P(positive | crop) to ``targets`` [reviews] in [0, 1]; logs to ``folder/log.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [np.asarray(e.ids[:4096], dtype=np.int64) for e in tokenizer.encode_batch_fast([r.text for r in reviews])]
    model = build(config, tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.05, betas=(0.9, 0.98))
    steps = config.examples // config.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(config.seed)
    model.train()
    start, running = time.perf_counter(), 0.0
    for step in range(steps):
        width = int(np.exp(rng.uniform(np.log(config.shortest), np.log(config.longest))))
        rows = max(config.batch, config.batch * 64 // width)  # more rows of short crops, at the same cost
        picks = rng.integers(len(ids), size=rows)
        batch, mask = _crops([ids[i] for i in picks], width, rng)
        with mixed_precision():
            logits = model(input_ids=batch, attention_mask=mask).logits.float()
        wanted = torch.from_numpy(targets[picks]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if (step + 1) % 100 == 0:
            row = {"step": step + 1, "of": steps, "loss": round(running / 100, 4), "seconds": round(time.perf_counter() - start)}
            with (folder / "log.jsonl").open("a") as f:
                f.write(to_json(row) + "\n")
            running = 0.0
    return model.eval()


def _crops(ids: Sequence[np.ndarray], width: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One window of ``width`` tokens of each text, half of them from its beginning: ids and mask [rows, width]."""
    batch = np.zeros((len(ids), width), dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for row, tokens in enumerate(ids):
        spare = max(0, len(tokens) - width)
        offset = int(rng.integers(spare + 1)) if rng.random() < 0.5 else 0
        piece = tokens[offset : offset + width]
        batch[row, : len(piece)], mask[row, : len(piece)] = piece, 1
    return torch.from_numpy(batch), torch.from_numpy(mask)


def accuracy(reward: Any, reviews: Sequence[Review], batch: int = 256) -> float:
    """Share of labelled reviews that the :class:`~ivg.values.reward.RewardModel` classifies correctly."""
    right = 0
    for start in range(0, len(reviews), batch):
        part = reviews[start : start + batch]
        rewards, _ = reward.rewards([r.text for r in part], truncate=True)
        right += sum((value > 0) == (r.label == 1) for value, r in zip(rewards, part, strict=True))
    return right / len(reviews)
