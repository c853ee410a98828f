"""Token guidance: how a value changes the base's logits before a token is drawn.

Over the whole vocabulary where the value has a score for every next token: z + beta * delta (EFT: Mitchell et al. 2023,
arXiv 2310.12962; IVG: Liu et al. 2024, arXiv 2409.17819). Otherwise over the base's likeliest candidates: z_v + beta * f(V(prefix + v)),
all other tokens forbidden (ARGS: Khanov et al. 2024, arXiv 2402.01694; FUDGE: Yang & Klein 2021, arXiv 2104.05218). V(prefix) is the same
for all candidates of a row, so leaving it out changes nothing. Candidates are hypotheses like any other: a value with another tokenizer
reads their text. A value with the base's vocabulary scores all candidates in one pass.

With ``plausibility`` alpha only tokens remain whose probability under the base is at least alpha times the largest (contrastive
decoding: Li et al. 2023, arXiv 2210.15097, section 2.3): where the base is sure, the guides cannot make it say what it never would.

With an entropy threshold (``gate``) only rows where the base is uncertain are guided. The guide does not read the others: its cache is
handed on to the next hypothesis, and it reads what it has missed when it is needed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ivg.engines.sequences import TokenSequence
from ivg.engines.transformers.sampling import entropy
from ivg.errors import ConfigError, NoTokenFault, ScoreFault
from ivg.models.added_tokens import add_known, added_tokens
from ivg.models.vocabulary import Vocabulary
from ivg.types import Beam, ExpandRequest, TokenGuidance, Value, new_key
from ivg.types.scores import require_scores, score_each_candidate

DEFAULT_CANDIDATES = 20


def check_guidance(guidance: TokenGuidance, base: Vocabulary) -> None:
    """Raise where ``guidance`` does not fit a base with this vocabulary.

    Raises:
        VocabularyError: the ids mean different text; names the first that differ.
        ConfigError: it cannot draft tokens, but is to.
    """
    value = guidance.value
    if guidance.candidates == 0 and value.full_vocabulary():
        base.require_same(
            value.vocabulary,
            f"a guide with another vocabulary can compare candidates as text: candidates={DEFAULT_CANDIDATES} "
            f"(--guide-candidates {DEFAULT_CANDIDATES})",
        )
        if guidance.transform == "log-sigmoid":
            raise ConfigError(
                f"transform=log-sigmoid is of candidates' values, got candidates=0 with {value.name}, which moves all logits\n"
                f"  give candidates, e.g. {DEFAULT_CANDIDATES}, or leave transform out"
            )
    check_draft(guidance)


def check_draft(guidance: TokenGuidance) -> None:
    """Raise where ``guidance`` is to draft tokens and cannot.

    Raises:
        ConfigError: a value that cannot draft; a guidance that is no sum of logits everywhere.
    """
    if guidance.draft == 0:
        return
    for name in ("candidates", "normalise", "gate"):
        if got := getattr(guidance, name):
            raise ConfigError(f"draft={guidance.draft} verifies z_base + beta * delta at every token, got {name}={got}\n  leave one out")
    if guidance.kl_budget is not None:
        raise ConfigError(
            f"draft={guidance.draft} verifies one distribution for each token, got kl_budget={guidance.kl_budget:g}\n  leave one out"
        )
    if guidance.value.drafter(guidance.beta) is None:
        raise ConfigError(
            f"draft={guidance.draft} needs a value that can draft tokens: a pair of tuned and untuned (implicit)\n"
            f"  got {guidance.value.name} ({type(guidance.value).__name__}), which cannot; leave draft out"
        )


def apply_guidance(
    logits: Tensor,
    hypotheses: Sequence[Beam | TokenSequence],
    guidance: TokenGuidance,
    entropies: Tensor | None = None,
    faults: dict[int, ScoreFault] | None = None,
) -> Tensor:
    """The base's logits [rows, vocabulary], float32, with ``guidance``.

    Args:
        logits: of the base, behind the last token of each hypothesis; may be written over.
        hypotheses: one for each row.
        guidance: what to add.
        entropies: of the base's own distributions, in nats [rows], for the gate; default: those of ``logits``.
        faults: receives why the value has no number for a candidate, by key of the hypothesis; its row becomes NaN. None: that is raised.

    Raises:
        ScoreError: the value has no number for a candidate, and ``faults`` is None.
    """
    if guidance.beta == 0:
        return logits
    if guidance.gate == 0:
        return _guide_rows(logits, hypotheses, guidance, faults)
    guidance.value.inherit_cache(hypotheses)  # all at once: the last child takes its parent's cache over
    uncertain = ((entropy(logits) if entropies is None else entropies) >= guidance.gate).nonzero()[:, 0].tolist()
    if uncertain:
        logits[uncertain] = _guide_rows(logits[uncertain], [hypotheses[i] for i in uncertain], guidance, faults)
    return logits


def reads_ahead(guidance: TokenGuidance, vocabulary: Vocabulary) -> bool:
    """Does ``guidance`` need nothing but its value's deltas, where the base has this ``vocabulary`` (:func:`apply_deltas`)?"""
    if guidance.candidates == 0 and guidance.value.full_vocabulary():
        return True
    return guidance.transform != "log-sigmoid" and _shares_tokens(guidance.value, vocabulary)


