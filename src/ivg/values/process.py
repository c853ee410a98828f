"""Process rewards: the probability that each step of a response is right, and one number from these.

:class:`ProcessReward` is a classifier of tokens, read as TRL's ``PRMTrainer`` trains one: prompt, then each step with its separator, all
of them tokens of their own; the score of a step is read at the last token of its separator (Uesato et al. 2022, arXiv 2211.14275; Lightman
et al. 2023, arXiv 2305.20050). :class:`ivg.values.reward.StepwiseReward` reads a classifier of texts at the end of each step.

The last step of a response is scored as if it ended where the text ends, finished or not. So every hypothesis has a number, two that
differ in their last step alone are told apart, and none gains by never ending a step. Where steps are chunks (``chunk_until``), a
step is cut only by the token limits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ivg.errors import ConfigError, PromptError, ScoreFault
from ivg.models.chat_template import render
from ivg.models.loading import LoadOptions, load_network, load_tokenizer
from ivg.models.placement import input_device
from ivg.models.prompt_template import PromptTemplate
from ivg.models.rotary import length_batches, rope_limits
from ivg.types import Hypothesis, Prompt, Reward, Steps
from ivg.types.scores import Scores, finite_score, require_scores
from ivg.types.steps import DEFAULT_SEPARATOR, aggregate, split_steps
from ivg.values.classifier import check_ids, check_label, token_limit
from ivg.values.truncation import truncate_prompt

if TYPE_CHECKING:
    from ivg.settings.search import StepAggregation

_VARIANTS = 64
"""Settings of steps whose objects are kept for a value: a server may see any number of separators."""


@dataclass(frozen=True)
class StepLogProbs:
    """log p of each step of one response, in nats; how many tokens were read for them, and a note if they do not cover the prompt."""

    steps: list[float]
    tokens: int
    note: str | None = None


class StepReward(Reward):
    """A reward of steps.

    Args:
        name: in usage and traces.
        aggregation: how the probabilities p of the steps make one number: ``last``, ``min``, ``mean`` (all in [0, 1]), or ``product``
            (the logarithm of their product, in nats).
        separator: ends a step.
    """

    def __init__(self, name: str, aggregation: StepAggregation = "last", separator: str = DEFAULT_SEPARATOR) -> None:
        Steps(aggregation, separator)  # checked
        self.name, self.aggregation, self.separator = name, aggregation, separator
        self._variants: dict[Steps, Self] = {}

    @abstractmethod
    def log_probabilities(self, pairs: Sequence[tuple[Prompt, str]]) -> list[StepLogProbs | ScoreFault]:
        """Log p of each step of each (prompt, response), or why it cannot be read."""

    def with_steps(self, steps: Steps) -> Self:
        """This reward with other settings; the same object for the same ones, so that requests are scored together."""
        aggregation, separator = steps.step_aggregation or self.aggregation, steps.step_separator or self.separator
        if (aggregation, separator) == (self.aggregation, self.separator):
            return self
        key = Steps(aggregation, separator)
        if key not in self._variants:
            while len(self._variants) >= _VARIANTS:
                self._variants.pop(next(iter(self._variants)), None)
            other = copy(self)
            other.aggregation, other.separator, other._variants = aggregation, separator, {}
            self._variants[key] = other
        return self._variants[key]

    def judge(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """One number for each (prompt, response).

        Raises:
            ScoreError: some cannot be read; has the scores of all others.
        """
        return require_scores(self._scores(self.log_probabilities(pairs)))

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """One number for prompt + response of each hypothesis; raises as :meth:`judge`."""
        found = self.log_probabilities([(h.prompt, h.text) for h in hypotheses])
        scores = self._scores(found)
        for h, read in zip(hypotheses, found, strict=True):
            if isinstance(read, StepLogProbs):
                h.token_counter.add(self.name, read.tokens)
                if read.note:
                    h.token_counter.note(read.note)
        return require_scores(scores)

    def _scores(self, found: Sequence[StepLogProbs | ScoreFault]) -> Scores:
        name, how = f"the value {self.name}", self.aggregation
        return [read if isinstance(read, ScoreFault) else finite_score(name, aggregate(read.steps, how)) for read in found]


@dataclass(frozen=True)
class _Reading:
    """Token ids of prompt and steps, where the score of each step is read, and a note if they do not cover the prompt."""

    ids: list[int]
    places: list[int]
    note: str | None = None


class ProcessReward(StepReward):
    """A classifier of tokens that scores steps (the layout of TRL's ``PRMTrainer``).

    One label: p = sigmoid(logit). Two: the probability of label 1. More: name the label that means "right".

    Args:
        network: a transformers ``*ForTokenClassification``.
        tokenizer: its own.
        template: how it reads the prompt; ``"chat"``: in the tokenizer's chat template, up to where the answer begins; a format string
            with ``{prompt}``; None: ``"chat"`` for messages, else the text as it is.
        label: index of the label that means "right".
        name: in usage and traces.
        batch_size: texts for each forward pass.
        aggregation: see :class:`StepReward`.
        separator: ends a step, as in training.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        template: str | PromptTemplate | None = None,
        label: int | None = None,
        name: str = "reward",
        batch_size: int = 64,
        *,
        aggregation: StepAggregation = "last",
        separator: str = DEFAULT_SEPARATOR,
    ) -> None:
        super().__init__(name, aggregation, separator)
        check_label(network, label, name, "means right")
        if isinstance(template, str) and "{response}" in template:
            raise ConfigError(
                f"{name} reads steps behind the prompt, so its template has no {{response}}\n  give one with {{prompt}} alone"
            )
        self.network, self.tokenizer, self.label, self.batch_size = network.eval(), tokenizer, label, batch_size
        self.template, self.chat_settings = PromptTemplate.of(template).resolved
        self.limit = token_limit(network, tokenizer)
        """Tokens that the classifier reads at most; None: no limit."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        template: str | PromptTemplate | None = None,
        label: int | None = None,
        options: LoadOptions | None = None,
        name: str = "reward",
        **settings: Any,
    ) -> ProcessReward:
        """Load from a directory or the hub; ``settings``: ``aggregation``, ``separator``.

        Raises:
            ModelError: no classifier of tokens.
        """
        from transformers import AutoModelForTokenClassification

        options = options or LoadOptions()
        tokenizer = load_tokenizer(path, options, name)
        network = load_network(path, AutoModelForTokenClassification, options, name)
        return cls(network, tokenizer, template, label, name, **settings)

    def log_probabilities(self, pairs: Sequence[tuple[Prompt, str]]) -> list[StepLogProbs | ScoreFault]:
        """Log p of each step; a prompt that is too long loses its beginning, and a note says so."""
        readings: list[_Reading | ScoreFault] = []
        for prompt, response in pairs:
            try:
                readings.append(self._read(prompt, response))
            except PromptError as e:
                readings.append(ScoreFault(str(e), prompt=True))
        found = iter(self._log_probabilities([r for r in readings if isinstance(r, _Reading)]))
        return [r if isinstance(r, ScoreFault) else StepLogProbs(next(found), len(r.ids), r.note) for r in readings]

    def note(self, prompt: Prompt, response: str) -> str | None:
        """What is left out when this is scored; None: nothing."""
        try:
            return self._read(prompt, response).note
        except PromptError:
            return None

    def check(self, prompt: Prompt, new_tokens: int) -> None:
        """Raise PromptError where the template refuses the prompt; any length is accepted."""
        self._prompt_ids(_parts(prompt, "")[0])

    def networks(self) -> list[tuple[str, Any]]:
        """The classifier."""
        return [(self.name, self.network)]

    def _read(self, prompt: Prompt, response: str) -> _Reading:
        prompt, response = _parts(prompt, response)
        ids, places = self._step_ids(response)
        check_ids(ids, self.network, self.tokenizer, self.name)

        def joined(before: list[int], note: str | None = None) -> _Reading:
            return _Reading(before + ids, [len(before) + place for place in places], note)

        before, limit = self._prompt_ids(prompt), self.limit
        if limit is None or len(before) + len(ids) <= limit:
            return joined(before)
        short = truncate_prompt(prompt, lambda shorter: len(self._prompt_ids(shorter)) + len(ids) <= limit)
        if short is None:
            raise PromptError(
                f"{self.name} reads at most {limit} tokens, and the steps alone have {len(ids)}\n"
                "  ask for fewer new tokens, or use a reward model with a longer context"
            )
        return joined(self._prompt_ids(short), f"{self.name} reads at most {limit} tokens: the beginning of the prompt was left out")

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt behind one beginning-of-sequence token, where the tokenizer has any."""
        text = render(prompt, self.tokenizer, self.template, self.name, self.chat_settings)
        ids, bos = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids), self.tokenizer.bos_token_id
        check_ids(ids, self.network, self.tokenizer, self.name)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _step_ids(self, response: str) -> tuple[list[int], list[int]]:
        """(each step with its separator, the last token of each separator)."""
        ids: list[int] = []
        places = []
        ending = list(self.tokenizer(self.separator, add_special_tokens=False).input_ids)
        for step in split_steps(response, self.separator):
            ids += [*self.tokenizer(step, add_special_tokens=False, verbose=False).input_ids, *ending]
            places.append(len(ids) - 1)
        return ids, places

    def _log_probabilities(self, readings: Sequence[_Reading]) -> list[list[float]]:
        """Log p at every place; texts of similar length share a batch."""
        out: list[list[float]] = [[] for _ in readings]
        limits = rope_limits(self.network.config.get_text_config())
        for chosen in length_batches([len(r.ids) for r in readings], self.batch_size, limits):
            rows = [readings[i] for i in chosen]
            width, device = max(len(r.ids) for r in rows), input_device(self.network)
            ids = torch.tensor([[*r.ids, *[0] * (width - len(r.ids))] for r in rows], device=device)
            mask = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows], device=device)
            with torch.no_grad():
                logits = self.network(input_ids=ids, attention_mask=mask).logits
            for k, (i, r) in enumerate(zip(chosen, rows, strict=True)):
                at_steps = logits[k, r.places].float()
                if at_steps.shape[1] == 1:
                    out[i] = torch.nn.functional.logsigmoid(at_steps[:, 0]).tolist()
                else:
                    out[i] = at_steps.log_softmax(-1)[:, 1 if self.label is None else self.label].tolist()
        return out


def _parts(prompt: Prompt, response: str) -> tuple[Prompt, str]:
    """Prompt and response, where the response has the text with which the prompt began it."""
    begun = prompt.continued
    return (prompt, response) if begun is None else (replace(prompt, content=prompt.content[:-1]), begun + response)
