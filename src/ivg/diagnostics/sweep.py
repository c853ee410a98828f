"""What would guidance gain, and at what KL from the base? Reward and KL at several guidance weights (beta), on few prompts.

Texts are sampled from the guided policy at every beta (with the same seeds), then read once by base and guide. Since guided logits are
linear in beta, one pass gives log pi_beta(text) for every beta, and every text informs the estimate for all of them
(:func:`~ivg.diagnostics.stats.mixture_weights`). Sampling from the base alone (``sample_at=(0,)``) is cheaper, but its effective sample
size is about N exp(-KL), and 50 tokens at beta 1 are easily 10 nats from the base; the effective sample sizes show where it fails.

KL(pi_beta || pi_base) of whole responses is the mean over pi_beta of the summed KL of each position's distributions, which varies less
than the mean of log-ratios. Temperature is applied to both policies after guidance; top-k, top-p and min-p are left out, because they
make the KL infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ivg.diagnostics.logits import GuidanceLogits, kl, response_beam
from ivg.diagnostics.stats import (
    Estimate,
    Floats,
    bootstrap_mean,
    effective_size,
    expected_best_of,
    leave_one_out_baselines,
    mixture_weights,
    weighted_means,
)
from ivg.errors import ConfigError
from ivg.model import GuidedModel
from ivg.settings.check import PreferenceSettings
from ivg.settings.sampling import PLAIN_SAMPLING
from ivg.types import Beam, Prompt, SamplingParams, Value
from ivg.types.scores import require_scores, score_each

BEST_OF = 4
"""N of the best-of-N that values are tried on; at most log 4 - 3/4 = 0.64 nats from the base."""


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep samples.

    Attributes:
        betas: guidance weights; 0 is put first.
        sample_at: weights that texts are sampled at; None: all.
        samples: texts for each prompt and weight.
        sampling: temperature, length, stop.
        seed: random seed.
        batch: texts that are generated or scored together.
    """

    betas: tuple[float, ...] = PreferenceSettings.weights_of(PreferenceSettings.betas)
    sample_at: tuple[float, ...] | None = None
    samples: int = PreferenceSettings.samples
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(dict.fromkeys((0.0, *sorted(map(float, self.betas))))))
        sample_at = self.betas if self.sample_at is None else tuple(map(float, self.sample_at))
        object.__setattr__(self, "sample_at", sample_at)
        if not all(0 <= b < math.inf for b in self.betas):
            raise ConfigError(f"betas must be finite and at least 0, got {', '.join(f'{b:g}' for b in self.betas[1:])}")
        if not set(sample_at) <= set(self.betas) or 0.0 not in sample_at:
            raise ConfigError(f"sample_at is {sample_at}\n  expected some of {self.betas}, 0 among them")
        if self.samples < 2:
            raise ConfigError(f"a sweep needs at least 2 samples for each prompt, got {self.samples}")
        if self.sampling.temperature <= 0:
            raise ConfigError("a sweep samples texts, so its temperature must be above 0\n  give e.g. --temperature 0.7")


@dataclass(frozen=True)
class SweepRow:
    """One guidance weight.

    Attributes:
        beta: the weight.
        gain: the judge's score minus the base's; None without a judge.
        kl: KL(guided || base) of a whole response in nats.
        length: mean tokens of a response.
        effective_size: effective sample size of the estimates, in texts.
    """

    beta: float
    gain: Estimate | None
    kl: Estimate
    length: float
    effective_size: float

    @property
    def kl_per_token(self) -> float:
        """KL for each token of the response, in nats."""
        return self.kl.mean / max(1.0, self.length)


@dataclass(frozen=True)
class BestOfGain:
    """The judge's score of the best of :data:`BEST_OF` base responses by one value, minus that of a random one."""

    value: str
    gain: Estimate


@dataclass(frozen=True)
class SampledTexts:
    """Texts, with the index of the prompt that each answers and of the beta that it was sampled at [texts]."""

    beams: list[Beam]
    prompts: np.ndarray
    sampled_at: np.ndarray


def sample_texts(model: GuidedModel, guide: str | None, prompts: Sequence[Prompt], settings: SweepSettings) -> SampledTexts:
    """Texts for every prompt, sample and weight; a sample has the same random numbers at every weight."""
    sampling = replace(settings.sampling, **PLAIN_SAMPLING)
    tasks = [(p, n, b) for b in (settings.sample_at or ()) for p in range(len(prompts)) for n in range(settings.samples)]
    requests = [
        model.request(prompts[p], "custom", token=guide if b else None, beta=b, seed=settings.seed, index=p * settings.samples + n)
        for p, n, b in tasks
    ]
    requests = [replace(r, sampling=sampling, from_checkpoint={}) for r in requests]
    done = dict(model.run(requests, max_beams=settings.batch))
    beams = [response_beam(model.reader, prompts[p], done[i].text, done[i].token_ids) for i, (p, _, _) in enumerate(tasks)]
    return SampledTexts(beams, np.array([p for p, _, _ in tasks]), np.array([settings.betas.index(b) for _, _, b in tasks]))


