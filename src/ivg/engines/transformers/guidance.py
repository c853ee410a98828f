"""Token guidance: how a value moves the base's logits before a token is drawn (METHOD, sections 2 and 6).

Over the whole vocabulary where the value knows it: z + beta * delta. Otherwise over the base's likeliest candidates:
z_v + beta * f(V(prefix + v)), all other tokens out. V(prefix) is the same for all candidates of a row, so leaving it out
changes nothing. Candidates are hypotheses like any other: a value with another tokenizer reads their text. A value that
knows the base's vocabulary has the numbers of all candidates from one pass.

With a gate only rows where the base is uncertain are guided (SIA). The guide does not read the others: their caches are only
handed on to the next hypothesis, and it reads what it has missed when it is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivg.engines.transformers.sampling import entropy
from ivg.errors import ConfigError, ScoreFault
from ivg.models.vocabulary import Vocabulary
from ivg.types import DecodeState, FinishReason, Hypothesis, Prompt, TokenCounter, TokenGuidance, Value, new_key
from ivg.types.scores import require_scores, score_each

DEFAULT_CANDIDATES = 20


@dataclass(slots=True)
class _Candidate:
    """A hypothesis with one more token, for the time of one look."""

    key: int
    parent: int
    prompt: Prompt
    token_ids: Sequence[int]
    text: str
    token_counter: TokenCounter
    vocabulary: Vocabulary
    finish: FinishReason | None = None
    ancestor_key: int | None = None
    inherits: bool = False


def check_guidance(guidance: TokenGuidance, base: Vocabulary) -> None:
    """Raise where full-vocabulary guidance is asked of a value with other tokens.

    Raises:
        VocabularyError: the ids mean different text; names the first that differ.
        ConfigError: drafts of a guidance that cannot draft.
    """
    value = guidance.value
    if guidance.candidates == 0 and value.full_vocabulary():
        base.require_same(
            value.vocabulary,
            f"a guide with another vocabulary can compare candidates as text: candidates={DEFAULT_CANDIDATES} "
            f"(--guide-candidates {DEFAULT_CANDIDATES})",
        )
    check_draft(guidance)


def check_draft(guidance: TokenGuidance) -> None:
    """Raise where tokens are to be drafted and cannot be.

    Raises:
        ConfigError: a value that cannot draft; a guidance that is no sum of logits everywhere.
    """
    if guidance.draft == 0:
        return
    for name in ("candidates", "normalise", "gate"):
        if got := getattr(guidance, name):
            raise ConfigError(f"draft={guidance.draft} verifies z_base + beta * delta at every token, got {name}={got}\n  leave one out")
    if guidance.value.drafter(guidance.beta) is None:
        raise ConfigError(
            f"draft={guidance.draft} needs a value that can draft tokens: a pair of tuned and untuned (implicit)\n"
            f"  got {guidance.value.name} ({type(guidance.value).__name__}), which cannot; leave draft out"
        )


def guided(
    logits: Tensor,
    hypotheses: Sequence[Hypothesis],
    decoded: Sequence[DecodeState],
    guidance: TokenGuidance,
    entropies: Tensor | None = None,
    *,
    in_place: bool = False,
    faults: dict[int, ScoreFault] | None = None,
) -> Tensor:
    """The base's logits [rows, vocabulary], float32, moved by ``guidance``.

    Args:
        logits: of the base, behind the last token of each hypothesis.
        hypotheses: one for each row.
        decoded: up to where each hypothesis' text is decoded (``Vocabulary.continue_text``).
        guidance: what to add.
        entropies: of the base's own distributions, in nats [rows], for the gate; default: those of ``logits``.
        in_place: ``logits`` may be written over.
        faults: receives why the value has no number for a candidate, by row; such a row becomes NaN. None: that is raised.

    Raises:
        ScoreError: the value has no number for a candidate, and ``faults`` is None.
    """
    if guidance.beta == 0:
        return logits
    if guidance.gate == 0:
        return _moved(logits, hypotheses, decoded, guidance, in_place=in_place, faults=faults)
    guidance.value.inherit_cache(hypotheses)  # all sisters at once: whoever comes last takes its parent's cache over
    open_rows = ((entropy(logits) if entropies is None else entropies) >= guidance.gate).nonzero()[:, 0].tolist()
    if not open_rows:
        return logits
    out = logits.clone()
    found: dict[int, ScoreFault] | None = None if faults is None else {}
    some, places = [hypotheses[i] for i in open_rows], [decoded[i] for i in open_rows]
    out[open_rows] = _moved(logits[open_rows], some, places, guidance, faults=found)
    if faults is not None and found:
        faults.update({open_rows[row]: fault for row, fault in found.items()})
    return out


def add_deltas(base: Tensor, deltas: Tensor, beta: float, size: int, *, in_place: bool = False) -> Tensor:
    """``base`` + beta * ``deltas`` [rows, vocabulary]; columns beyond the guide's vocabulary of ``size`` keep the base's logits."""
    width = min(base.shape[1], deltas.shape[1], size)
    out = base if in_place else base.clone()
    out[:, :width].add_(deltas[:, :width].to(base.device), alpha=beta)
    return out


def nan_error(plain: Tensor | None, tokens: int) -> str:
    """What to say of a row whose guided logits are broken; ``plain`` are the base's own, [vocabulary]; None: known to be sound."""
    base = plain is not None and bool(plain.isnan().any() | (plain == torch.inf).any())
    source = "the base model" if base else "token guidance"
    return f"{source} gave NaN or infinity after {tokens} tokens"


