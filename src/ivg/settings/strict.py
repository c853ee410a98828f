"""Tables of settings: pydantic models that hold each setting against its rule (``ivg.settings.rules``)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from ivg.settings.rules import RULES, check

_SHAPED = frozenset({"weights", "select_weights"})
"""Settings that a recipe writes in a form of its own; they are checked where they are read."""


class Strict(BaseModel):
    """Strict: true is no number, "4" is none, 2.0 is no whole one; nor are NaN and infinity numbers."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any, info: ValidationInfo) -> Any:
        """Settings that have a rule (``ivg.settings.rules``) are held against it, whatever table they stand in."""
        name = info.field_name
        if value is not None and name is not None and name in RULES and name not in _SHAPED:
            check(name, value)
        return value
