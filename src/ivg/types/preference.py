"""A preference pair: what guides are trained on, and measured against."""

from __future__ import annotations

from dataclasses import dataclass

from ivg.types.messages import Prompt


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt.

    Attributes:
        prompt: text or messages.
        chosen: the better response.
        rejected: the other.
        margin: difference of their rewards, if known.
        chosen_ends: ``chosen`` is complete, so that an end-of-sequence token follows it.
        rejected_ends: the same of ``rejected``.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    chosen_ends: bool = True
    rejected_ends: bool = True
