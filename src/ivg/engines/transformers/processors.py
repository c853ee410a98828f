"""Logits processors: all settings that change logits before a token is drawn, except temperature, top-k, top-p and min-p.

The same as transformers' logits processors of the same names (``transformers/generation/logits_process.py``), in the order in which
``generate`` applies them, so that greedy decoding of the base alone equals ``generate``. Where they look back they see prompt and
response. What transformers lacks is as in vLLM (``vllm/v1/sample``), and looks back at the response alone: ``logit_bias`` stands beside
``sequence_bias``, frequency and presence penalty behind the repetition penalty. Unlike transformers' they work on rows with different
settings, and on nothing but the rows that have any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from ivg.engines.token_penalties import FORBIDDEN, Ids, TokenPenalties, add_biases, columns
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.vocabulary import Vocabulary
from ivg.settings.sampling import ONLY_TRANSFORMERS, STRUCTURES
from ivg.types import Hypothesis, SamplingParams

_PROCESSED = (
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "bad_words", "min_length", "min_new_tokens"),
    *ONLY_TRANSFORMERS,
    *STRUCTURES,  # their masks are applied already: only what they and the others leave is looked at
)
_OFF = SamplingParams()

Contexts = Callable[[int], tuple[Ids, Ids]]
"""Of a row: the tokens of its prompt, and those of its response before the one that is drawn."""


def changes_logits(params: SamplingParams) -> bool:
    """Does :func:`process_logits` change anything for ``params``?"""
    return bool(changing_settings(params))


def changing_settings(params: SamplingParams) -> list[str]:
    """Names of the settings in ``params`` for which :func:`process_logits` changes anything."""
    return [name for name in _PROCESSED if getattr(params, name) != getattr(_OFF, name)]


def contexts_of(base: PromptEncoder, nodes: Sequence[Hypothesis]) -> Contexts:
    """Those of rows behind ``nodes``, which ``base`` reads."""
    return lambda row: (base.prompt_ids(nodes[row].prompt), nodes[row].token_ids)


def process_logits(
    logits: Tensor, params: Sequence[SamplingParams], contexts: Contexts, vocabulary: Vocabulary
) -> tuple[Tensor, frozenset[int]]:
    """(logits [rows, vocabulary] as ``params`` change them, rows whose tokens are all forbidden, which become uniform).

    ``logits`` itself where nothing changes, else a copy.

    Args:
        logits: guidance mixed in, float32.
        params: one for each row.
        contexts: called for rows that change alone.
        vocabulary: of the columns.
    """
    known = {id(p): p for p in params}
    changed = {key for key, p in known.items() if changes_logits(p)}
    rows = [row for row, p in enumerate(params) if id(p) in changed]
    if not rows:
        return logits, frozenset()
    out = logits.clone()
    for row in rows:
        prompt, response = contexts(row)
        _process(out[row], params[row], prompt, response, vocabulary)
    return out, clear_exhausted(out)


def clear_exhausted(logits: Tensor) -> frozenset[int]:
    """The rows of ``logits`` whose tokens are all forbidden; they become uniform."""
    exhausted = (logits.amax(-1) == FORBIDDEN).nonzero()[:, 0].tolist()
    logits[exhausted] = 0.0
    return frozenset(exhausted)


def forbid_ignored_eos(logits: Tensor, params: Sequence[SamplingParams], eos: Collection[int], *, in_place: bool = True) -> Tensor:
    """``logits`` without end-of-sequence tokens in the rows whose ``params`` ignore them."""
    rows = [i for i, p in enumerate(params) if p.ignore_eos]
    if rows and eos:
        logits = logits if in_place else logits.clone()
        logits[torch.tensor(rows)[:, None], torch.tensor(sorted(eos))] = FORBIDDEN
    return logits


def _process(z: Tensor, p: SamplingParams, prompt: Ids, response: Ids, vocabulary: Vocabulary) -> None:
    """Change one row [vocabulary] in place."""
    new, total = len(response), len(prompt) + len(response)
    ends = columns(z, [*vocabulary.eos_ids, *p.stop_token_ids])
    text = [*prompt, *response] if p.sequence_bias or p.bad_words_ids or p.no_repeat_ngram_size else []
    if p.sequence_bias:
        add_biases(z, text, dict(p.sequence_bias).items())  # of a sequence that is given twice the last bias counts
    if p.logit_bias:
        add_biases(z, (), [((i,), bias) for i, bias in p.logit_bias])
    TokenPenalties.of(p, vocabulary).apply(z, prompt, response)
    if p.no_repeat_ngram_size:
        _forbid(z, _completions(text, p.no_repeat_ngram_size))
    if p.bad_words_ids:
        ending = {(end,) for end in vocabulary.eos_ids}
        add_biases(z, text, [(word, FORBIDDEN) for word in p.bad_words_ids if word not in ending])
    if total < p.min_length or new < p.min_new_tokens:
        z[ends] = FORBIDDEN
    if p.forced_bos_token_id is not None and total == 1:
        _force(z, [p.forced_bos_token_id])
    if p.forced_eos_token_id and new == p.max_new_tokens - 1:
        _force(z, p.forced_eos_token_id)
    if p.exponential_decay_length_penalty is not None:
        start, factor = p.exponential_decay_length_penalty
        if new > start:
            raised = z[ends].abs() * (factor ** (new - start) - 1)
            z[ends] += raised.masked_fill(~z[ends].isfinite(), 0.0)
    if p.suppress_tokens:
        _forbid(z, p.suppress_tokens)
    if p.begin_suppress_tokens and new == (1 if p.forced_bos_token_id is not None and len(prompt) == 1 else 0):
        _forbid(z, p.begin_suppress_tokens)


def _forbid(z: Tensor, ids: Iterable[int]) -> None:
    z[columns(z, ids)] = FORBIDDEN


def _force(z: Tensor, ids: Iterable[int]) -> None:
    z.fill_(FORBIDDEN)
    z[columns(z, ids)] = 0.0


def _completions(text: Ids, size: int) -> list[int]:
    """Tokens that would complete a sequence of ``size`` tokens that ``text`` has already."""
    if len(text) < size:
        return []
    last = list(text[len(text) - size + 1 :])
    return [text[i + size - 1] for i in range(len(text) - size + 1) if list(text[i : i + size - 1]) == last]
