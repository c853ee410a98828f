"""What would guidance buy, and at what distance from the base? Reward and KL at several guidance weights, on few prompts.

Knows: guided policies along given texts, a judge. Must not know preferences, nor how results are shown.

Texts are drawn from the guided policy at every weight of the sweep (same seeds, so that the weights compare like with like),
and then read once by base and guide: from the logits of one reading follows log pi_beta(text) for *every* beta, since the
guided logits are linear in beta. So each text, whoever wrote it, speaks for all weights (``estimate.mixture_weights``). Why
not from the base's texts alone, which would be cheaper: ordinary importance weights have an effective sample size of about
N exp(-KL), and 50 tokens at beta 1 are easily 10 nats away, so the estimate would rest on one text. ``draw_at=(0,)`` does just
that all the same, and the effective sample sizes show where it ends.

KL(pi_beta || pi_base) of whole responses is the mean over pi_beta of the summed KL of every position's distributions; that
mean of exact terms varies much less than that of log-ratios. Temperature acts after the mixing, on both policies; top-k, top-p
and min-p are left out, because they make the KL infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ivg.diagnostics.intervals import (
    Mean,
    Numbers,
    baselines,
    best_of,
    bootstrap_mean,
    effective_size,
    mixture_weights,
    weighted_means,
)
from ivg.diagnostics.log_ratios import Shift, written
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.settings.sampling import PLAIN_SAMPLING
from ivg.types import Beam, Prompt, SamplingParams, Value
from ivg.types.scores import every, score_each

CHOICES = 4
"""Whole responses that a selecting value is tried on; log 4 - 3/4 = 0.64 nats from the base at most."""


@dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
        betas: guidance weights; 0 is added, first.
        draw_at: weights that texts are drawn at; None: all of them.
        samples: texts for each prompt and weight.
        sampling: temperature, length, ends.
        seed: of all draws.
        batch: texts in flight.
    """

    betas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    draw_at: tuple[float, ...] | None = None
    samples: int = 4
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(dict.fromkeys((0.0, *sorted(map(float, self.betas))))))
        drawn = self.betas if self.draw_at is None else tuple(map(float, self.draw_at))
        object.__setattr__(self, "draw_at", drawn)
        if not all(0 <= b < math.inf for b in self.betas):
            raise ConfigError(f"guidance weights must be finite and 0 or more, got {', '.join(f'{b:g}' for b in self.betas[1:])}")
        if not set(drawn) <= set(self.betas) or 0.0 not in drawn:
            raise ConfigError(f"texts are drawn at beta {drawn}\n  expected some of {self.betas}, 0 among them")
        if self.samples < 2:
            raise ConfigError(f"a sweep needs 2 or more samples for each prompt, got {self.samples}")
        if self.sampling.temperature <= 0:
            raise ConfigError("a sweep draws texts, so its temperature must be above 0\n  give one, e.g. --temperature 0.7")


@dataclass(frozen=True)
class Row:
    """One guidance weight.

    Attributes:
        beta: the weight.
        gain: judge's score above the base's; None without a judge.
        kl: KL(guided || base) of a whole response, in nats.
        length: tokens of a response.
        effective: sample size that the estimates are worth.
    """

    beta: float
    gain: Mean | None
    kl: Mean
    length: float
    effective: float

    @property
    def per_token(self) -> float:
        """KL for each token of the response."""
        return self.kl.value / max(1.0, self.length)


@dataclass(frozen=True)
class Selection:
    """What choosing the best of :data:`CHOICES` whole base responses by one value is worth to the judge."""

    value: str
    gain: Mean


@dataclass(frozen=True)
class Texts:
    """Drawn texts, side by side with which prompt they answer and which of ``Plan.betas`` wrote them (indices)."""

    beams: list[Beam]
    prompts: np.ndarray
    drawn: np.ndarray


def draw(model: GuidedModel, guide: str | None, prompts: Sequence[Prompt], plan: Plan) -> Texts:
    """Texts for every prompt, sample and weight; the same sample has the same random numbers at every weight."""
    params, base = plan.sampling, model.reader
    sampling = replace(params, **PLAIN_SAMPLING)
    jobs = [(p, n, b) for b in (plan.draw_at or ()) for p in range(len(prompts)) for n in range(plan.samples)]
    requests = [
        model.request(prompts[p], "custom", token=guide if b else None, beta=b, seed=plan.seed, index=p * plan.samples + n)
        for p, n, b in jobs
    ]
    requests = [replace(r, sampling=sampling, from_checkpoint={}) for r in requests]
    done = dict(model.run(requests, max_beams=plan.batch))
    beams = [written(base, prompts[p], done[i].text, done[i].token_ids) for i, (p, _, _) in enumerate(jobs)]
    return Texts(beams, np.array([p for p, _, _ in jobs]), np.array([plan.betas.index(b) for _, _, b in jobs]))


