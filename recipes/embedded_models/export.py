"""Finished models to ``src/ivg/embedded``: float16 weights, model cards, and metrics on held-out data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ivg.diagnostics.stats import wins
from ivg.utils.jsonl import jsonable, read_jsonl
from recipes.embedded_models import config
from recipes.embedded_models.corpus import read_reviews
from recipes.embedded_models.pretrain import PretrainConfig, evaluate

MODELS = ("base", "untuned", "tuned", "value", "value-other", "gold")
PRETRAINED = {"base": config.BASE, "untuned": config.GUIDE}
HELD_OUT_TOKENS = 200_000
"""The first tokens of the corpus; no model is trained on them."""
LIMIT = 25_000_000
"""Maximum bytes of all weights together."""


def export(work: Path, data: Path, out: Path) -> dict[str, Any]:
    """Copy the models of ``work/final`` to ``out`` as float16, measure the copies, write model cards and metrics.json."""
    for name in MODELS:
        save_float16(work / "final" / name, out / name)
    size = sum(p.stat().st_size for p in out.glob("*/model.safetensors"))
    if size > LIMIT:
        raise ValueError(f"the embedded models take {size} bytes, expected at most {LIMIT}")
    metrics = measure(work, data, out)
    (out / "metrics.json").write_text(json.dumps(jsonable(metrics), indent=2, allow_nan=False) + "\n")
    for name in MODELS:
        (out / name / "README.md").write_text(model_card(name, metrics))
    return metrics


def save_float16(source: Path, target: Path) -> None:
    """Copy one model directory in float16, without training logs."""
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = "float16"
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(work: Path, data: Path, out: Path) -> dict[str, Any]:
    """Accuracy of `gold` on full test reviews; pair accuracy and correlation of the values on held-out rollouts."""
    from ivg.model import GuidedModel
    from ivg.values.explicit import ExplicitValue
    from ivg.values.reward import RewardModel
    from recipes.embedded_models.gold import accuracy

    gold = RewardModel.from_pretrained(out / "gold", name="gold")
    test = read_reviews(data, "test")
    model = GuidedModel.from_pretrained(out / "base", tuned=out / "tuned", untuned=out / "untuned", value=out / "value")
    model.add_value("value-other", ExplicitValue.from_pretrained(out / "value-other", name="value-other"))
    metrics: dict[str, Any] = {"gold": {"accuracy_full_test_reviews": round(accuracy(gold, test), 4), "reviews": len(test)}}
    for name in ("pair", "value"):
        rows = list(read_jsonl(work / f"rollouts-{name}.jsonl"))
        held = rows[len(rows) * 9 // 10 :][:2000]
        metrics[f"held_out_{name}_rollouts"] = {"responses": len(held), **_value_metrics(model, held)}
    for name, how in PRETRAINED.items():
        metrics[name] = _perplexity(work, out / name, how)
    return metrics


def _perplexity(work: Path, folder: Path, how: PretrainConfig) -> dict[str, float]:
    """Perplexity on the held-out reviews in windows of 256 tokens, and the number of tokens seen in training."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    held_out = np.load(work / "stream.npy")[:HELD_OUT_TOKENS]
    nats = evaluate(model, held_out, window=256, rows=256)
    return {
        "tokens_seen": sum(phase.tokens // how.batch_tokens for phase in how.phases) * how.batch_tokens,
        "held_out_nats_per_token": round(nats, 4),
        "perplexity": round(float(np.exp(nats)), 1),
    }


def _value_metrics(model: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pair accuracy (two responses to one prompt) and Pearson correlation of each value with `gold`."""
    from ivg.types import Beam, Prompt, TokenCounter, new_key

    out: dict[str, float] = {}
    beams = [
        Beam(
            new_key(),
            None,
            Prompt(r["prompt"]),
            tuple(r["token_ids"]),
            r["response"],
            token_counter=TokenCounter(),
            vocabulary=model.base.vocabulary,
        )
        for r in rows
    ]
    gold = np.array([r["score"] for r in rows])
    for name in ("implicit", "explicit", "value-other"):
        value = model.values[name]
        scores = []
        for start in range(0, len(beams), 256):
            part = beams[start : start + 256]
            scores += value.score(part)
            value.release([b.key for b in part])
        pairs = [
            (scores[i], scores[i + 1]) if gold[i] > gold[i + 1] else (scores[i + 1], scores[i])
            for i in range(0, len(rows) - 1, 2)
            if rows[i]["prompt"] == rows[i + 1]["prompt"] and gold[i] != gold[i + 1]
        ]
        better, worse = np.array(pairs).T
        out[f"{name}_pair_accuracy"] = round(float(wins(better, worse).mean()), 4)
        out[f"{name}_correlation"] = round(float(np.corrcoef(scores, gold)[0, 1]), 4)
    return out


_WHAT = {
    "base": ("the base model", "Llama, 5 layers of 256, about 6 million parameters, pre-trained on film reviews."),
    "untuned": ("the untuned guide", "Llama, 3 layers of 128, about 1.1 million parameters, pre-trained on film reviews."),
    "tuned": (
        "the tuned guide",
        "DPO (TRL) of `untuned`, towards praise, on pairs sampled from it and labelled by Bradley-Terry from `gold`.",
    ),
    "value": ("the explicit value", "Vocabulary head (`score_head.weight`) on the body of `untuned`, FUDGE targets, gold rewards."),
    "value-other": ("a value with another tokenizer", "Scalar head (`score.weight`), own byte-level BPE of 2048 entries, FUDGE targets."),
    "gold": (
        "the evaluation classifier",
        "Two-layer encoder, sentiment of film reviews, labels NEG and POS. For evaluation only, never for guidance.",
    ),
}


def model_card(name: str, metrics: dict[str, Any]) -> str:
    """A model card: what it is, from what, what was measured."""
    role, what = _WHAT[name]
    relevant = {
        "gold": {"gold": metrics["gold"]},
        "base": {"base": metrics["base"]},
        "untuned": {"untuned": metrics["untuned"]},
    }.get(name, {k: v for k, v in metrics.items() if k.startswith("held_out")})
    return f"""---
license: apache-2.0
language: en
library_name: transformers
tags: [ivg, inference-time-alignment, demo]
---
# {name}: {role} of ivg's embedded models

{what}

Data: Large Movie Review Dataset (Maas et al. 2011), splits train and unsupervised; its test split was never trained on.
Small and made for demonstrations and tests: it writes film reviews in English and nothing else.

Built by `python -m recipes.embedded_models.build --data ../shared/data/imdb`, which also measured these weights:

```json
{json.dumps(jsonable(relevant), indent=2, allow_nan=False)}
```
"""
