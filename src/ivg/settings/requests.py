"""What a recipe may say of search and sampling: the settings of :class:`SearchSettings` and :class:`SamplingParams`, each optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import field_validator, model_validator

from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import Setting
from ivg.settings.search import SearchSettings
from ivg.settings.tables import Table, table_of


class _Open(Table):
    """Fields that :func:`table_of` adds are unknown to type checkers."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@table_of(SearchSettings)
class SearchConfig(_Open):
    """The method and what differs from its defaults (``ivg.search.methods``)."""

    method: Annotated[str, Setting("Named method, or custom (ivg models lists them).", flags=("--method", "-m"))] = "ivg"

    def settings(self) -> dict[str, Any]:
        """What was given, but for the method."""
        return {name: value for name, value in super().settings().items() if name != "method"}


@table_of(SamplingParams)
class SamplingConfig(_Open):
    """How tokens are drawn. What is left out: as the base's ``generation_config.json`` says, else the default given here."""


class MethodConfig(SearchConfig):
    """One row of an evaluation: a method, what differs from its defaults, and the name of the row."""

    label: Annotated[str, Setting("Name of the row, and of its files.", unset="the method")] = ""

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
        return {name: value for name, value in super().settings().items() if name != "label"}