def follow(model: GuidedModel, shift: Shift, beam: Beam, plan: Plan) -> tuple[Numbers, Numbers]:
    """(log pi_beta(text), summed KL(pi_beta || pi_base) of its positions), each [betas], float64."""
    base = model.reader
    ids = torch.tensor(beam.token_ids)
    logps, kls = torch.zeros(len(plan.betas), dtype=torch.float64), torch.zeros(len(plan.betas), dtype=torch.float64)
    silent = sorted(base.vocabulary.eos_ids) if plan.sampling.ignore_eos else []
    start = 0
    for logits, delta in shift.blocks(base, beam):
        logits[:, silent] = -torch.inf
        wanted = ids[start : start + len(logits)].to(logits.device)[:, None]
        start += len(logits)
        plain = (logits / plan.sampling.temperature).log_softmax(-1)
        for k, beta in enumerate(plan.betas):
            guided = ((logits + beta * delta) / plan.sampling.temperature).log_softmax(-1)
            logps[k] += guided.gather(1, wanted).double().sum().cpu()
            kls[k] += _kl(guided, plain).double().sum().cpu()
    return logps.numpy(), kls.numpy()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of each row; tokens that neither can write add nothing."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


def judged(judge: Value, beams: Sequence[Beam], batch: int) -> Numbers:
    """The judge's score of every text [texts]."""
    out: list[float] = []
    for start in range(0, len(beams), batch):
        part = beams[start : start + batch]
        out += every(score_each(judge, part))
        judge.release([b.key for b in part])
    return np.array(out)


def sweep(model: GuidedModel, guide: str, texts: Texts, scores: Numbers | None, plan: Plan) -> tuple[Row, ...]:
    """The rows of every weight.

    Args:
        model: with the value called ``guide``, which must be able to shift the base's whole vocabulary.
        guide: name of the value that guides.
        texts: as :func:`draw` gives them.
        scores: the judge's [texts], or None.
        plan: as they were drawn.

    Raises:
        ConfigError: a guide that cannot be followed along a text.
    """
    shift = Shift.of(model.values[guide], model.reader)
    if shift is None:
        raise ConfigError(f"{guide} cannot shift the base's whole vocabulary, so there is no beta to sweep")
    known: dict[tuple[int, tuple[int, ...]], tuple[Numbers, Numbers]] = {}
    for p, beam in zip(texts.prompts.tolist(), texts.beams, strict=True):
        if (p, beam.token_ids) not in known:  # many weights often write the same text
            known[p, beam.token_ids] = follow(model, shift, beam, plan)
    read = [known[p, beam.token_ids] for p, beam in zip(texts.prompts.tolist(), texts.beams, strict=True)]
    logps, kls = np.stack([r[0] for r in read]), np.stack([r[1] for r in read])
    return rows(plan.betas, texts, logps, kls, scores, plan.seed)


def rows(betas: Sequence[float], texts: Texts, logps: Numbers, kls: Numbers, scores: Numbers | None, seed: int = 0) -> tuple[Row, ...]:
    """Estimates for every weight from log pi_beta [texts, betas], summed KL [texts, betas] and the judge's scores [texts]."""
    weights = mixture_weights(logps, texts.drawn)
    effective = effective_size(weights)
    lengths = np.array([len(b.token_ids) for b in texts.beams], dtype=np.float64)
    kl = weighted_means(kls, weights, texts.prompts, seed)
    gains: Sequence[Mean | None] = [None] * len(betas)
    if scores is not None:
        above = scores - baselines(scores, texts.prompts, texts.drawn == 0)
        gains = weighted_means(above[:, None], weights, texts.prompts, seed)
    length = (weights.T @ lengths) / weights.sum(0)
    return tuple(Row(b, g, k, float(n), float(e)) for b, g, k, n, e in zip(betas, gains, kl, length, effective, strict=True))


def selections(values: Mapping[str, Value], texts: Texts, scores: Numbers, plan: Plan) -> tuple[Selection, ...]:
    """Best of :data:`CHOICES` of the base's own texts by each value; () where a prompt has too few of them."""
    if plan.samples < CHOICES:
        return ()
    own = np.flatnonzero(texts.drawn == 0)
    beams, groups = [texts.beams[i] for i in own], texts.prompts[own]
    out = []
    for name, value in values.items():
        by, gains = judged(value, beams, plan.batch), []
        for p in np.unique(groups):
            mine = groups == p
            gains.append(best_of(CHOICES, by[mine], scores[own][mine]) - scores[own][mine].mean())
        out.append(Selection(name, bootstrap_mean(np.array(gains), plan.seed)))
    return tuple(out)