def apply_deltas(logits: Tensor, deltas: Tensor, guidance: TokenGuidance, vocabulary: Vocabulary) -> Tensor:
    """As :func:`apply_guidance`, where the value's deltas are known.

    Args:
        logits: of the base, float32 [rows, vocabulary]; may be written over.
        deltas: of the value, float32 [rows, vocabulary].
        guidance: :func:`reads_ahead` is true of it.
        vocabulary: of the base.
    """
    if guidance.gate > 0:
        rows = (entropy(logits) >= guidance.gate).nonzero()[:, 0]
        guided = apply_deltas(logits[rows], deltas[rows.to(deltas.device)], replace(guidance, gate=0.0), vocabulary)
        return logits.index_copy_(0, rows, guided)
    implausible = implausible_tokens(logits, guidance)
    base = logits.log_softmax(-1) if guidance.normalise else logits
    return forbid(add_deltas(base, deltas, guidance, vocabulary), implausible)


def implausible_tokens(base: Tensor, guidance: TokenGuidance) -> Tensor | None:
    """Which tokens ``guidance`` forbids for the base's logits [rows, vocabulary], bool of the same shape; None: none."""
    if guidance.plausibility == 0:
        return None
    return base < base.amax(-1, keepdim=True) + math.log(guidance.plausibility)


def forbid(logits: Tensor, tokens: Tensor | None) -> Tensor:
    """``logits``, which are written over, without ``tokens`` (bool of the same shape; None: none). NaN stays: it is an error to report."""
    return logits if tokens is None else logits.masked_fill_(tokens & ~logits.isnan(), -math.inf)


def add_deltas(base: Tensor, deltas: Tensor, guidance: TokenGuidance, vocabulary: Vocabulary) -> Tensor:
    """``base``, which may be written over and has this ``vocabulary``, + beta * ``deltas`` [rows, vocabulary]; of candidates alone.

    Tokens that only the base has: :mod:`ivg.models.added_tokens`.
    """
    candidates = guidance.candidates > 0 or not guidance.value.full_vocabulary()
    if candidates:
        base = _candidates_only(base, _candidates_of(base, guidance))
    guide = smallest_vocabulary(guidance.value)
    width = min(base.shape[1], deltas.shape[1], guide.size)
    known = added_tokens(vocabulary, guide, width, base.shape[1])
    return add_known(base, deltas, guidance.beta, width, known, candidates=candidates)


def smallest_vocabulary(value: Value) -> Vocabulary:
    """What all models of ``value`` know, which has a number for every next token; further columns of their logits only pad."""
    if value.parts:
        return min((smallest_vocabulary(part) for _, part in value.parts), key=lambda known: known.size)
    return min([value.vocabulary, *(lm.vocabulary for lm in value.cached_lms())], key=lambda known: known.size)


def compares_guidance(request: ExpandRequest) -> bool:
    """Does ``request`` report the base's log-probabilities beside the guided ones?"""
    return request.record or request.return_log_ratio or request.alternatives is not None


def nan_error(base: Tensor | None, tokens: int) -> str:
    """Message for a row with NaN or infinity; ``base``: the base's own logits [vocabulary]; None: known to be finite."""
    by_base = base is not None and bool(base.isnan().any() | (base == torch.inf).any())
    return f"{'the base model' if by_base else 'token guidance'} gave NaN or infinity after {tokens} tokens"


