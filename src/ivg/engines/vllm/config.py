"""The config.json of a composite model. Needs transformers only; vLLM's processes read it too.

A composite has *submodels*: the base, and guides over the same token ids. Guides belong to *groups*, one for each value that can
guide tokens; the logits of a group are the sum of its submodels' logits times their signs (tuned +1, untuned -1; an autoregressive
reward or a vocabulary head +1), and a request's logits are

    z_base + sum over groups of beta_group * z_group.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from ivg.errors import ConfigError
from ivg.models.added_tokens import AddedTokens

KEY = "ivg_beta"
"""Key of the first group's weight in ``SamplingParams.extra_args``; ``ivg_beta.NAME`` is that of the group NAME."""

TEMPERATURE_KEY = "ivg_temperature"
"""Key in ``SamplingParams.extra_args`` of a temperature that is applied to the logits before all else, so that vLLM's log-probabilities,
which are those at its temperature 1, are at this one."""
RESPONSE_KEY = "ivg_response"
"""Key in ``SamplingParams.extra_args`` of what looks back at the response (:mod:`ivg.engines.vllm.response_processor`)."""

_seen: set[str] = set()
"""Groups of all composites whose config this process has read; vLLM's front end reads that of its model."""

HeadKind = Literal["language", "vocabulary", "scalar"]


