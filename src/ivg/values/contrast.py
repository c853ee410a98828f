"""Contrast of prompts: one network with an instruction against itself without it.

V(x, y_<=t) = sum_i log pi(y_i | instruction, x, y_<i) - log pi(y_i | x, y_<i): classifier-free guidance (Sanchez et al. 2023,
arXiv 2306.17806), whose negative prompt takes the place of x alone; the contrast that context distillation trains away (Askell et al.
2021, arXiv 2112.00861). The instruction comes with the request (``Prompt.contrast``, ``Prompt.negative``); nothing of it is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivg.errors import ConfigError
from ivg.models.cached_lm import CachedLM
from ivg.models.prompt_encoder import PromptEncoder
from ivg.types import Hypothesis, Value
from ivg.values.implicit import ImplicitValue

if TYPE_CHECKING:
    from torch import Tensor


class PromptContrast(ImplicitValue):
    """The log-ratio of one network with itself: behind the request's instruction, and without it (or behind another one).

    No weights beside the network's: the two read with it and its cache, in one pass; where the one without instruction is the base
    itself, it takes the base's outputs.

    Args:
        model: the network with its tokenizer and template; an instruction is read before its prompts (see
            ``models.chat_template.render``), behind the one that it has itself.
        name: in traces and usage.
    """

    def __init__(self, model: CachedLM, name: str = "contrast") -> None:
        super().__init__(
            model.sharing(f"{name}.tuned", model.template, system=model.system, instruction="contrast"),
            model.sharing(f"{name}.untuned", model.template, system=model.system, instruction="negative"),
            name,
        )
        self.tuned.chat_settings = self.untuned.chat_settings = model.chat_settings
        follow_base(model, self)

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """z(instruction, prompt) - z(prompt), float32 [hypotheses, vocabulary].

        Raises:
            ConfigError: a prompt without instruction, for which all would be 0.
        """
        _require_instructions(hypotheses, self.name)
        return super().deltas(hypotheses)

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor]:
        """See :meth:`ivg.types.Value.recent_deltas`; raises as :meth:`deltas`."""
        _require_instructions(hypotheses, self.name)
        return super().recent_deltas(hypotheses, counts)

    def draft_model(self) -> None:
        """None: a draft would cost what the base costs."""

    def token_scores(self, hypotheses: Sequence[Hypothesis]) -> list[list[float]]:
        """The log-ratio of every response token, in nats; raises as :meth:`deltas`."""
        _require_instructions(hypotheses, self.name)
        return super().token_scores(hypotheses)

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """As :meth:`score` of ``candidates``; raises as :meth:`deltas`."""
        _require_instructions(candidates, self.name)
        return super().score_candidates(hypotheses, candidates)


def _require_instructions(hypotheses: Sequence[Hypothesis], name: str) -> None:
    if any(h.prompt.contrast is None and h.prompt.negative is None for h in hypotheses):
        raise ConfigError(f"{name}: a prompt without instruction\n  give Prompt(…, contrast=TEXT), negative, or both")


def contrast_of(base: PromptEncoder, *, here: bool) -> PromptContrast | None:
    """The base against itself; None: it does not run ``here``, in this process."""
    return PromptContrast(base) if here and isinstance(base, CachedLM) else None


def follow_base(base: PromptEncoder, *values: Value) -> None:
    """Let models of ``values`` that are the base's network take its outputs wherever they read what it has just read."""
    if isinstance(base, CachedLM):
        for value in values:
            for lm in value.cached_lms():
                lm.follow(base)


def choose_contrast(own: Value | None, of_base: PromptContrast | None, method: str, *, instructed: bool) -> Value:
    """The value ``contrast`` of a request.

    Args:
        own: the value that the user gave this name, if any.
        of_base: the base against itself; None: the base runs in another engine.
        method: for errors.
        instructed: the request has an instruction.

    Raises:
        ConfigError: no instruction, or one that the value does not read; or there is no such value.
    """
    found = of_base if own is None else own
    if found is None:
        raise ConfigError(
            f"{method}: the value contrast reads with the base's weights, and the base runs in another engine\n"
            "  leave engine out of the recipe's [run]"
        )
    if isinstance(found, PromptContrast) and not instructed:
        raise ConfigError(f"{method}: the value contrast needs an instruction\n  give contrast=TEXT, negative=TEXT, or both")
    if not isinstance(found, PromptContrast) and instructed:
        raise ConfigError(f"{method}: the recipe's value contrast reads prompts of its own\n  leave contrast and negative out")
    return found
