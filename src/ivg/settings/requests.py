"""What a recipe may say of search and sampling: the settings of :class:`SearchSettings` and :class:`SamplingParams`, each optional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import field_validator, model_validator

from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import Setting, check, settings_of
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


_LETTERS = {"width": "W", "successors": "K", "chunk_length": "L"}
"""Names of settings in the labels of a sweep's points, where they are not the settings' own."""


class MethodConfig(SearchConfig):
    """One row of an evaluation: a method, what differs from its defaults, and the name of the row.

    With ``sweep``, or with a list where a setting takes one number, it stands for several rows (:meth:`points`)::

        { method = "eft", beta = [0.25, 0.5, 1] }
        { method = "cbs-explicit", width = [1, 2, 4], successors = [2, 4, 4] }  # W and K go together: three rows
    """

    label: Annotated[str, Setting("Name of the row, and of its files; of a sweep: the beginning of these names.", unset="the method")] = ""
    sweep: Annotated[
        dict[str, list[Any]] | None,
        Setting("Numbers that a setting takes one after the other; lists of several settings go together.", unset="none"),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        data = {"method": data} if isinstance(data, str) else data
        if not isinstance(data, dict):
            return data
        data = _with_sweep(data)
        return data if data.get("label") else {**data, "label": data.get("method", "ivg")}

    @field_validator("label")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if any(sign in value for sign in "/\\:") or value.startswith("."):
            raise ValueError("a label names files: no / \\ : in it, no dot at its beginning")
        return value

    @model_validator(mode="after")
    def _sweep_goes_together(self) -> Self:
        lengths = {name: len(values) for name, values in (self.sweep or {}).items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"the lists of a sweep go together and have equal lengths of 1 or more, got {listed}")
        for name, values in (self.sweep or {}).items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is given once as a value and once as a sweep; give one of them")
            for value in values:
                check(SearchSettings, name, value)
        return self

    def settings(self) -> dict[str, Any]:
        """What was given, but for method, label and sweep."""
        return {name: value for name, value in super().settings().items() if name not in ("label", "sweep")}

    def points(self) -> list[dict[str, int | float]]:
        """The swept settings of each row, in order; [] without a sweep."""
        swept = self.sweep or {}
        return [dict(zip(swept, values, strict=True)) for values in zip(*swept.values(), strict=True)]


def point_label(point: Mapping[str, int | float]) -> str:
    """The end of the label of a sweep's point: ``-beta0.25``, ``-W2-K4``; nothing without swept settings."""
    return "".join(f"-{_LETTERS.get(name, name)}{int(v) if v == int(v) else v}" for name, v in point.items())


def _with_sweep(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with its lists in ``sweep``, by the settings' own names.

    Raises:
        ValueError: a list for something that takes no number, or two for one setting.
    """
    known = settings_of(SearchSettings)
    names = {alias: name for name, declared in known.items() for alias in (name, *declared.setting.aliases, *declared.setting.deprecated)}
    typed = {key: value for key, value in data.items() if key in names and isinstance(value, list | tuple)}
    sweep = data.get("sweep") or {}
    if not isinstance(sweep, Mapping):
        return dict(data)  # an error of its type
    found: dict[str, Any] = {}
    for key, values in (*sweep.items(), *typed.items()):
        name = str(names.get(key, key))
        rule = known[name].setting.rule if name in known else None
        if rule is None or rule.kind not in ("a whole number", "a finite number"):
            raise ValueError(f"{key} cannot be swept: expected a setting that takes a number, such as beta, width or successors")
        if name in found:
            raise ValueError(f"{name} is swept twice; give one list")
        found[name] = list(values) if isinstance(values, list | tuple) else values
    kept = {key: value for key, value in data.items() if key not in typed and key != "sweep"}
    return {**kept, "sweep": found} if found else kept
