"""Settings at the edge: TOML recipes, command line, HTTP. Unknown keys are errors; the field's other names are accepted.

A recipe has the tables ``models``, ``values``, ``search``, ``sampling``, ``run``, ``vllm``, ``endpoint``, ``eval`` and ``serve``; each may
be left out::

    [models]
    base = "mistralai/Mistral-7B-Instruct-v0.2"
    tuned = { path = "allenai/tulu-2-dpo-7b", template = "chat" }
    untuned = "allenai/tulu-2-7b"
    value = "path/to/value"

    [values.plain]  # further values, for token, select, weights: tuned and untuned, or value, or reward, or arm
    tuned = "path/to/pair/tuned"
    untuned = "path/to/pair/untuned"

    [search]
    method = "ivg"
    width = 2
    successors = 2
    chunk_length = 30
    weights = { implicit = 1.0, plain = 0.5 }
"""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from ivg.errors import ConfigError
from ivg.settings.messages import explain
from ivg.settings.strict import Strict

ROLES = ("base", "tuned", "untuned", "value", "reward", "arm")
"""What a model can be for."""


def _or(*names: str) -> AliasChoices:
    return AliasChoices(*names)


class ModelRef(Strict):
    """One model: where it is and how it reads a prompt. A bare string is the path."""

    path: str
    template: str | None = None


ModelLike = ModelRef | None


