"""The table of methods: every one is a row of settings for the one loop in ``decoding.search`` (METHOD, sections 3, 4, 6).

``token`` and ``select`` name values; which object a name stands for is given by the caller ("implicit", "explicit",
"reward", "arm", or any name of the user's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ivg.decoding.search import Search, check_sizes
from ivg.errors import ConfigError
from ivg.types import TokenGuidance, Value

Transform = Literal["identity", "log-sigmoid", "centered"]


@dataclass(frozen=True)
class Strategy:
    """One method by its settings.

    Attributes:
        name: as users type it.
        summary: one line, with the source.
        width: beams kept (W).
        successors: continuations of each kept beam (K).
        chunk_length: tokens between selections (L); None: the whole response.
        token: name of the value that steers every token, or None.
        select: name of the value that ranks hypotheses, or None.
        beta: token guidance weight.
        candidates: base tokens that a value without vocabulary re-scores; 0: whole vocabulary, where the value knows it.
        transform: of candidate values.
        normalise: mix log-probabilities instead of logits.
        rule: ``top``: the best; ``soft``: drawn with probability proportional to exp(score / soft_scale).
        soft_scale: in units of the score.
        original: treat finished hypotheses as the authors' code does (METHOD, section 3).
    """

    name: str
    summary: str
    width: int = 1
    successors: int = 1
    chunk_length: int | None = None
    token: str | None = None
    select: str | None = None
    beta: float = 1.0
    candidates: int = 0
    transform: Transform = "identity"
    normalise: bool = False
    rule: Literal["top", "soft"] = "top"
    soft_scale: float = 1.0
    original: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the values that this method uses."""
        return frozenset(n for n in (self.token if self.beta else None, self.select) if n)

    def with_settings(self, **settings: Any) -> Strategy:
        """A copy with other settings; ``None`` values are ignored, ``"none"`` for token or select takes the value away.

        Raises:
            ConfigError: a setting that does not exist or is out of range.
        """
        unknown = set(settings) - {f.name for f in fields(self)}
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}\n  expected: {', '.join(f.name for f in fields(self)[2:])}")
        given = {k: v for k, v in settings.items() if v is not None}
        for role in ("token", "select"):
            if given.get(role) == "none":
                given[role] = None
        return replace(self, **given).checked()

    def checked(self) -> Strategy:
        """Itself, or an error.

        Raises:
            ConfigError: W, K, L below one; several candidates and nothing to choose among them by.
        """
        check_sizes(self)
        if self.soft_scale <= 0:
            raise ConfigError(f"soft_scale must be positive, got {self.soft_scale}")
        if self.width * self.successors > 1 and self.select is None:
            raise ConfigError(
                f"{self.name}: W·K = {self.width * self.successors} hypotheses and no value to select by\n"
                "  name one (select=explicit, implicit, reward …) or set width=1, successors=1"
            )
        return self

    def search(self, values: Mapping[str, Value]) -> Search:
        """Settings for the loop, names replaced by objects.

        Raises:
            ConfigError: a value that is not at hand.
        """
        missing = self.needs - set(values)
        if missing:
            have = ", ".join(sorted(values)) or "none"
            raise ConfigError(
                f"method {self.name} needs the value {' and '.join(sorted(missing))}\n"
                f"  got: {have}\n  give the models for it (e.g. --tuned and --untuned for implicit, --value for explicit, --reward)"
            )
        guidance = None
        if self.token and self.beta:
            guidance = TokenGuidance(values[self.token], self.beta, self.candidates, self.transform, self.normalise)
        return Search(
            width=self.width,
            successors=self.successors,
            chunk_length=self.chunk_length,
            guidance=guidance,
            value=values[self.select] if self.select else None,
            rule=self.rule,
            soft_scale=self.soft_scale,
            original=self.original,
        )


_CHUNKED: dict[str, Any] = {"width": 4, "successors": 4, "chunk_length": 5}
_TABLE = (
    Strategy("base", "plain sampling from the base model"),
    Strategy("bon", "best-of-N: the best of K whole responses", successors=16, select="explicit"),
    Strategy("soft-bon", "soft best-of-N: one of K whole responses, likelier if better", successors=16, select="explicit", rule="soft"),
    Strategy("eft", "emulated fine-tuning / proxy tuning: the implicit value guides every token", token="implicit"),
    Strategy("token-explicit", "a vocabulary head guides every token (IVG, token-wise explicit)", token="explicit"),
    Strategy("args", "ARGS: a reward re-scores the 10 likeliest tokens", token="explicit", candidates=10),
    Strategy("fudge", "FUDGE: log P(attribute | prefix) re-scores candidates", token="explicit", candidates=20, transform="log-sigmoid"),
    Strategy(
        "vas",
        "value-augmented sampling: centred values of 20 candidates, beta 3",
        token="explicit",
        candidates=20,
        beta=3.0,
        transform="centered",
    ),
    Strategy("genarm", "GenARM: log-probabilities of base and autoregressive reward model", token="arm", normalise=True),
    Strategy("cbs-implicit", "chunk-level beam search by the implicit value (weak-to-strong search)", select="implicit", **_CHUNKED),
    Strategy("cbs-explicit", "chunk-level beam search by the explicit value", select="explicit", **_CHUNKED),
    Strategy("cd-blockwise", "blockwise controlled decoding: the best of K chunks", successors=16, chunk_length=5, select="explicit"),
    Strategy(
        "ivg",
        "integrated value guidance: implicit token by token, explicit chunk by chunk",
        token="implicit",
        select="explicit",
        **_CHUNKED,
    ),
)

STRATEGIES: dict[str, Strategy] = {s.name: s for s in _TABLE}
"""Every method by name."""


def strategy(name: str, **settings: Any) -> Strategy:
    """The method called ``name``, with some settings changed.

    Raises:
        ConfigError: no such method, or unusable settings.
    """
    if name == "custom":
        return Strategy("custom", "free combination").with_settings(**settings)
    if name not in STRATEGIES:
        raise ConfigError(f"unknown method {name!r}\n  expected one of: {', '.join(STRATEGIES)}, custom")
    return STRATEGIES[name].with_settings(**settings)