def no_token_error(tokens: int, guidance: TokenGuidance | None = None) -> NoTokenFault:
    """Message for a row where the sampling settings forbid every token, or all that ``guidance`` leaves."""
    left = "all"
    if guidance is not None and (guidance.candidates or guidance.plausibility):
        name = "candidates" if guidance.candidates else "plausibility"
        left = f"all that {name}={getattr(guidance, name):g} leaves"
    forbidding = "the grammar of structured output, suppress_tokens, bad_words and the like"
    return NoTokenFault(f"no token may be drawn after {tokens} tokens: {forbidding} forbid {left}")


def _guide_rows(
    logits: Tensor, hypotheses: Sequence[Beam | TokenSequence], guidance: TokenGuidance, faults: dict[int, ScoreFault] | None
) -> Tensor:
    """As :func:`apply_guidance`, every row."""
    implausible = implausible_tokens(logits, guidance)  # before the logits are written over
    return forbid(_guided_rows(logits, hypotheses, guidance, faults), implausible)


def _guided_rows(
    logits: Tensor, hypotheses: Sequence[Beam | TokenSequence], guidance: TokenGuidance, faults: dict[int, ScoreFault] | None
) -> Tensor:
    """As :func:`apply_guidance`, every row, all tokens."""
    value, vocabulary = guidance.value, hypotheses[0].vocabulary
    base = logits.log_softmax(-1) if guidance.normalise else logits
    if reads_ahead(guidance, vocabulary):  # one pass over the prefixes
        return add_deltas(base, value.deltas(hypotheses), guidance, vocabulary)
    top = _candidates_of(base, guidance)
    value.inherit_cache(hypotheses)  # all at once: the last child takes its parent's cache over
    found = score_each_candidate(value, hypotheses, _with_candidates(hypotheses, top.indices))
    numbers = require_scores(found) if faults is None else [math.nan if isinstance(s, ScoreFault) else s for s in found]
    if faults is not None:
        faults.update({hypotheses[i // top.indices.shape[1]].key: s for i, s in enumerate(found) if isinstance(s, ScoreFault)})
    scores = torch.tensor(numbers, dtype=torch.float32, device=base.device).view(top.indices.shape)
    return _candidates_only(base, top, guidance.beta * _transformed(scores, guidance))


def _candidates_of(base: Tensor, guidance: TokenGuidance) -> torch.return_types.topk:
    """The likeliest tokens of ``base`` [rows, vocabulary]: logits and ids, [rows, candidates]."""
    return base.topk(min(guidance.candidates or DEFAULT_CANDIDATES, base.shape[1]))


def _candidates_only(base: Tensor, top: torch.return_types.topk, shift: Tensor | float = 0.0) -> Tensor:
    """Logits like ``base`` [rows, vocabulary] of the candidates ``top`` alone, + ``shift`` [rows, candidates]."""
    return torch.full_like(base, -math.inf).scatter(1, top.indices, top.values + shift)


def _shares_tokens(value: Value, vocabulary: Vocabulary) -> bool:
    """Has ``value``, with all its parts, a number for every next token of ``vocabulary``?"""
    if value.parts:  # first: a composite of two vocabularies has none of its own
        return value.is_sum and all(_shares_tokens(part, vocabulary) for _, part in value.parts)
    return value.full_vocabulary() and value.vocabulary.same_as(vocabulary)


def _with_candidates(hypotheses: Sequence[Beam | TokenSequence], ids: Tensor) -> list[Beam]:
    out = []
    for h, row in zip(hypotheses, ids.tolist(), strict=True):
        for token in row:
            tokens = (*h.token_ids, token)
            ends = token in h.vocabulary.eos_ids or token in h.stop_token_ids  # adds no text, but shows what was held back
            text = h.text + h.vocabulary.continue_text(h.token_ids if ends else tokens, h.decoded, final=ends)[0]
            out.append(Beam(new_key(), h.key, h.prompt, tokens, text, None, h.token_counter, h.vocabulary, inherits=False))
    return out


def _transformed(scores: Tensor, guidance: TokenGuidance) -> Tensor:
    """Candidate values [rows, candidates] as the method adds them."""
    if guidance.transform == "log-sigmoid":
        return torch.nn.functional.logsigmoid(scores)
    if guidance.transform == "centered":
        return scores - scores.mean(1, keepdim=True)
    return scores