class _Guides(Strict):
    tuned: ModelLike = Field(None, validation_alias=_or("tuned", "expert", "tune_r", "model"))
    untuned: ModelLike = Field(None, validation_alias=_or("untuned", "antiexpert", "base_r", "ref_model"))
    value: ModelLike = Field(None, validation_alias=_or("value", "explicit"))
    reward: ModelLike = None
    arm: ModelLike = None

    @field_validator("*", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def given(self) -> dict[str, ModelRef]:
        """The roles that are filled."""
        return {role: ref for role in ROLES if (ref := getattr(self, role, None)) is not None}


class ModelsConfig(_Guides):
    """Which models. All left out: the embedded ones."""

    base: ModelLike = None


class NamedValue(_Guides):
    """A further value: a pair ``tuned`` and ``untuned``, or one of ``value``, ``reward`` and ``arm``."""

    @model_validator(mode="after")
    def _one_value(self) -> NamedValue:
        if set(self.given) not in ({"tuned", "untuned"}, {"value"}, {"reward"}, {"arm"}):
            got = ", ".join(self.given) or "nothing"
            raise ValueError(f"a named value is tuned and untuned, or value, or reward, or arm; got {got}")
        return self


class SearchConfig(Strict):
    """The method and what differs from its defaults (``ivg.search.methods``)."""

    method: str = "ivg"
    width: int | None = Field(None, validation_alias=_or("width", "w", "W", "num_beams", "beam_width"))
    successors: int | None = Field(None, validation_alias=_or("successors", "k", "K", "num_candidates"))
    chunk_length: int | None = Field(None, validation_alias=_or("chunk_length", "l", "L", "block_len"))
    beta: float | None = Field(None, validation_alias=_or("beta", "alpha", "guidance_weight"))
    token: str | None = Field(None, validation_alias=_or("token", "token_value"))
    select: str | None = Field(None, validation_alias=_or("select", "select_value"))
    weights: dict[str, float] | str | None = None
    select_weights: dict[str, float] | str | None = None
    candidates: int | None = None
    transform: Literal["identity", "log-sigmoid", "centered"] | None = None
    normalise: bool | None = None
    gate: float | None = None
    draft: int | None = Field(None, validation_alias=_or("draft", "num_speculative_tokens"))
    rule: Literal["top", "soft", "reject", "particles"] | None = None
    soft_scale: float | None = None
    decay: float | None = None
    original: bool | None = None
    target: float | None = None
    accept_scale: float | None = None
    threshold_start: float | None = None
    tries: int | None = None
    segment_entropy: float | None = None
    segment_min: int | None = None
    particle_beta: float | None = None
    resample_below: float | None = None

    def settings(self) -> dict[str, Any]:
        """What was given, but for the method."""
        return {k: v for k, v in self.model_dump(exclude={"method"}).items() if v is not None}


class SamplingConfig(Strict):
    """How tokens are drawn; what is left out falls back on the defaults of ``GuidedModel``."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = Field(None, validation_alias=_or("max_new_tokens", "max_tokens"))
    stop: list[str] | None = None
    ignore_eos: bool | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: list[Any] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: list[Any] | None = None

    def settings(self) -> dict[str, Any]:
        """What was given."""
        return {k: v for k, v in self.model_dump().items() if v is not None}


class RunConfig(Strict):
    """How and where to run; ``engine``: ``transformers``, ``vllm``, or the URL of an OpenAI-compatible endpoint (``http://…/v1``).

    ``generation_config``: ``auto`` takes what the base's ``generation_config.json`` says of drawing as defaults, ``ignore`` does not.
    """

    engine: str = "transformers"
    seed: int = 0
    n: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None
    generation_config: Literal["auto", "ignore"] = "auto"


class VLLMConfig(Strict):
    """The engine ``vllm`` (docs/how-to/vllm.md); what is left out is vLLM's default.

    Attributes:
        guides: values that guide inside the composite model; default: those of the method.
        value: who reads the explicit value, ``pooling`` (vLLM) or ``transformers``.
        value_memory: share of a GPU's memory for the pooling engine; ``gpu_memory_utilization`` is the composite's.
        cache: where the small directories of composites are kept.
        arguments: any other of vLLM's engine arguments.
    """

    guides: list[str] | None = None
    value: Literal["pooling", "transformers"] = "pooling"
    max_model_len: int | None = Field(None, ge=1)
    max_num_seqs: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    value_memory: float | None = Field(None, gt=0, le=1)
    tensor_parallel_size: int | None = Field(None, ge=1)
    enforce_eager: bool | None = None
    cache: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


class EndpointConfig(Strict):
    """An OpenAI-compatible completions endpoint as base (``run.engine`` is its URL).

    Attributes:
        model: its name there; default: the path of the base.
        api_key_env: the environment variable that holds the key.
        tokenizer: directory or hub id, to render chats with; without one prompts are texts.
        timeout: seconds for one request.
        concurrency: requests at once.
        token_pieces: ask for the text of every token.
    """

    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    tokenizer: str | None = None
    timeout: float = Field(120.0, gt=0)
    concurrency: int = Field(64, ge=1)
    token_pieces: bool = False


class RewardRef(ModelRef):
    """A reward model that judges: where it is, what it reads (``{prompt}``, ``{response}`` or ``chat``), which logit it is."""

    label: int | None = None


class MethodConfig(SearchConfig):
    """One row of an evaluation: a method, what differs from its defaults, and the name of the row."""

    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        data = {"method": data} if isinstance(data, str) else data
        if isinstance(data, dict) and not data.get("label"):
            data = {**data, "label": data.get("method", "ivg")}
        return data

    @field_validator("label")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if any(sign in value for sign in "/\\:") or value.startswith("."):
            raise ValueError("a label names files: no / \\ : in it, no dot at its beginning")
        return value

    def settings(self) -> dict[str, Any]:
        """What was given, but for method and label."""
        return {k: v for k, v in super().settings().items() if k != "label"}


TAKEN = frozenset({
    "gold", "label", "family", "method", "answers", "errors", "win_rate", "kl",
    "kl_note", "surprisal", "perplexity", "length", "distinct_1", "distinct_2", "repetition", "forward_tokens",
    "flops", "best_of_n", "task", "primary", "seed", "id", "fingerprint", "base_logp",
    "tokens", "error",
})  # fmt: skip
"""What rows of scores and results call their own; no judge may have these names."""


class EvalConfig(Strict):
    """One evaluation (``ivg eval``): a task, its prompts, the methods, the judges.

    Attributes:
        task: ``sentiment``, ``summarization``, ``alpaca``.
        data: file, folder or hub data set; None: the task's own on the hub.
        split: of a folder or data set; None: the task's.
        format: of the file (``jobs.formats``); None: by its name, or what stands in it.
        prompts: the first so many; an error where there are fewer. None: as many as the task's paper took (1000; of alpaca all), or
            as there are.
        seeds: answers to each prompt by each method.
        shuffle: seed of the order of prompts; None: the task's own.
        methods: names, or tables of a method and its settings; ``combinations`` stands for the nine of token guidance and
            selection, with the sizes of the ``search`` table.
        gold: the reward that is reported; no method may use it.
        judges: further rewards by name: letters, digits, ``_`` and ``-``.
        base_samples: base samples for each prompt and seed, for best-of-N at equal compute; 0: none. ``bank`` until 0.1.
        threads: of PyTorch, in every process; None: its default. Another number rounds otherwise.
        options: settings of the task itself, which checks them.
    """

    task: str = "sentiment"
    data: str | None = None
    split: str | None = None
    format: Literal["jsonl", "json", "csv", "parquet", "text"] | None = None
    prompts: int | None = Field(None, ge=1)
    seeds: int = Field(1, ge=1)
    shuffle: int | None = None
    methods: list[MethodConfig] = Field(default_factory=lambda: [MethodConfig(method="combinations", label="combinations")])
    gold: RewardRef | None = None
    judges: dict[str, RewardRef] = Field(default_factory=dict)
    base_samples: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and "bank" in value:
            warnings.warn("eval.bank is now eval.base_samples; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
            value = {"base_samples" if k == "bank" else k: v for k, v in value.items()}
        return value

    @field_validator("gold", mode="before")
    @classmethod
    def _bare_gold(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("judges", mode="before")
    @classmethod
    def _bare_judges(cls, value: Any) -> Any:
        return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("judges")
    @classmethod
    def _are_columns(cls, value: dict[str, RewardRef]) -> dict[str, RewardRef]:
        for name in value:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"a judge cannot be called {name!r}: expected letters, digits, _ and -")
            if name in TAKEN:
                raise ValueError(f"the name {name} is taken; give the judge another (what is reported is eval.gold)")
        return value


_Ref = TypeVar("_Ref", bound=ModelRef)


class Recipe(Strict):
    """Everything that one run needs."""

    models: ModelsConfig = ModelsConfig()
    values: dict[str, NamedValue] = Field(default_factory=dict)
    search: SearchConfig = SearchConfig()
    sampling: SamplingConfig = SamplingConfig()
    run: RunConfig = RunConfig()
    vllm: VLLMConfig = VLLMConfig()
    endpoint: EndpointConfig = EndpointConfig()
    eval: EvalConfig = EvalConfig()
    serve: dict[str, Any] = Field(default_factory=dict)
    """Settings of the server, which checks them (``serving.settings``)."""

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "settings") -> Recipe:
        """From plain values.

        Raises:
            ConfigError: unknown keys or unusable values; names each with what was expected.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise ConfigError(f"{source}: " + "; ".join(explain(error, cls) for error in e.errors())) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """From a TOML file; relative paths of models, tokenizers and of ``eval.data`` are looked up beside it first.

        Raises:
            ConfigError: no such file, not TOML, or unusable settings.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path} is not UTF-8: {e.reason} at byte {e.start}\n  save it as UTF-8") from None
        except OSError as e:
            raise ConfigError(f"cannot read recipe {path}: {e.strerror}\n  expected a TOML file") from None
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"{path} is not TOML: {e}") from None
        recipe = cls.parse(data, str(path))
        found = {role: _beside(path.parent, ref) for role, ref in recipe.local_models.items()}
        values = {
            name: value.model_copy(update={role: _beside(path.parent, ref) for role, ref in value.given.items()})
            for name, value in recipe.values.items()
        }
        judges = {name: _beside(path.parent, ref) for name, ref in recipe.eval.judges.items()}
        gold = recipe.eval.gold and _beside(path.parent, recipe.eval.gold)
        rows = recipe.eval.data
        rows = str(path.parent / rows) if rows is not None and (path.parent / rows).exists() else rows
        tokenizer = recipe.endpoint.tokenizer
        tokenizer = str(path.parent / tokenizer) if tokenizer is not None and (path.parent / tokenizer).is_dir() else tokenizer
        tables = {
            "models": recipe.models.model_copy(update=found),
            "endpoint": recipe.endpoint.model_copy(update={"tokenizer": tokenizer}),
            "values": values,
            "eval": recipe.eval.model_copy(update={"judges": judges, "gold": gold, "data": rows}),
        }
        return recipe.model_copy(update=tables)

    @property
    def local_models(self) -> dict[str, ModelRef]:
        """The given models that are loaded here, by role; the base of an endpoint is but a name there."""
        remote = self.run.engine.startswith(("http://", "https://"))
        return {role: ref for role, ref in self.models.given.items() if not (remote and role == "base")}

    def override(self, **tables: dict[str, Any]) -> Recipe:
        """A copy in which the given (not None) settings replace those of the recipe; table by table.

        Raises:
            ConfigError: as :meth:`parse`.
        """
        data = self.model_dump(exclude_none=True)
        for table, settings in tables.items():
            data.setdefault(table, {}).update({k: v for k, v in settings.items() if v is not None})
        return type(self).parse(data)


def _beside(folder: Path, ref: _Ref) -> _Ref:
    """``ref`` with its path in ``folder``, if there is such a directory there, or such a Python file of a function."""
    there = folder / ref.path
    file, sign, _ = ref.path.rpartition(":")
    found = there.is_dir() or (bool(sign) and file.endswith(".py") and (folder / file).is_file())
    return ref.model_copy(update={"path": str(there)}) if found else ref
