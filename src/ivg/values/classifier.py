"""What rewards by classifiers share, whether these score texts or steps."""

from __future__ import annotations

from typing import Any

from ivg.errors import ConfigError
from ivg.models.support import context_of


def check_label(network: Any, label: int | None, name: str, meaning: str) -> None:
    """Raise where ``label`` is no label of the classifier, or none is given and there are more than two.

    Args:
        network: the classifier.
        label: index of the label that is read.
        name: the reward, for errors.
        meaning: of that label, for errors.

    Raises:
        ConfigError: names the labels that there are.
    """
    labels = network.config.num_labels
    if label is None and labels > 2:
        raise ConfigError(f"{name} has {labels} labels\n  name the one that {meaning}: label=0…{labels - 1}")
    if label is not None and not 0 <= label < labels:
        raise ConfigError(f"{name} has {labels} labels, got label={label}\n  expected 0…{labels - 1}")


def token_limit(network: Any, tokenizer: Any) -> int | None:
    """Tokens that the classifier reads at most; None: no limit."""
    return min((n for n in (context_of(network), tokenizer.model_max_length) if n and 0 < n < 1 << 30), default=None)
