"""The sizes and budgets of the embedded models, in one place."""

from __future__ import annotations

from typing import Any

from ivg.demo.pretrain import Phase, PretrainConfig

VOCABULARY = 4096
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
    phases=(Phase(layers=2, tokens=13_500_000, window=256), Phase(layers=5, tokens=7_200_000, window=512)),
)
"""6.0 M parameters. Depth grows from 2 to 5 layers after two thirds of the tokens."""

GUIDE = PretrainConfig(
    model=_llama(128, 4, tied=True), phases=(Phase(layers=3, tokens=12_000_000, window=256),), seed=1
)
"""1.1 M parameters: `untuned`, and where `tuned`, `value` and `gold` start from."""
