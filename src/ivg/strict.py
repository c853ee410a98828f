"""Tables of settings: pydantic models that take nothing for something else, and hold settings against their rules (``ivg.checks``)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

from ivg.checks import RULES, check

_SHAPED = frozenset({"weights", "select_weights"})
"""Settings that a recipe writes in a form of its own; they are checked where they are read."""


class Strict(BaseModel):
    """Strict: true is no number, "4" is none, 2.0 is no whole one; nor are NaN and infinity numbers."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_range(self) -> Strict:
        """Settings that have a rule (``ivg.checks``) are held against it, whatever table they stand in."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is not None and name in RULES and name not in _SHAPED:
                check(name, value)
        return self
