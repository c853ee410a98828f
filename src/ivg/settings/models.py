"""Which models a recipe names, and the prompt template of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import field_validator, model_validator

from ivg.errors import ConfigError
from ivg.settings import placement as p
from ivg.settings.chat import TEMPLATE_KWARGS
from ivg.settings.rules import INSTRUCTION, number
from ivg.settings.schema import Setting
from ivg.settings.tables import Table

_SCALE = number("within 100 of 0", -100, 100)

ROLES = ("base", "tuned", "untuned", "value", "reward", "arm")
"""What a model can be for."""
LANGUAGE_MODELS = ("base", "tuned", "untuned", "arm", "contrast")
"""Those that write, or have probabilities of tokens."""


class ModelRef(Table):
    """One model. A bare string is the path."""

    path: Annotated[str, Setting("Hub id, directory, GGUF file, or the name of an added model.")]
    template: Annotated[
        str | None,
        Setting(
            'Prompt template of the model: chat (its tokenizer\'s), a text such as "Q: {prompt}\\nA:", raw (the contents of the messages, '
            "joined), last_turn (the last user message), or a file (.jinja: a chat template, .txt: a text).",
            unset="chat for messages, a text as it is",
        ),
    ] = None
    system: Annotated[
        str | None,
        Setting(
            "Instruction that this model alone reads before every prompt: the system turn of a chat, else a text before it.",
            INSTRUCTION,
            unset="none",
        ),
    ] = None
    adapter: Annotated[
        str | None,
        Setting(
            "PEFT adapter of the network at path: hub id or directory (package peft). Language models of one path share its weights; "
            "a value or reward has its own, with the adapter merged.",
            unset="none",
        ),
    ] = None
    scale: Annotated[float | None, Setting("Factor of what the adapter changes.", _SCALE, unset="1")] = None
    device: Annotated[p.Device | None, replace(p.DEVICE, unset=p.OF_RUN)] = None
    max_memory: Annotated[
        dict[str, str | int] | None,
        Setting(
            'Memory that the model may take of each device, for device = "auto": { 0 = "20GiB", cpu = "60GiB" }.', unset="what is free"
        ),
    ] = None
    dtype: Annotated[p.Dtype | None, replace(p.DTYPE, unset=p.OF_RUN)] = None
    revision: Annotated[str | None, replace(p.REVISION, unset=p.OF_RUN)] = None
    attention: Annotated[str | None, replace(p.ATTENTION, unset=p.OF_RUN)] = None
    quantization: Annotated[dict[str, Any] | None, replace(p.QUANTIZATION, unset=p.OF_RUN)] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Setting("Variables of the chat template of the model, such as enable_thinking.", TEMPLATE_KWARGS, unset="none"),
    ] = None

    @model_validator(mode="after")
    def _scale_of_an_adapter(self) -> Self:
        if self.scale is not None and self.adapter is None:
            raise ValueError("scale is the factor of an adapter; give adapter with it")
        return self


ModelSource: TypeAlias = "str | Path | ModelRef"
"""A model by directory or hub id, or with settings of its own."""


class RewardRef(ModelRef):
    """A reward model that judges; its template may have ``{prompt}`` and ``{response}``."""

    label: Annotated[int | None, Setting("Which logit is the reward.", unset="the only one")] = None


def check_roles(what: str, given: Iterable[str]) -> None:
    """Raise for names that are no roles.

    Raises:
        ConfigError: names them; ``what`` they were given.
    """
    if unknown := sorted(set(given) - set(ROLES)):
        raise ConfigError(f"{what} for unknown role {', '.join(unknown)}\n  expected {', '.join(ROLES)}")


def check_pair(tuned: object, untuned: object) -> None:
    """Raise where one of a pair is None and the other is not.

    Raises:
        ConfigError: names the missing one.
    """
    if (tuned is None) != (untuned is None):
        missing = "untuned" if untuned is None else "tuned"
        raise ConfigError(f"the implicit value needs a pair; got no {missing} model\n  give both --tuned and --untuned")


class _Guides(Table):
    tuned: Annotated[
        ModelRef | None,
        Setting("Small tuned model; with --untuned: the implicit value.", aliases=("expert", "tune_r", "model"), flags=("--tuned",)),
    ] = None
    untuned: Annotated[
        ModelRef | None,
        Setting("The same small model before its tuning.", aliases=("antiexpert", "base_r", "ref_model"), flags=("--untuned",)),
    ] = None
    value: Annotated[ModelRef | None, Setting("Trained value network: the explicit value.", aliases=("explicit",), flags=("--value",))] = (
        None
    )
    reward: Annotated[
        ModelRef | None,
        Setting("Sequence classifier, or a Python function of prompt and response (file.py:function).", flags=("--reward",)),
    ] = None
    arm: Annotated[ModelRef | None, Setting("Autoregressive reward model (GenARM).", flags=("--arm",))] = None

    @field_validator("*", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_language_models(self) -> Self:
        for role, ref in self.given.items():
            if role not in LANGUAGE_MODELS and ref.system is not None:
                raise ValueError(f"{role}.system: only language models have it ({', '.join(LANGUAGE_MODELS)})")
        return self

    @property
    def given(self) -> dict[str, ModelRef]:
        """The roles that are filled."""
        return {role: ref for role in ROLES if role in type(self).model_fields and (ref := getattr(self, role)) is not None}


class ModelsConfig(_Guides):
    """The models. None given: the embedded ones."""

    base: Annotated[
        ModelRef | None,
        Setting(
            "Frozen model to guide: hub id, directory, GGUF file, or the name of an added model.",
            flags=("--base",),
            unset="the embedded one",
        ),
    ] = None


class NamedValue(_Guides):
    """A further value: a pair ``tuned`` and ``untuned``, or one of ``value``, ``reward``, ``arm``, ``contrast`` and ``plugin``."""

    contrast: Annotated[
        ModelRef | None,
        Setting("Of [values.contrast]: the network that reads each request's instruction, against itself without it.", unset="the base"),
    ] = None
    plugin: Annotated[ModelRef | None, Setting("Value of another package, KIND:ARGUMENT (ivg models lists the kinds).")] = None

    @property
    def given(self) -> dict[str, ModelRef]:
        """The roles that are filled."""
        more = {"contrast": self.contrast, "plugin": self.plugin}
        return super().given | {role: ref for role, ref in more.items() if ref is not None}

    @model_validator(mode="after")
    def _one_value(self) -> NamedValue:
        if set(self.given) not in ({"tuned", "untuned"}, {"value"}, {"reward"}, {"arm"}, {"contrast"}, {"plugin"}):
            got = ", ".join(self.given) or "nothing"
            raise ValueError(f"a named value is tuned and untuned, or value, or reward, or arm, or contrast, or plugin; got {got}")
        return self
