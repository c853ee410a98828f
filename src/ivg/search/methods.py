"""The table of methods. Each is a row of settings for the one loop in ``search.searcher`` (mathematics: docs/explanation/concepts.md).

``token`` and ``select`` name values: "implicit", "explicit", "reward", "arm", "contrast", or any name that the caller gives to a value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from ivg.errors import ConfigError
from ivg.search.request import Particles, Rejection, Search, Speculation, Tree, check_rule, check_thinking
from ivg.search.selection import FunctionRule
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings, Weights
from ivg.types import Steps, Thinking, TokenGuidance, Value
from ivg.utils.plugins import Plugins

CONTRAST = "contrast"
"""The value that every base gives which runs in this process (``ivg.values.contrast``)."""
_Kind = TypeVar("_Kind", TokenGuidance, Search, Rejection, Particles, Speculation, Tree, Thinking, Steps)


LEVELS: Mapping[str, str] = {
    "tokens and chunks": "Guide tokens and select chunks",
    "tokens": "Guide every token",
    "chunks": "Select chunks",
    "answers": "Select among whole answers",
    "none": "No guidance",
}
"""What methods guide or select, and the same as a title."""


class Combine(Protocol):
    """Makes one value of several: ``values.base.combine_values``, or a function that caches what it makes."""

    def __call__(self, parts: Sequence[tuple[float, Value]], name: str, reference: Sequence[float] | None = None, /) -> Value:
        """The weighted sum of (weight, value) pairs; with ``reference``, the worst of them (``values.base.WorstCaseValue``)."""
        ...


@dataclass(frozen=True)
class Method(SearchSettings):
    """A named set of search settings.

    Attributes:
        name: as users type it.
        summary: one line, with the source.

    Raises:
        ConfigError: a setting out of range, or settings that do not go together: several beams without a value to select by, a rule
            without its value, drafts without a guide.
    """

    name: str
    summary: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft and not (self.token or self.weights):
            raise ConfigError(f"{self.name}: draft={self.draft} and no value that guides tokens\n  give token=implicit, or leave draft out")
        if self.width * self.successors > 1 and not self.selectors and not callable(self.rule):
            raise ConfigError(
                f"{self.name}: W·K = {self.width * self.successors} beams and no value to select by\n"
                "  name one (select=explicit, implicit, reward …) or set width=1, successors=1"
            )
        if self.select_combine == "min" and not self.select_weights:
            raise ConfigError(
                f"{self.name}: select_combine=min is the worst of several values, and there is one\n"
                "  give select_weights=NAME=WEIGHT,NAME=WEIGHT, or select_combine=sum"
            )
        if self.select_reference:
            self._check_reference()
        if self.instructed and not self.reads_contrast:
            name = "contrast" if self.contrast else "negative"
            raise ConfigError(
                f"{self.name}: {name} is an instruction for the value contrast, which this method does not use\n"
                "  give method=contrast, or token=contrast"
            )
        if self.guide_after is not None:
            check_thinking(draft=self.draft, rule=self.rule if isinstance(self.rule, str) else "a function")
        elif self.thinking_budget is not None:
            raise ConfigError(
                f"{self.name}: thinking_budget needs guide_after, the text that ends the thinking\n  give guide_after='</think>'"
            )
        if not isinstance(self.rule, str) and self.original:
            raise ConfigError(f"{self.name}: the rule {self.rule_name} does not use original\n  leave original out")
        if isinstance(self.rule, str) and self.rule not in ("top", "soft"):
            least = self.segment_min if self.rule == "reject" else None
            selects, guided = bool(self.selectors), bool(self.guides)
            check_rule(self, self.rule, selects=selects, guided=guided, draft=self.draft, segment_min=least)

    def _check_reference(self) -> None:
        if self.select_combine != "min":
            raise ConfigError(
                f"{self.name}: select_reference shifts a sum by a constant, which changes no selection\n"
                "  give select_combine=min with it, or leave it out"
            )
        if others := {name for name, _ in self.select_reference} - {name for name, _ in self.select_weights}:
            listed = ", ".join(name for name, _ in self.select_weights)
            raise ConfigError(
                f"{self.name}: select_reference names {', '.join(sorted(others))}\n  expected names of select_weights: {listed}"
            )

    @property
    def guides(self) -> Weights:
        """(name, weight) of the values that guide every token."""
        if not self.beta:
            return ()
        return self.weights or (((self.token, 1.0),) if self.token else ())

    @property
    def selectors(self) -> Weights:
        """(name, weight) of the values that select beams."""
        return self.select_weights or (((self.select, 1.0),) if self.select else ())

    @property
    def rule_name(self) -> str:
        """The selection rule, or the name of the function that is one."""
        return self.rule if isinstance(self.rule, str) else getattr(self.rule, "__name__", type(self.rule).__name__)

    @property
    def level(self) -> str:
        """What the values guide or select, a key of :data:`LEVELS`."""
        if not self.selectors:
            return "tokens" if self.guides else "none"
        if self.chunk_length is None and self.chunk_until is None:
            return "answers"
        return "tokens and chunks" if self.guides else "chunks"

    @property
    def reads_contrast(self) -> bool:
        """Does it name the value ``contrast``, which reads the instructions ``contrast`` and ``negative``?"""
        return CONTRAST in {self.token, self.select, *(name for name, _ in (*self.weights, *self.select_weights))}

    @property
    def instructed(self) -> bool:
        """Is there an instruction for the value ``contrast``?"""
        return self.contrast is not None or self.negative is not None

    @property
    def needs(self) -> frozenset[str]:
        """Names of the values that the method uses."""
        drafters = {self.drafter} if self.rule == "speculate" else set()
        return frozenset(drafters | {name for name, _ in (*self.guides, *self.selectors)})

    def with_settings(self, **settings: Any) -> Method:
        """A copy with other settings. None: unchanged; "none" for ``token`` or ``select``: no value.

        Raises:
            ConfigError: an unknown setting, or see :class:`Method`.
        """
        known = settings_of(SearchSettings)
        if unknown := set(settings) - {*known, "name", "summary"}:
            raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}\n  expected: {', '.join(known)}")
        given = {k: v for k, v in settings.items() if v is not None}
        if given.get("select") and self.select is None and "select_weights" not in given:
            given["select_weights"] = ()  # one value in place of several
        for role in ("token", "select"):
            if given.get(role) == "none":
                given[role] = None
        return replace(self, **given)

    def search(self, values: Mapping[str, Value], combine: Combine | None = None) -> Search:
        """The settings of the loop, with values in place of their names.

        Args:
            values: by name.
            combine: makes one value of several, for ``weights`` and ``select_weights``: ``values.base.combine_values``.

        Raises:
            ConfigError: a value is missing.
        """
        missing = self.needs - set(values)
        if missing:
            options = {"implicit": "--tuned and --untuned", "explicit": "--value", "reward": "--reward", "arm": "--arm"}
            advice = ", ".join(
                f"{options[name]} for {name}" if name in options else f"[values.{name}] in a recipe" for name in sorted(missing)
            )
            raise ConfigError(
                f"method {self.name} needs the value {' and '.join(sorted(missing))}, got {', '.join(sorted(values)) or 'none'}\n"
                f"  give {advice}{'' if values else '; the base alone: --method base'}"
            )
        values = self._with_steps(values)
        guide = self._value(self.guides, bool(self.weights), values, combine)
        reference = None
        if self.select_combine == "min":
            levels = dict(self.select_reference)
            reference = tuple(levels.get(name, 0.0) for name, _ in self.select_weights)
        guidance = None
        if guide is not None:
            guidance = _settings(TokenGuidance, self, value=guide)
        return _settings(
            Search,
            self,
            guidance=guidance,
            value=self._value(self.selectors, bool(self.select_weights), values, combine, reference),
            rule="soft" if self.rule == "soft" else "top",
            make_rule=None if isinstance(self.rule, str) else partial(FunctionRule, self.rule),
            rejection=_settings(Rejection, self) if self.rule == "reject" else None,
            particles=_settings(Particles, self) if self.rule == "particles" else None,
            speculation=_settings(Speculation, self, value=values[self.drafter]) if self.rule == "speculate" else None,
            tree=_settings(Tree, self) if self.rule == "tree" else None,
            thinking=_settings(Thinking, self) if self.guide_after is not None else None,
        )

    def _with_steps(self, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """``values``, those that score steps as the settings say."""
        steps = _settings(Steps, self)
        if steps == Steps():
            return values
        found = {name: stepped for name in self.needs if (stepped := values[name].with_steps(steps)) is not None}
        if not found:
            setting = "step_separator" if self.step_aggregation is None else "step_aggregation"
            raise ConfigError(
                f"{self.name}: {setting}={getattr(self, setting)!r} is for process rewards, and no value here scores steps\n"
                "  give a reward, a classifier of tokens (with step_aggregation also one of texts), and select=reward"
            )
        return {**values, **found}

    def _value(
        self,
        parts: Weights,
        weighted: bool,
        values: Mapping[str, Value],
        combine: Combine | None,
        reference: Sequence[float] | None = None,
    ) -> Value | None:
        """The value that ``parts`` name, or their weighted sum; with ``reference`` the worst of them."""
        if not parts:
            return None
        if not weighted:
            return values[parts[0][0]]
        if combine is None:
            raise ConfigError(f"{self.name}: weights make a composite value\n  give search() a way to combine: combine_values")
        weighted_parts, texts = [(weight, values[name]) for name, weight in parts], [f"{weight:g}*{name}" for name, weight in parts]
        if reference is None:
            return combine(weighted_parts, "+".join(texts))
        return combine(weighted_parts, f"min({', '.join(texts)})", reference)


def _settings(kind: type[_Kind], method: Method, **more: Any) -> _Kind:
    """An object of the search, from the method's settings of the same names and ``more``."""
    shared = {f.name for f in fields(kind)} & settings_of(SearchSettings).keys() - more.keys()
    return kind(**{name: getattr(method, name) for name in shared}, **more)


