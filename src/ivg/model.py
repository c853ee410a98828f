"""A frozen base model with the values that can guide it: the object that users hold.

It knows which methods its values allow and turns settings into requests; the search itself is :mod:`ivg.search.searcher`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, overload
from weakref import WeakValueDictionary

from ivg.embedded import path
from ivg.engines.components import Components
from ivg.engines.transformers.engine import TransformersEngine
from ivg.errors import ConfigError, IVGError, PromptError
from ivg.models.cached_lm import local_reader
from ivg.models.chat_template import with_chat_settings
from ivg.models.generation_config import GenerationConfigMode, GenerationDefaults, defaults_of
from ivg.models.loading import LoadOptions, RoleOptions, enable_images, options_of
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.prompt_template import PromptTemplate
from ivg.models.shared import SharedNetworks
from ivg.search.generation import GenerationMixin
from ivg.search.given import NEUTRAL, given_logprobs
from ivg.search.methods import CONTRAST, Method, get_method, method_names, resolve_fallbacks
from ivg.search.request import Request
from ivg.search.searcher import Searcher, check_engine
from ivg.settings.chat import CHAT_SETTINGS
from ivg.settings.images import ImagesConfig
from ivg.settings.models import ROLES, ModelSource, check_pair, check_roles
from ivg.settings.sampling import DEFAULT_SAMPLING as DEFAULT_SAMPLING
from ivg.settings.search import MAX_BEAMS
from ivg.types import Engine, Prompt, ResponseLogprobs, SamplingParams, TokenGuidance, Value
from ivg.types.messages import Conversation, PromptLike, read_prompts
from ivg.types.scores import require_scores, score_each
from ivg.utils.locks import FairLock
from ivg.values.base import CombinationCache, CompositeValue, RewardFunction, as_value
from ivg.values.contrast import PromptContrast, choose_contrast, contrast_of, follow_base
from ivg.values.explicit import ExplicitValue
from ivg.values.implicit import AutoregressiveReward, ImplicitValue, share_pair_passes
from ivg.values.reward import load_reward

_SAMPLING = frozenset(f.name for f in fields(SamplingParams))
Response = str | Sequence[int]
"""A response that is given: text, or tokens of the base."""


class GuidedModel(GenerationMixin, Components):
    """A base model and named values.

    >>> from ivg import GuidedModel
    >>> model = GuidedModel.embedded()
    >>> print(model.generate("The movie was", method="ivg", seed=1).text)
    >>> model.add_value("short", lambda prompt, response: -len(response))
    >>> best = model.generate("The movie was", "bon", select="short", successors=8)
    >>> print(best.text, best.score)

    Several threads may use one model: they take turns, one round of the search or one call of :meth:`score` at a time, and every answer is
    the same as from a single thread. The lock is not held between rounds, so iterations over :meth:`run` may be interleaved or abandoned.
    A value that is a Python function must not wait for another thread that uses the model. Two models that share language models have two
    locks: use them from one thread.

    Args:
        base: the frozen model that writes; a :class:`~ivg.models.cached_lm.CachedLM`, unless ``engine`` runs it.
        values: by name: ``implicit``, ``explicit``, ``reward``, ``arm``, or any; a base that runs here also gives ``contrast``.
        sampling: defaults of every request; None: :data:`DEFAULT_SAMPLING` with what the base's checkpoint sets.
        max_beams: hypotheses in flight at most.
        engine: makes beams longer; default: the transformers engine over ``base``.
        generation_config: ``auto``: the base's ``generation_config.json`` gives defaults of sampling; ``ignore``: only its
            end-of-sequence tokens are used.

    Raises:
        ConfigError: the checkpoint sets something that changes its texts and is not supported here.

    Attributes:
        sampling: the defaults of every request, all filled in.
        generation_config: those of them that the checkpoint sets.
        generation_config_left_out: what else it sets that does not apply here, with the reasons.
    """

    def __init__(
        self,
        base: PromptEncoder,
        values: Mapping[str, Value] | None = None,
        sampling: SamplingParams | None = None,
        max_beams: int = MAX_BEAMS,
        engine: Engine | None = None,
        generation_config: GenerationConfigMode = "auto",
    ) -> None:
        self.base, self.max_beams = base, max_beams
        self.values = {name: as_value(value, name) for name, value in (values or {}).items()}
        defaults = defaults_of(base.generation_config, base.name, generation_config) if sampling is None else GenerationDefaults()
        own = {name: value for name, value in defaults.settings.items() if value != getattr(DEFAULT_SAMPLING, name)}
        self.generation_config: dict[str, Any] = own
        self.generation_config_left_out = dict(defaults.left_out)
        self.sampling = replace(DEFAULT_SAMPLING, **own) if sampling is None else sampling
        self.lock = FairLock()
        self.engine: Engine = TransformersEngine(local_reader(base)) if engine is None else engine
        self._combined = CombinationCache()
        self._given = WeakValueDictionary[int, Value]()
        """Values of running requests by the id of the object that was given in place of a name: one for all that give the same."""
        self._contrast = contrast_of(base, here=isinstance(self.engine, TransformersEngine))
        follow_base(base, *self.values.values())

    @classmethod
    def from_pretrained(
        cls,
        base: ModelSource,
        *,
        tuned: ModelSource | None = None,
        untuned: ModelSource | None = None,
        value: str | Path | None = None,
        reward: str | Path | None = None,
        arm: ModelSource | None = None,
        templates: Mapping[str, str | PromptTemplate] | None = None,
        options: RoleOptions = None,
        generation_config: GenerationConfigMode = "auto",
        networks: SharedNetworks | None = None,
        images: bool | ImagesConfig = False,
    ) -> GuidedModel:
        """Load everything from directories or the hub; language models of one path share its weights.

        Args:
            base: the model to guide; a :class:`~ivg.settings.models.ModelRef` has an adapter, instruction or other settings of its own.
            tuned: small tuned guide; makes the value ``implicit`` together with ``untuned``.
            untuned: what ``tuned`` was tuned from.
            value: value network (any layout of ``models.value_head``): ``explicit``.
            reward: sequence classifier, or a Python function (``file.py:function``): ``reward``.
            arm: autoregressive reward model: ``arm``.
            templates: how each role reads a prompt: ``{"base": "chat", "tuned": PromptTemplate("raw")}``; ``untuned`` follows ``tuned``.
            options: device, dtype, revision and the like: of all models, or by role: ``{"base": LoadOptions(device="auto"), ...}``.
            generation_config: ``auto``, or ``ignore`` what the base's checkpoint sets for sampling.
            networks: load with these, and leave it to the caller to call :func:`~ivg.values.implicit.share_pair_passes` at the end.
            images: load for pictures a base that transformers can also load for text alone; or all settings of pictures.
        """
        check_pair(tuned, untuned)
        media = ImagesConfig(enabled=images) if isinstance(images, bool) else images
        shapes, of = dict(templates or {}), {role: replace(options_of(options, role), images=media.enabled) for role in ROLES}
        check_roles("template", shapes)
        check_roles("options", {} if options is None or isinstance(options, LoadOptions) else options)
        here = SharedNetworks() if networks is None else networks
        values, load = dict[str, Value](), here.load
        if tuned is not None and untuned is not None:
            values["implicit"] = ImplicitValue(
                load(tuned, "tuned", of["tuned"], shapes.get("tuned")),
                load(untuned, "untuned", of["untuned"], shapes.get("untuned", shapes.get("tuned"))),
            )
        writer = enable_images(load(base, "base", of["base"], shapes.get("base")), of["base"], media)
        if value is not None:  # behind the base, on whose network it may be a head
            values["explicit"] = ExplicitValue.from_pretrained(value, template=shapes.get("value"), options=of["value"], networks=here)
        if reward is not None:
            values["reward"] = load_reward(reward, template=shapes.get("reward"), options=of["reward"])
        if arm is not None:
            values["arm"] = AutoregressiveReward(load(arm, "arm", of["arm"], shapes.get("arm")))
        if networks is None:
            share_pair_passes(values.values(), here)
        return cls(writer, values, generation_config=generation_config)

    @classmethod
    def embedded(cls, options: RoleOptions = None, networks: SharedNetworks | None = None) -> GuidedModel:
        """The small movie-review models that come with the package; ``options`` as in :meth:`from_pretrained`."""
        guides: dict[str, Any] = {role: path(role) for role in ("tuned", "untuned", "value")}
        model = cls.from_pretrained(path("base"), **guides, options=options, networks=networks)
        other = ExplicitValue.from_pretrained(path("value-other"), options=options_of(options, "value"), name="explicit-other")
        model.values["explicit-other"] = other
        return model

    def add_value(self, name: str, value: Value | Callable[[str, str], float] | Mapping[str, float], *, replace: bool = False) -> None:
        """Give a value a name, by which methods and settings refer to it.

        Args:
            name: e.g. ``explicit``, which many methods select by, or any other.
            value: a :class:`~ivg.Value`, a function of (prompt text, response text), or weights of known values: their weighted sum.
            replace: replace a value of that name without a warning.

        Raises:
            ConfigError: something else, or an unknown value among the weights.
        """
        if isinstance(value, Mapping):
            missing = set(value) - set(self.values)
            if missing:
                raise ConfigError(f"no value called {', '.join(sorted(missing))}\n  expected some of: {', '.join(self.values) or 'none'}")
            value = CompositeValue([(w, self.values[n]) for n, w in value.items()], name)
        if name in self.values and not replace:
            warnings.warn(f"add_value replaces the value {name!r}; pass replace=True if that is intended", stacklevel=2)
        self.values[name] = found = as_value(value, name)
        follow_base(self.base, found)

    @property
    def methods(self) -> list[str]:
        """Named methods whose values the model has and which the engine supports."""
        return [name for name in method_names() if self._allows(name)]

    def _allows(self, method: str) -> bool:
        try:
            chosen = self.get_method(method)
            if not chosen.needs - {CONTRAST} <= set(self.values):
                return False
            check_engine(self.engine, self.request("x", self.with_instruction(chosen)))
        except IVGError:
            return False
        return True

    def with_instruction(self, method: Method) -> Method:
        """``method``, with some instruction where it needs one and has none: for checks before any request."""
        takes = method.reads_contrast and isinstance(self.values.get(CONTRAST, self._contrast), PromptContrast)
        return method.with_settings(contrast="x") if takes and not method.instructed else method

    def get_method(self, method: str | Method = "ivg", **settings: Any) -> Method:
        """A method with settings; the reward model takes the place of the explicit value where there is none."""
        return _get_method(method, settings, self.values)

    def request(
        self,
        prompt: PromptLike,
        method: str | Method = "ivg",
        *,
        seed: int = 0,
        index: int = 0,
        trace: bool = False,
        record: bool = False,
        alternatives: int | None = None,
        sampling: SamplingParams | None = None,
        **settings: Any,
    ) -> Request:
        """One request. ``settings`` are those of ``SamplingParams``, ``Method`` and :class:`~ivg.settings.chat.ChatSettings`.

        ``token`` and ``select`` are names of values, or values themselves (``select=2 * a - b``); ``rule`` may be a function of your own.
        ``record`` fills ``Completion.guide_shift``; ``trace`` also keeps the tree of beams; ``alternatives`` fills
        ``Completion.details`` with so many of the likeliest tokens at each position, guided and not; ``sampling`` has the defaults of
        this request, in place of the model's.

        Raises:
            ConfigError: unknown or invalid settings; a value that the method needs is missing.
        """
        given = {k: v for k, v in settings.items() if k in _SAMPLING and v is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        rest = {k: v for k, v in settings.items() if k not in _SAMPLING | CHAT_SETTINGS}
        values = self._with_given(rest)
        chosen = _get_method(method, rest, values)
        if chosen.reads_contrast:
            found = choose_contrast(values.get(CONTRAST), self._contrast, chosen.name, instructed=chosen.instructed)
            values = {**values, CONTRAST: found}
        search = chosen.search(values, self._combined)
        wanted = with_chat_settings(prompt, settings, self.base.template)
        wanted = replace(self.base.read_images(wanted), contrast=chosen.contrast, negative=chosen.negative)
        own = {k: v for k, v in self.generation_config.items() if k not in given and sampling is None}
        sampling = self._sampling(wanted, given, own, sampling)
        return Request(wanted, search, sampling, seed, index, trace, record, alternatives, from_checkpoint=own)

    def _with_given(self, settings: dict[str, Any]) -> dict[str, Value]:
        """The values by name, with those that ``token`` and ``select`` give as objects, whose names then stand in their places."""
        values = dict(self.values)
        for role in ("token", "select"):
            if (given := settings.get(role)) is None or isinstance(given, str):
                continue
            value = self._given.setdefault(id(given), as_value(given, getattr(given, "__name__", role)))
            if self.values.get(value.name, value) is not value:
                raise ConfigError(
                    f"{role} is a value called {value.name!r}, and the model has another of that name\n  give it another name"
                )
            settings[role] = name = value.name if values.get(value.name, value) is value else f"{value.name} ({role})"
            values[name] = value
        return values

    def _sampling(
        self, prompt: Prompt, given: Mapping[str, Any], own: Mapping[str, Any], defaults: SamplingParams | None
    ) -> SamplingParams:
        """The request's settings over ``defaults``; None: over the model's, whose length is cut to what the context has left.

        Token ids of ``own``, which are the checkpoint's, are not checked: ``generate`` lets those pass.
        """
        more: dict[str, Any] = {}
        if defaults is None and "max_new_tokens" not in given and (limit := self.base.max_positions) is not None:
            try:
                with self.lock:
                    left = limit - len(self.base.prompt_ids(prompt))
            except PromptError:
                left = 0  # the search refuses it
            if 0 < left < self.sampling.max_new_tokens:
                more["max_new_tokens"] = left
        if "min_new_tokens" in given and "min_length" not in given:
            more["min_length"] = 0  # as in transformers: one replaces the other
        found = replace(defaults or self.sampling, **{**more, **given})
        found.check_token_ids(self.base.vocab_size, without=own.keys())
        return found

    def searcher(self, max_beams: int | None = None) -> Searcher:
        """A new search loop over this model's engine, which takes turns with the model's other loops."""
        return Searcher(self.engine, max_beams or self.max_beams, self.lock)

    def score(self, prompt: PromptLike, responses: Sequence[str], value: str | Value | RewardFunction = "explicit") -> list[float]:
        """Scores of given responses by a value: its name, or itself (``2 * a - b``, a function of prompt and response).

        Raises:
            ConfigError: no such value.
            PromptError: a response that is no text, or a text in place of a list.
            ScoreError: some have no finite score; has the scores of all others.
        """
        if isinstance(value, str) and value not in self.values:
            raise ConfigError(f"no value called {value!r}\n  expected one of: {', '.join(self.values) or 'none'}")
        if isinstance(responses, str | bytes):
            raise PromptError(f"responses is the text {responses[:40]!r}\n  expected a list of responses: [response]")
        found = self.values[value] if isinstance(value, str) else as_value(value, getattr(value, "__name__", "value"))
        with self.lock:
            hypotheses = [self.base.make_beam(Prompt.of(prompt), text) for text in responses]
            try:
                return require_scores(score_each(found, hypotheses))
            finally:
                found.release([h.key for h in hypotheses])

    @overload
    def logprobs(
        self, prompts: PromptLike, responses: Response, method: str | Method, *, alternatives: int = 1, **settings: Any
    ) -> ResponseLogprobs: ...
    @overload
    def logprobs(
        self,
        prompts: Sequence[Conversation],
        responses: Sequence[Response],
        method: str | Method,
        *,
        alternatives: int = 1,
        **settings: Any,
    ) -> list[ResponseLogprobs]: ...
    def logprobs(
        self,
        prompts: PromptLike | Sequence[Conversation],
        responses: Response | Sequence[Response],
        method: str | Method,
        *,
        alternatives: int = 1,
        **settings: Any,
    ) -> ResponseLogprobs | list[ResponseLogprobs]:
        """Log-probabilities of given responses under the distribution from which ``method`` draws tokens.

        At each position that is softmax(z), z the base's logits with the method's token guidance; at temperature 1, without filters,
        whatever the model's defaults are, unless ``settings`` ask for others. Every model reads prompt and response once. A token that
        the method never draws (outside its ``candidates``, say) has minus infinity.

        Args:
            prompts: one prompt, or a list of prompts.
            responses: text, or tokens of the base (with an end-of-sequence token, where the end counts); for a list, one for each prompt.
            method: one that guides tokens alone (``eft``, ``token-explicit``, ``args`` …), or ``base``.
            alternatives: so many of the likeliest tokens at each position.
            settings: as for :meth:`request`.

        Returns:
            A :class:`~ivg.types.ResponseLogprobs` for one prompt, a list of them for a list.

        Raises:
            ConfigError: a method that selects chunks, whose texts have no normalised distribution; temperature 0.
            PromptError: prompt and response that a model cannot read; another number of responses than of prompts.
        """
        items, single = read_prompts(prompts)
        given: list[Any] = [responses] if single else list(responses)
        if len(given) != len(items):
            raise PromptError(f"logprobs got {len(items)} prompts and {len(given)} responses\n  expected a response for each prompt")
        requests = [self.request(prompt, method, sampling=NEUTRAL, **settings) for prompt in items]
        tokens = [self.base.response_tokens(r.prompt, response) for r, response in zip(requests, given, strict=True)]
        found = given_logprobs(self.engine, self.lock, requests, tokens, alternatives)
        return found[0] if single else found

    def to(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Models are placed when they are loaded: moving them would leave caches, packed weights and other processes behind.

        Raises:
            ConfigError: always; says how.
        """
        wanted = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise ConfigError(
            f"GuidedModel.to({wanted}): models stay where they were loaded\n"
            "  load with from_pretrained(…, options=LoadOptions(device=…, dtype=…)), or {ROLE: LoadOptions(…)} for single models"
        )

    def __reduce__(self) -> NoReturn:
        """Refuse pickle and deepcopy: a model holds locks, caches and maybe other processes.

        Raises:
            ConfigError: always; says what to send instead.
        """
        raise ConfigError(
            "a GuidedModel cannot be pickled or copied\n"
            "  send what it is loaded from, and call from_pretrained (or load_models(recipe)) in the other process"
        )

    def guidance(self, value: str, beta: float = 1.0, candidates: int = 0, gate: float = 0.0) -> TokenGuidance:
        """Token guidance by the named value, for the pieces in ``ivg.integrations.transformers``."""
        return TokenGuidance(self.values[value], beta, candidates, gate=gate)


def _get_method(method: str | Method, settings: Mapping[str, Any], values: Mapping[str, Value]) -> Method:
    """A method with settings, for a model with these values."""
    chosen = method.with_settings(**settings) if isinstance(method, Method) else get_method(method, **settings)
    return resolve_fallbacks(chosen, values)
