"""Tables of settings: pydantic models for recipes and HTTP bodies. Each setting is checked by the rule that it is declared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator, model_validator

from ivg.settings.schema import Setting, rules_of, settings_of

M = TypeVar("M", bound=BaseModel)


class Table(BaseModel):
    """A strict table: true is no number, nor is "4", and 2.0 is no whole number; NaN, infinity and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, data: Any) -> Any:
        """Settings given by another of their names get their own."""
        if not isinstance(data, Mapping):
            return data
        out = dict(data)
        for name, declared in settings_of(cls).items():
            for alias in (*declared.setting.aliases, *declared.setting.deprecated):
                if alias in declared.setting.deprecated and alias in out:
                    warnings.warn(f"{alias} is now {name}; the old name works until 0.3", DeprecationWarning, stacklevel=2)
                if alias in out and name in out:
                    raise ValueError(f"{name} and {alias} are the same setting; give one of them")
                if alias in out:
                    out[name] = out.pop(alias)
        return out

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        rule = rules_of(cls).get(name)
        if value is not None and rule is not None:
            rule.checked(name, value)
        return value

    def settings(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


def optional_fields(kind: type, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """The settings of ``kind`` as fields of a table, for ``pydantic.create_model``; each may be left out and is None then.

    Args:
        kind: a class that declares settings.
        only: the names to take; None: all.
        without: names to leave out.
    """
    out: dict[str, tuple[Any, Any]] = {}
    for name, declared in settings_of(kind).items():
        if name not in without and (only is None or name in only):
            setting = declared.setting
            accepted: Any = declared.type if setting.accepts is None else setting.accepts
            out[name] = (Annotated[accepted | None, setting], Field(None, description=setting.help, json_schema_extra=_bounds(setting)))
    return out


def _bounds(setting: Setting) -> dict[str, Any]:
    return dict(setting.rule.bounds) if setting.rule is not None and setting.accepts is None else {}


def table_of(kind: type, only: Collection[str] | None = None, without: Collection[str] = ()) -> Callable[[type[M]], type[M]]:
    """Class decorator: the settings of ``kind`` become optional fields of a table (see :func:`optional_fields`)."""

    def extend(cls: type[M]) -> type[M]:
        more: dict[str, Any] = optional_fields(kind, only, without)
        made: type[M] = create_model(cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **more)
        made.__qualname__ = cls.__qualname__
        return made

    return extend
