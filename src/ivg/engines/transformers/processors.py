"""Logits processors: all settings that change logits before a token is drawn, except temperature, top-k, top-p and min-p.

The same as transformers' logits processors of the same names (``transformers/generation/logits_process.py``), in the order in which
``generate`` applies them, so that greedy decoding of the base alone equals ``generate``. Where they look back they see prompt and
response. What transformers lacks is as in vLLM (``vllm/v1/sample``), and looks back at the response alone: ``logit_bias`` stands beside
``sequence_bias``, frequency and presence penalty behind the repetition penalty. Unlike transformers' they work on rows with different
settings, and on nothing but the rows that have any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.vocabulary import Vocabulary
from ivg.settings.sampling import ONLY_TRANSFORMERS, STRUCTURES
from ivg.types import Hypothesis, SamplingParams

_FORBIDDEN = float("-inf")
_PROCESSED = (
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "bad_words", "min_length", "min_new_tokens"),
    *ONLY_TRANSFORMERS,
    *STRUCTURES,  # their masks are applied already: only what they and the others leave is looked at
)
_OFF = SamplingParams()

Ids = Sequence[int]
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
    exhausted = (logits.amax(-1) == _FORBIDDEN).nonzero()[:, 0].tolist()
    logits[exhausted] = 0.0
    return frozenset(exhausted)


def forbid_ignored_eos(logits: Tensor, params: Sequence[SamplingParams], eos: Collection[int], *, in_place: bool = True) -> Tensor:
    """``logits`` without end-of-sequence tokens in the rows whose ``params`` ignore them."""
    rows = [i for i, p in enumerate(params) if p.ignore_eos]
    if rows and eos:
        logits = logits if in_place else logits.clone()
        logits[torch.tensor(rows)[:, None], torch.tensor(sorted(eos))] = _FORBIDDEN
    return logits


def _process(z: Tensor, p: SamplingParams, prompt: Ids, response: Ids, vocabulary: Vocabulary) -> None:
    """Change one row [vocabulary] in place."""
    new, total = len(response), len(prompt) + len(response)
    ends = _columns(z, [*vocabulary.eos_ids, *p.stop_token_ids])
    text = [*prompt, *response] if p.sequence_bias or p.bad_words_ids or p.no_repeat_ngram_size or p.repetition_penalty != 1.0 else []
    if p.sequence_bias:
        _bias(z, text, dict(p.sequence_bias).items())  # of a sequence that is given twice the last bias counts
    if p.logit_bias:
        _bias(z, (), [((i,), bias) for i, bias in p.logit_bias])
    if p.repetition_penalty != 1.0:
        _penalise(z, text, p.repetition_penalty)
    if response and (p.frequency_penalty or p.presence_penalty):
        counts = Counter(response)
        _bias(z, (), [((i,), -p.frequency_penalty * count - p.presence_penalty) for i, count in counts.items()])
    if p.no_repeat_ngram_size:
        _forbid(z, _completions(text, p.no_repeat_ngram_size))
    if p.bad_words_ids:
        ending = {(end,) for end in vocabulary.eos_ids}
        _bias(z, text, [(word, _FORBIDDEN) for word in p.bad_words_ids if word not in ending])
    if p.bad_words:
        _bias(z, response, [(word, _FORBIDDEN) for word in vocabulary.word_ids(p.bad_words)])
    if total < p.min_length or new < p.min_new_tokens:
        z[ends] = _FORBIDDEN
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


def _columns(z: Tensor, ids: Iterable[int]) -> Tensor:
    """``ids`` that are columns of ``z``."""
    return torch.tensor(sorted({i for i in ids if i < len(z)}), dtype=torch.long, device=z.device)


def _forbid(z: Tensor, ids: Iterable[int]) -> None:
    z[_columns(z, ids)] = _FORBIDDEN


def _force(z: Tensor, ids: Iterable[int]) -> None:
    z.fill_(_FORBIDDEN)
    z[_columns(z, ids)] = 0.0


def _penalise(z: Tensor, text: Ids, penalty: float) -> None:
    index = _columns(z, text)
    picked = z[index]
    z[index] = torch.where(picked < 0, picked * penalty, picked / penalty)


def _completions(text: Ids, size: int) -> list[int]:
    """Tokens that would complete a sequence of ``size`` tokens that ``text`` has already."""
    if len(text) < size:
        return []
    last = list(text[len(text) - size + 1 :])
    return [text[i + size - 1] for i in range(len(text) - size + 1) if list(text[i : i + size - 1]) == last]


def _bias(z: Tensor, text: Ids, biases: Iterable[tuple[Ids, float]]) -> None:
    """Add the bias of every sequence whose tokens but the last end ``text``, or are all of it."""
    total: dict[int, float] = {}
    for sequence, bias in biases:
        before = len(sequence) - 1
        if before <= len(text) and list(text[len(text) - before :]) == list(sequence[:-1]) and sequence[-1] < len(z):
            total[sequence[-1]] = total.get(sequence[-1], 0.0) + bias
    if total:
        ids = sorted(total)
        z[torch.tensor(ids, device=z.device)] += torch.tensor([total[i] for i in ids], device=z.device)