def nothing_left(tokens: int) -> str:
    """What to say where the settings of sampling forbid every token."""
    return f"no token may be drawn after {tokens} tokens: suppress_tokens, bad_words_ids, no_repeat_ngram_size and the like forbid all"


def _moved(
    logits: Tensor,
    hypotheses: Sequence[Hypothesis],
    decoded: Sequence[DecodeState],
    guidance: TokenGuidance,
    *,
    in_place: bool = False,
    faults: dict[int, ScoreFault] | None = None,
) -> Tensor:
    """As :func:`guided`, every row."""
    value = guidance.value
    base = logits.log_softmax(-1) if guidance.normalise else logits
    if guidance.candidates == 0 and value.full_vocabulary():
        return add_deltas(base, value.deltas(hypotheses), guidance.beta, value.vocabulary.size, in_place=in_place)
    top = base.topk(min(guidance.candidates or DEFAULT_CANDIDATES, base.shape[1]))
    scores = _known_scores(hypotheses, guidance, top.indices)
    if scores is None:
        candidates = _candidates(hypotheses, decoded, top.indices)
        found = score_each(value, candidates)
        numbers = require_scores(found) if faults is None else [math.nan if isinstance(s, ScoreFault) else s for s in found]
        if faults is not None:
            faults.update({i // top.indices.shape[1]: s for i, s in enumerate(found) if isinstance(s, ScoreFault)})
        scores = torch.tensor(numbers, dtype=torch.float32).view(top.indices.shape)
        value.release([c.key for c in candidates])
    moved = top.values + guidance.beta * _transformed(scores.to(base.device), guidance)
    return torch.full_like(base, -math.inf).scatter(1, top.indices, moved)


def _known_scores(hypotheses: Sequence[Hypothesis], guidance: TokenGuidance, ids: Tensor) -> Tensor | None:
    """Values of the candidates [rows, candidates], up to a constant for each row, from one pass over the prefixes.

    None where the value does not know the base's tokens, or where the constant matters.
    """
    value = guidance.value
    if guidance.transform == "log-sigmoid" or not _shares_tokens(value, hypotheses[0].vocabulary):
        return None
    deltas = value.deltas(hypotheses).to(ids.device)
    return deltas.gather(1, ids) if int(ids.max()) < deltas.shape[1] else None


def _shares_tokens(value: Value, vocabulary: Vocabulary) -> bool:
    """Has ``value``, with all its parts, a number for every next token of ``vocabulary``?"""
    if value.parts:  # first: a composite of two vocabularies has none of its own
        return all(_shares_tokens(part, vocabulary) for _, part in value.parts)
    return value.full_vocabulary() and value.vocabulary.same_as(vocabulary)


def _candidates(hypotheses: Sequence[Hypothesis], decoded: Sequence[DecodeState], ids: Tensor) -> list[_Candidate]:
    out = []
    for h, state, row in zip(hypotheses, decoded, ids.tolist(), strict=True):
        vocabulary: Vocabulary = h.vocabulary
        for token in row:
            tokens = [*h.token_ids, token]
            ends = token in vocabulary.eos_ids  # adds no text, but shows what was held back
            text = h.text + vocabulary.continue_text(h.token_ids if ends else tokens, state, final=ends)[0]
            out.append(_Candidate(new_key(), h.key, h.prompt, tokens, text, h.token_counter, vocabulary))
    return out


def _transformed(scores: Tensor, guidance: TokenGuidance) -> Tensor:
    """Candidate values [rows, candidates] as the method mixes them in."""
    if guidance.transform == "log-sigmoid":
        return torch.nn.functional.logsigmoid(scores)
    if guidance.transform == "centered":
        return scores - scores.mean(1, keepdim=True)
    return scores