_CHUNKED: dict[str, Any] = {"width": 4, "successors": 4, "chunk_length": 5}
_TABLE = (
    Method("base", "plain sampling from the base model"),
    Method("bon", "best-of-N: the best of K whole responses", successors=16, select="explicit"),
    Method("soft-bon", "soft best-of-N: one of K whole responses, likelier if better", successors=16, select="explicit", rule="soft"),
    Method("eft", "emulated fine-tuning / proxy tuning: the implicit value guides every token", token="implicit"),
    Method("token-explicit", "a vocabulary head guides every token (IVG, token-wise explicit)", token="explicit"),
    Method("args", "ARGS: a reward re-scores the 10 likeliest tokens", token="explicit", candidates=10),
    Method("fudge", "FUDGE: log P(attribute | prefix) re-scores candidates", token="explicit", candidates=20, transform="log-sigmoid"),
    Method(
        "vas",
        "value-augmented sampling: centred values of 20 candidates, beta 3",
        token="explicit",
        candidates=20,
        beta=3.0,
        transform="centered",
    ),
    Method("genarm", "GenARM: log-probabilities of base and autoregressive reward model", token="arm", normalise=True),
    Method(
        "contrastive-decoding",
        "contrastive decoding: the implicit value of an expert (tuned) and an amateur (untuned) over tokens that the base finds plausible",
        token="implicit",
        plausibility=0.1,
    ),
    Method("contrast", "contrast of prompts (classifier-free guidance): the base with an instruction against itself", token="contrast"),
    Method("eft-gated", "EFT at uncertain tokens only: base entropy of 3 nats or more (SIA)", token="implicit", gate=3.0),
    Method("eft-kl", "EFT with a budget of 10 nats of KL divergence from the base for each answer", token="implicit", kl_budget=10.0),
    Method("cbs-implicit", "chunk-level beam search by the implicit value (weak-to-strong search)", select="implicit", **_CHUNKED),
    Method("cbs-explicit", "chunk-level beam search by the explicit value", select="explicit", **_CHUNKED),
    Method(
        "cbs-soft",
        "soft chunk selection: beams drawn without replacement, likelier if their value is better",
        select="explicit",
        rule="soft",
        **_CHUNKED,
    ),
    Method(
        "rmod",
        "robust multi-objective decoding: the chunk whose worst value is best",
        successors=16,
        chunk_length=16,
        select_weights=(("implicit", 1.0), ("explicit", 1.0)),
        select_combine="min",
    ),
    Method(
        "prm",
        "process rewards: beams of steps (lines), selected by a classifier of steps",
        width=4,
        successors=4,
        chunk_until="\n",
        select="reward",
        step_aggregation="last",
    ),
    Method("cd-blockwise", "blockwise controlled decoding: the best of K chunks", successors=16, chunk_length=5, select="explicit"),
    Method(
        "adaptive",
        "AdaSearch: chunk-level beam search that spends most of its budget on the first chunks",
        select="explicit",
        decay=0.8,
        **_CHUNKED,
    ),
    Method(
        "cards",
        "CARDS: rejection sampling of segments that end at uncertain tokens",
        chunk_length=64,
        select="explicit",
        rule="reject",
    ),
    Method(
        "smc",
        "particle filter: one draw from base·exp(value) by 16 weighted hypotheses",
        width=16,
        chunk_length=5,
        select="explicit",
        rule="particles",
    ),
    Method(
        "mcts",
        "tree search (MCTS) over chunks with the budget of chunk-level beam search (W2S-AlignTree)",
        select="explicit",
        rule="tree",
        **_CHUNKED,
    ),
    Method(
        "rsd",
        "reward-guided speculative decoding: the tuned guide drafts each chunk, the base writes it where the value refuses",
        chunk_length=10,
        select="explicit",
        rule="speculate",
    ),
    Method(
        "gsi",
        "guided speculative inference: as rsd with K drafts, weighted by base and value",
        successors=4,
        chunk_length=10,
        select="explicit",
        rule="speculate",
        tilt=True,
        soft_scale=0.25,
    ),
    Method(
        "ivg",
        "integrated value guidance: implicit token by token, explicit chunk by chunk",
        token="implicit",
        select="explicit",
        **_CHUNKED,
    ),
)