def text_logps_and_kls(model: GuidedModel, guidance: GuidanceLogits, beam: Beam, settings: SweepSettings) -> tuple[Floats, Floats]:
    """(log pi_beta(text), summed KL(pi_beta || pi_base) of its positions), each [betas], float64."""
    base = model.reader
    ids = torch.tensor(beam.token_ids)
    logps, kls = torch.zeros(len(settings.betas), dtype=torch.float64), torch.zeros(len(settings.betas), dtype=torch.float64)
    excluded = sorted(base.vocabulary.eos_ids) if settings.sampling.ignore_eos else []
    start = 0
    for logits, delta in guidance.blocks(base, beam):
        logits[:, excluded] = -torch.inf
        wanted = ids[start : start + len(logits)].to(logits.device)[:, None]
        start += len(logits)
        plain = (logits / settings.sampling.temperature).log_softmax(-1)
        for k, beta in enumerate(settings.betas):
            guided = ((logits + beta * delta) / settings.sampling.temperature).log_softmax(-1)
            logps[k] += guided.gather(1, wanted).double().sum().cpu()
            kls[k] += kl(guided, plain).double().sum().cpu()
    return logps.numpy(), kls.numpy()


def score_texts(value: Value, beams: Sequence[Beam], batch: int) -> Floats:
    """A value's (or a judge's) score of every text [texts]."""
    out: list[float] = []
    for start in range(0, len(beams), batch):
        part = beams[start : start + batch]
        out += require_scores(score_each(value, part))
        value.release([b.key for b in part])
    return np.array(out)


def sweep(model: GuidedModel, guide: str, texts: SampledTexts, scores: Floats | None, settings: SweepSettings) -> tuple[SweepRow, ...]:
    """Gain and KL at every beta.

    Args:
        model: base and values.
        guide: name of the value that guides tokens.
        texts: of :func:`sample_texts`.
        scores: the judge's scores [texts], or None.
        settings: that the texts were sampled with.

    Raises:
        ConfigError: the value cannot guide over the base's whole vocabulary.
    """
    guidance = GuidanceLogits.from_value(model.values[guide], model.reader)
    if guidance is None:
        raise ConfigError(f"{guide} cannot guide over the base's whole vocabulary, which a sweep of beta needs")
    known: dict[tuple[int, tuple[int, ...]], tuple[Floats, Floats]] = {}
    for p, beam in zip(texts.prompts.tolist(), texts.beams, strict=True):
        if (p, beam.token_ids) not in known:  # several betas often give the same text
            known[p, beam.token_ids] = text_logps_and_kls(model, guidance, beam, settings)
    read = [known[p, beam.token_ids] for p, beam in zip(texts.prompts.tolist(), texts.beams, strict=True)]
    logps, kls = np.stack([r[0] for r in read]), np.stack([r[1] for r in read])
    return sweep_rows(settings.betas, texts, logps, kls, scores, settings.seed)


def sweep_rows(
    betas: Sequence[float], texts: SampledTexts, logps: Floats, kls: Floats, scores: Floats | None, seed: int = 0
) -> tuple[SweepRow, ...]:
    """Estimates for every beta from log pi_beta [texts, betas], summed KL [texts, betas] and the judge's scores [texts]."""
    weights = mixture_weights(logps, texts.sampled_at)
    sizes = effective_size(weights)
    lengths = np.array([len(b.token_ids) for b in texts.beams], dtype=np.float64)
    kl = weighted_means(kls, weights, texts.prompts, seed)
    gains: Sequence[Estimate | None] = [None] * len(betas)
    if scores is not None:
        above = scores - leave_one_out_baselines(scores, texts.prompts, texts.sampled_at == 0)
        gains = weighted_means(above[:, None], weights, texts.prompts, seed)
    length = (weights.T @ lengths) / weights.sum(0)
    return tuple(SweepRow(b, g, k, float(n), float(e)) for b, g, k, n, e in zip(betas, gains, kl, length, sizes, strict=True))


def best_of_gains(values: Mapping[str, Value], texts: SampledTexts, scores: Floats, settings: SweepSettings) -> tuple[BestOfGain, ...]:
    """Best-of-:data:`BEST_OF` of the base's texts by each value; () if there are fewer samples for each prompt."""
    if settings.samples < BEST_OF:
        return ()
    from_base = np.flatnonzero(texts.sampled_at == 0)
    beams, prompts, scores = [texts.beams[i] for i in from_base], texts.prompts[from_base], scores[from_base]
    out = []
    for name, value in values.items():
        by = score_texts(value, beams, settings.batch)
        gains = [
            expected_best_of(BEST_OF, by[prompts == p], scores[prompts == p]) - scores[prompts == p].mean() for p in np.unique(prompts)
        ]
        out.append(BestOfGain(name, bootstrap_mean(gains, seed=settings.seed)))
    return tuple(out)
