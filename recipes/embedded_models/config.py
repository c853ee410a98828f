"""Sizes and training budgets of the embedded models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ivg.settings.train import DPOSettings, ValueSettings, ValueTrainSettings
from recipes.embedded_models.gold import GoldConfig
from recipes.embedded_models.pretrain import Phase, PretrainConfig

VOCABULARY = 4096
OTHER_VOCABULARY = 2048
CONTEXT = 512


def _llama(hidden: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


BASE = PretrainConfig(
    model=_llama(256, 4, tied=False),
    phases=(Phase(layers=2, tokens=13_500_000, window=256), Phase(layers=5, tokens=6_600_000, window=512)),
)
"""6.0 M parameters. Depth grows from 2 to 5 layers after two thirds of the tokens."""

GUIDE = PretrainConfig(model=_llama(128, 4, tied=True), phases=(Phase(layers=3, tokens=8_000_000, window=256),), seed=1)
"""1.1 M parameters: `untuned`, from which `tuned` and `value` are trained."""

GOLD = GoldConfig()
DPO = DPOSettings(
    num_train_epochs=2.0,
    learning_rate=5e-4,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=1,
    max_length=96,
    warmup_steps=0.25,
    weight_decay=0.05,
    eval_share=0.1,
    evaluations=1,
    save_steps=100,
    seed=3,
)
"""The hyperparameters of Liu et al. 2024 (arXiv 2409.17819) for IMDb, with fewer epochs to save time."""
PAIR_PROMPTS = 9_600
VALUE_PROMPTS = 4_800
VALUE = ValueTrainSettings(
    num_train_epochs=2.0,
    learning_rate=1.5e-3,
    per_device_train_batch_size=64,
    gradient_accumulation_steps=1,
    max_length=96,
    weight_decay=0.02,
    eval_share=0.1,
    seed=4,
)
VALUE_OTHER = replace(VALUE, learning_rate=2e-3, seed=5)
SCALAR = ValueSettings(head="scalar")
OTHER_BODY: dict[str, Any] = {
    "vocab_size": OTHER_VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