METHODS: dict[str, Method] = {s.name: s for s in _TABLE}
"""The methods of ivg itself by name; :func:`all_methods` has those of other packages, too."""

METHOD_PLUGINS = Plugins("ivg.methods", Method, frozenset({*METHODS, "custom"}))
"""Methods of other packages: entry points that name a :class:`Method` (docs/how-to/plugins.md)."""


def method_names() -> list[str]:
    """Names of all methods, those of other packages included."""
    return [*METHODS, *METHOD_PLUGINS.names]


def all_methods() -> dict[str, Method]:
    """All methods by name, those of other packages included."""
    return METHODS | {name: replace(found, name=name) for name, found in METHOD_PLUGINS.all().items()}


def get_method(name: str, **settings: Any) -> Method:
    """The method called ``name``, with some settings changed.

    Raises:
        ConfigError: no such method, or unusable settings.
    """
    if name == "custom":
        return Method("custom", "free combination").with_settings(**settings)
    if name in METHODS:
        return METHODS[name].with_settings(**settings)
    found = METHOD_PLUGINS.get(name)
    if found is None:
        raise ConfigError(f"unknown method {name!r}\n  expected one of: {', '.join(method_names())}, custom")
    return replace(found, name=name).with_settings(**settings)


def resolve_fallbacks(chosen: Method, values: Collection[str]) -> Method:
    """``chosen`` with the reward model in place of the explicit value, where of the two only that one is among ``values``."""
    for role in ("token", "select"):
        if getattr(chosen, role) == "explicit" and "explicit" not in values and "reward" in values:
            chosen = chosen.with_settings(**{role: "reward"})
    return chosen
