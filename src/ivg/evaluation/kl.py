r"""KL divergence of a method from the base, in nats for an answer: an estimate, or an upper bound where hypotheses are selected.

**Token guidance.** For an answer y, E[sum_t log pi_guided(y_t) - log pi_base(y_t)] is the KL divergence per answer; the mean of the sums
over sampled answers (``Completion.guide_shift``, at the request's temperature, before top-k and top-p) estimates it without bias. Where
something truncates the distribution afterwards (top-k, top-p, min-p, a repetition penalty, greedy choice), it estimates no divergence.

**Selection** adds an amount that can only be bounded. Chunk search CBS(W, K, L) draws hypotheses from pi_guided: W*K for the first chunk,
then K for every kept beam and chunk. Let N(y) be the number of draws of a complete hypothesis y of C chunks. Every drawn prefix is
extended at most once, by K draws (W*K at the root), so E[N(y)] <= W K^C pi_guided(y). The answer is one of those drawn:

    p(y) <= P(N(y) >= 1) <= E[N(y)] <= W K^C pi_guided(y),
    KL(p || pi_base) = E_p[log p/pi_guided] + E_p[log pi_guided/pi_base] <= log W + E[C] log K + E[sum of shifts].

With one beam (W = 1) every chunk is the best of K, and the chain rule with the best-of-N bound log N - (N - 1)/N (Beirami et al. 2024,
arXiv 2401.01879) for each chunk is tighter; a method whose answers are all one chunk is best-of-(W*K). This does not hold for an answer
of several beams that happens to end in its first chunk, since it continued to compete. Where the number of draws varies between chunks,
W K^C becomes the product of the draws; so it does for soft selection, to which the tighter bound does not apply.

**A lower bound of any method** comes from the rewards of its answers alone: KL does not grow when only a function of the answer is looked
at (data processing), and KL of the mixtures over prompts is at most the mean KL. With f(y) = (reward(y) > t),

    KL(p || pi_base) >= p_t log(p_t/q_t) + (1 - p_t) log((1 - p_t)/(1 - q_t)),    p_t = P_p(reward > t), q_t = P_base(reward > t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ivg.evaluation.metrics import mean_over_prompts
from ivg.search.methods import Method
from ivg.search.selection import budgets
from ivg.settings.sampling import PLAIN_SAMPLING
from ivg.types import SamplingParams
from ivg.types.steps import finished_steps


def kl_to_base(method: Method, sampling: SamplingParams, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, str | None]:
    """(mean KL with its interval, and whether it is an upper ``bound``; None), or (None; the reason why it is unknown).

    Args:
        method: of the answers.
        sampling: of the answers.
        rows: transcript rows without errors.
    """
    kls, reason = kl_by_answer(method, sampling, rows)
    return (None, reason) if kls is None else ({**mean_over_prompts(kls), "bound": bool(method.selectors)}, None)


def kl_by_answer(
    method: Method, sampling: SamplingParams, rows: Sequence[dict[str, Any]]
) -> tuple[list[tuple[str, float]] | None, str | None]:
    """(prompt, KL in nats) of every answer, whose mean is the estimate or bound; or None and the reason, see :func:`kl_to_base`."""
    selects, limit = bool(method.selectors), sampling.max_new_tokens
    cut = truncations(sampling)
    if method.guides and cut:
        return None, f"guidance is measured before {cut}, which {'changes' if ',' not in cut else 'change'} the distribution"
    one_chunk = method.chunk_until is None and (method.chunk_length is None or method.chunk_length >= limit)
    best_of_chunks = method.width == 1 or one_chunk
    kls = []
    for row in rows:
        added = 0.0
        if selects:
            draws = draws_per_chunk(method, len(row["token_ids"]), limit, row["text"] if method.chunk_until is not None else "")
            if draws is None:
                return None, "no useful bound is known for the method"
            added = selection_bound(draws, best_of_chunks=best_of_chunks, soft=method.rule == "soft")
        kls.append((row["id"], row["shift"] + added))
    return kls, None


def selection_bound(draws: Sequence[int], *, best_of_chunks: bool, soft: bool = False) -> float:
    """Upper bound of what selection adds to the KL divergence, in nats (see the module's text).

    Args:
        draws: continuations of the answer's prefix that were drawn for each chunk: W*K, then K, K …
        best_of_chunks: every chunk is the best of its draws (one beam, or answers of one chunk).
        soft: selection samples by weight instead of taking the best.
    """
    if soft or not best_of_chunks:
        return sum(map(math.log, draws))
    return sum(math.log(n) - (n - 1) / n for n in draws)


def draws_per_chunk(method: Method, tokens: int, limit: int, text: str = "") -> list[int] | None:
    """Upper bound of the draws for each chunk of an answer; None for rules without such a bound.

    Args:
        method: its width, successors, chunks and decay.
        tokens: of the answer.
        limit: ``max_new_tokens`` of the request.
        text: of the answer, in which chunks may end (``chunk_until``).
    """
    if method.rule not in ("top", "soft") or (method.decay < 1.0 and method.chunk_until is not None):
        return None
    decay, w, k = method.decay, method.width, method.successors
    chunks = num_chunks(tokens, method.chunk_length)
    if method.chunk_until is not None and tokens:  # a chunk ends with a step, or L tokens after it began
        chunks = finished_steps(text, method.chunk_until) + 1 + (tokens // method.chunk_length if method.chunk_length else 0)
    if decay < 1.0:
        length = method.chunk_length or limit
        planned = budgets(-(-limit // length), w * k, decay, w)[:chunks]
        return [n if i == 0 else -(-n // w) for i, n in enumerate(planned)]
    return [w * k if i == 0 else k for i in range(chunks)]


def num_chunks(tokens: int, chunk_length: int | None) -> int:
    """The number of chunks of an answer, where chunks have a length alone."""
    return 0 if tokens == 0 else 1 if chunk_length is None else -(-tokens // chunk_length)


def truncations(sampling: SamplingParams) -> str | None:
    """The settings that change the distribution after guidance, in words; None if there is none."""
    settings = {
        "greedy choice": sampling.temperature == 0,
        "top-k": sampling.top_k > 0,
        "top-p": sampling.top_p < 1,
        "min-p": sampling.min_p > 0,
    } | {name.replace("_", " "): True for name in sampling.changed if name in PLAIN_SAMPLING and name not in ("top_k", "top_p", "min_p")}
    return ", ".join(name for name, on in settings.items() if on) or None


def kl_from_rewards(rewards: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> float:
    """Lower bound of the KL of a method from the base, in nats, estimated from rewards (see the module's text); 0 where it says nothing.

    The threshold is chosen on the prompts of even position and used on those of odd position, and the other way round, since one chosen on
    the same answers would find a difference in noise. Base answers above the threshold are counted as one more than there are, so that
    none above it does not mean an infinite KL.

    Args:
        rewards: of the method's answers, by prompt.
        base: of the base's answers, by prompt.
    """
    ids = [i for i in rewards if i in base]
    folds = [[np.array([v for i in ids[half::2] for v in x[i]], dtype=np.float64) for x in (rewards, base)] for half in (0, 1)]
    if not all(len(x) for fold in folds for x in fold):
        return 0.0
    found = []
    for (method_here, base_here), (method_there, base_there) in (folds, folds[::-1]):
        thresholds = np.unique(np.concatenate([method_here, base_here]))
        best = max(thresholds.tolist(), key=lambda t: _binary_kl(method_here, base_here, t))
        found.append(_binary_kl(method_there, base_there, best))
    return max(0.0, sum(found) / len(found))


def _binary_kl(method: Any, base: Any, threshold: float) -> float:
    """KL of (reward > threshold); of a method whose answers are the lower ones 0."""
    p, q = float((method > threshold).mean()), (float((base > threshold).sum()) + 1) / (len(base) + 1)
    if p <= q:
        return 0.0
    return p * math.log(p / q) + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)
