"""Implicit values: what a pair of language models, or one autoregressive reward model, prefers.

V(x, y_<=t) = sum_i log pi_tuned(y_i | .) - log pi_untuned(y_i | .), response tokens only, EOS counted once the response
has ended, no length normalisation (IVG: Liu et al. 2024, arXiv 2409.17819, section 3; weak-to-strong search: Zhou et al. 2024,
arXiv 2405.19262).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ivg.models.cached_lm import CachedLM, read_together
from ivg.models.loading import LoadOptions, Template
from ivg.models.shared import SharedNetworks
from ivg.settings.models import ModelSource
from ivg.types import Hypothesis, Value
from ivg.values.base import CachedLMValue

if TYPE_CHECKING:
    from torch import Tensor


class ImplicitValue(CachedLMValue):
    """The log-ratio of a small tuned and the untuned model that it was tuned from.

    Args:
        tuned: e.g. DPO-tuned.
        untuned: its start; the same vocabulary.
        name: in traces.

    Raises:
        VocabularyError: the two do not share a vocabulary.
    """

    def __init__(self, tuned: CachedLM, untuned: CachedLM, name: str = "implicit") -> None:
        tuned.vocabulary.require_same(untuned.vocabulary, "a tuned model keeps the vocabulary of its untuned start")
        self.tuned, self.untuned, self.name = tuned, untuned, name

    @classmethod
    def from_pretrained(
        cls, tuned: ModelSource, untuned: ModelSource, *, template: Template = None, options: LoadOptions | None = None
    ) -> ImplicitValue:
        """Load both from directories or the hub; of one path, its weights once."""
        networks = SharedNetworks()
        value = cls(networks.load(tuned, "tuned", options, template), networks.load(untuned, "untuned", options, template))
        share_pair_passes([value], networks)
        return value

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """z_tuned - z_untuned on raw logits (EFT: Mitchell et al. 2023, arXiv 2310.12962), float32 [hypotheses, vocabulary]."""
        tuned, untuned = read_together([self.tuned, self.untuned], hypotheses)
        return _difference(tuned.float(), untuned)

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor]:
        """See :meth:`ivg.types.Value.recent_deltas`."""
        tuned, untuned = (model.recent_outputs(hypotheses, counts, drop=1) for model in (self.tuned, self.untuned))
        return [_difference(t, u) for t, u in zip(tuned, untuned, strict=True)]

    def cached_lms(self) -> list[CachedLM]:
        """The tuned and the untuned model."""
        return [self.tuned, self.untuned]

    def drafter(self, beta: float) -> PairDrafter:
        """Drafts from the pair alone (see :class:`PairDrafter`)."""
        return PairDrafter(self, beta)

    def draft_model(self) -> CachedLM | None:
        """The tuned model."""
        return self.tuned

    def token_scores(self, hypotheses: Sequence[Hypothesis]) -> list[list[float]]:
        """The log-ratio of every response token, in nats; their sum is the score."""
        return _log_ratios(self.tuned.token_logps(hypotheses), self.untuned.token_logps(hypotheses))

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """Sum of log-ratios over the response, in nats."""
        return [sum(scores) for scores in self.token_scores(hypotheses)]

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """As :meth:`score` of ``candidates``; what they share is read once."""
        ids = self.tuned.ids_of(candidates)
        tuned = self.tuned.candidate_logps(hypotheses, candidates, ids)
        untuned = self.untuned.candidate_logps(hypotheses, candidates, ids if self.untuned.encodes_as(self.tuned) else None)
        return [sum(scores) for scores in _log_ratios(tuned, untuned)]


def share_pair_passes(values: Iterable[Value], networks: SharedNetworks) -> None:
    """Let the two models of each pair among ``values`` read in the same passes, where their networks have one shape.

    Args:
        values: of whatever kind.
        networks: have loaded all models by now.
    """
    for value in values:
        if isinstance(value, ImplicitValue):
            networks.share_passes(value.untuned, value.tuned)


def _log_ratios(tuned: Sequence[Sequence[float]], untuned: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(t, u, strict=True)] for t, u in zip(tuned, untuned, strict=True)]


class PairDrafter:
    """Drafts z_untuned + beta * (z_tuned - z_untuned): the guided base, if the untuned model stood in its place.

    At beta = 1 that is the tuned model; the untuned one then reads the whole stretch in one pass afterwards. Else both
    read every token.
    """

    def __init__(self, value: ImplicitValue, beta: float) -> None:
        self.value, self.beta = value, beta
        self._known: dict[int, list[Tensor]] = {}

    def logits(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """Draft logits behind the last token, float32 [hypotheses, vocabulary]."""
        if self.beta == 1:
            known = drafted = self.value.tuned.outputs(hypotheses)
        else:
            known, untuned = (out.float() for out in read_together([self.value.tuned, self.value.untuned], hypotheses))
            known = _difference(known, untuned)
            drafted = untuned[:, : known.shape[1]].to(known.device) + self.beta * known
        for h, row in zip(hypotheses, known, strict=True):
            self._known.setdefault(h.key, []).append(row)
        return drafted

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """z_tuned - z_untuned wherever these were asked for logits, float32 [places, vocabulary]."""
        import torch

        known = torch.stack([row for h in hypotheses for row in self._known[h.key]])
        if self.beta != 1:
            return known
        counts = [len(self._known[h.key]) for h in hypotheses]
        untuned = self.value.untuned
        return _difference(
            known, untuned.outputs(hypotheses) if max(counts) == 1 else torch.cat(untuned.recent_outputs(hypotheses, counts))
        )


def _difference(tuned: Tensor, untuned: Tensor) -> Tensor:
    """Over the columns that both have, on the device of ``tuned``, which is float32 and is written over."""
    width = min(tuned.shape[1], untuned.shape[1])
    return tuned[:, :width].sub_(untuned[:, :width].to(tuned.device).float())  # mixed dtypes in one operation take several times as long


class AutoregressiveReward(CachedLMValue):
    """A language model whose log-probability is the reward (GenARM: Xu et al. 2024, arXiv 2410.08193).

    Args:
        model: trained so that log pi_arm(y | x) ranks responses.
        name: in traces.
    """

    def __init__(self, model: CachedLM, name: str = "arm") -> None:
        self.model, self.name = model, name

    def deltas(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """Log pi_arm(. | prefix), float32 [hypotheses, vocabulary]."""
        return self.model.outputs(hypotheses).log_softmax(-1)

    def recent_deltas(self, hypotheses: Sequence[Hypothesis], counts: Sequence[int]) -> list[Tensor]:
        """See :meth:`ivg.types.Value.recent_deltas`."""
        return [outputs.log_softmax(-1) for outputs in self.model.recent_outputs(hypotheses, counts, drop=1)]

    def score(self, hypotheses: Sequence[Hypothesis]) -> list[float]:
        """Log pi_arm(response), in nats."""
        return [sum(logps) for logps in self.model.token_logps(hypotheses)]

    def score_candidates(self, hypotheses: Sequence[Hypothesis], candidates: Sequence[Hypothesis]) -> list[float]:
        """As :meth:`score` of ``candidates``; what they share is read once."""
        return [sum(logps) for logps in self.model.candidate_logps(hypotheses, candidates)]

    def cached_lms(self) -> list[CachedLM]:
        """The model."""
        return [self.model]

    def draft_model(self) -> CachedLM:
        """The model."""
        return self.model