@dataclass(frozen=True)
class Submodel:
    """One network.

    Attributes:
        name: ``base``, ``tuned``, ``untuned`` … as in usage.
        config: its config.json.
        weights: directory or hub id.
        revision: on the hub.
        group: what it guides for; empty: the base.
        sign: of its logits in the group's.
        head: ``language``: the model's own; ``vocabulary``: a value network's ``score_head``.
        adapter: directory of the LoRA adapter that it reads with.
        scale: factor of what the adapter changes.
        adapter_digest: of the adapter's files (:func:`ivg.models.plain_lora.lora_digest`).
        tokenizer_eos_id: the tokenizer's end-of-sequence token; None: it has none, or is not known.
    """

    name: str
    config: dict[str, Any]
    weights: str
    revision: str | None = None
    group: str = ""
    sign: float = 1.0
    head: HeadKind = "language"
    adapter: str | None = None
    scale: float = 1.0
    adapter_digest: str = ""
    tokenizer_eos_id: int | None = None

    @property
    def network(self) -> tuple[str, ...]:
        """Equal for submodels with one set of weights. A value network has its own."""
        settings = json.dumps(self.config, sort_keys=True, default=str)
        return (self.weights, self.revision or "", settings, "" if self.head == "language" else self.name)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Equal for submodels with the same outputs."""
        return (*self.network, self.adapter, self.adapter_digest, self.scale if self.adapter else 1.0)

    def network_config(self) -> PreTrainedConfig:
        """As transformers' config object, of a causal language model."""
        found = AutoConfig.for_model(**copy.deepcopy(self.config))
        found.architectures = [causal_architecture(found)]
        if self.head != "language":
            found.tie_word_embeddings = False
        return found

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.network_config().get_text_config().vocab_size)

    @property
    def eos_id(self) -> int:
        """The token that it reads where the base has one without an embedding here (as in ``PromptEncoder.own_ids``)."""
        found = self.network_config().eos_token_id
        ends = [self.tokenizer_eos_id, *(sorted(found) if isinstance(found, list) else [found])]
        return next((i for i in ends if isinstance(i, int) and i < self.vocab_size), 0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class IVGConfig(PreTrainedConfig):
    """config.json of a composite: ``parts`` (see :class:`Submodel`), ``groups``, their default weights ``betas`` and ``columns``.

    ``added``: by group, the tokens that only the base has (:class:`ivg.models.added_tokens.AddedTokens`).
    """

    model_type = "ivg"

    def __init__(
        self,
        parts: list[dict[str, Any]] | None = None,
        betas: Mapping[str, float] | None = None,
        columns: Mapping[str, int] | None = None,
        added: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.parts, self.betas, self.columns = list(parts or []), dict(betas or {}), dict(columns or {})
        self.added = dict(added or {})
        self._base: PreTrainedConfig | None = None
        if self.parts:
            _seen.update(self.groups)
            self._base = self.submodels[0].network_config()
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype"):
                kwargs.setdefault(name, getattr(self._base, name, None))
        super().__init__(**kwargs)

    @property
    def submodels(self) -> list[Submodel]:
        """The submodels, the base first."""
        return [Submodel(**part) for part in self.parts]

    @property
    def sources(self) -> dict[str, str]:
        """For each submodel the name of the first with the same outputs, which is the one that runs."""
        first: dict[tuple[Any, ...], str] = {}
        return {part.name: first.setdefault(part.outputs, part.name) for part in self.submodels}

    @property
    def groups(self) -> list[str]:
        """Names of the values that can guide, the default one first."""
        return list(dict.fromkeys(part.group for part in self.submodels if part.group))

    @property
    def default_betas(self) -> list[float]:
        """Weight of each group where a request names none."""
        return [float(self.betas.get(group, 0.0)) for group in self.groups]

    @property
    def group_columns(self) -> list[int]:
        """How many columns of logits each group shifts: those that all its submodels have and its tokenizer knows."""
        smallest = {g: min(part.vocab_size for part in self.submodels if part.group == g) for g in self.groups}
        return [min(self.columns.get(g, n), n) for g, n in smallest.items()]  # none given: exported by an earlier version

    @property
    def group_added(self) -> list[AddedTokens | None]:
        """The base's tokens that each group does not know."""
        return [AddedTokens.from_dict(self.added[g]) if g in self.added else None for g in self.groups]

    def row_of(self, extra_args: Mapping[str, Any] | None) -> list[float]:
        """What the composite needs of a request: :meth:`weights_of`, and the temperature of its log-probabilities."""
        return [*self.weights_of(extra_args), float((extra_args or {}).get(TEMPERATURE_KEY, 1.0))]

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """The base's: vLLM sizes itself by it."""
        return self._base if self._base is not None else self

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is derived."""
        return {k: v for k, v in super().to_dict().items() if k != "_base"}

    def weights_of(self, extra_args: Mapping[str, Any] | None) -> list[float]:
        """Guidance weight of every group for a request that the front end has checked (:func:`check_betas`).

        Groups of other composites, which the front end may have accepted, are left out: an error here would end the engine.
        """
        own = {k: v for k, v in (extra_args or {}).items() if k.removeprefix(f"{KEY}.") in (*self.groups, KEY)}
        return betas_of(self.groups, self.default_betas, own)


class IVGValueConfig(PreTrainedConfig):
    """config.json of a value network for the pooling engine: one submodel, whose head is applied outside of vLLM."""

    model_type = "ivg_value"

    def __init__(self, part: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.part = dict(part or {})
        self._network: PreTrainedConfig | None = None
        if self.part:
            self._network = self.submodel.network_config()
            kwargs.setdefault("dtype", getattr(self._network, "dtype", None))
        super().__init__(**kwargs)

    @property
    def submodel(self) -> Submodel:
        """The network."""
        return Submodel(**self.part)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """The network's: vLLM sizes itself by it."""
        return self._network if self._network is not None else self

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is derived."""
        return {k: v for k, v in super().to_dict().items() if k != "_network"}


def betas_of(groups: list[str], defaults: list[float], extra_args: Mapping[str, Any] | None) -> list[float]:
    """Guidance weight of every group, as a request's ``extra_args`` and the defaults have it.

    Raises:
        ConfigError: not a finite number, or a group that is not there.
    """
    out = list(defaults)
    for key, value in (extra_args or {}).items():
        if key != KEY and not key.startswith(f"{KEY}."):
            continue
        name = key.removeprefix(KEY).removeprefix(".") or (groups[0] if groups else "")
        if name not in groups:
            raise ConfigError(f"extra_args[{key!r}]: this model has no guide {name!r}; expected one of: {', '.join(groups) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"extra_args[{key!r}] must be a finite number, got {value!r}")
        out[groups.index(name)] = float(value)
    return out


def check_betas(extra_args: Mapping[str, Any] | None) -> None:
    """Raise for weights of groups that no composite of this process has.

    Raises:
        ConfigError: as :func:`betas_of`.
    """
    groups = sorted(_seen)
    own = {k: v for k, v in (extra_args or {}).items() if k != KEY or groups}
    betas_of(groups, [0.0] * len(groups), own)
    temperature = own.get(TEMPERATURE_KEY, 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ConfigError(f"extra_args[{TEMPERATURE_KEY!r}] must be a positive number, got {temperature!r}")


def causal_architecture(config: PreTrainedConfig) -> str:
    """Name of the causal language model of this type of network.

    Raises:
        ConfigError: transformers knows none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = [a for a in (config.architectures or []) if "CausalLM" in a or "LMHead" in a]
    name = own[0] if own else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not isinstance(name, str):
        raise ConfigError(f"a {config.model_type} network is no causal language model\n  expected e.g. llama, qwen3, gpt2, mistral")
    return name
