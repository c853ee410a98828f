"""The methods of an evaluation: ``eval.methods`` of a recipe, resolved and checked before any model is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ivg.embedded import PREFIX
from ivg.errors import ConfigError
from ivg.jobs.fingerprints import same_source
from ivg.search.methods import CONTRAST, METHODS, Method, get_method, resolve_fallbacks
from ivg.search.unused import unused_settings
from ivg.settings.recipe import MethodConfig, ModelRef, Recipe
from ivg.settings.requests import point_label
from ivg.settings.schema import check
from ivg.settings.search import SearchSettings

COMBINATIONS = "combinations"
"""Stands for nine methods: token guidance in {none, implicit, explicit} x selection in {none, implicit, explicit} (IVG, table 1)."""
BASE = "base"
BASE_SAMPLES = "base_samples"
"""Label of the base samples that best-of-N selects from; no method may have it."""
BEST_OF_N = "best-of-N"
"""Name of the sweep over N that base samples give; no other may have it."""
SELECTION_VALUES = ("explicit", "reward", "implicit")
"""Best-of-N selects by the first of these values that the models have."""
_VALUES = ("none", "implicit", "explicit")
_SIZES = ("width", "successors", "chunk_length", "original")
_GUIDING = ("beta", "candidates", "transform", "gate", "kl_budget", "draft")
_EMBEDDED = {"implicit": ("tuned", "untuned"), "explicit": ("value",), "explicit-other": ("value-other",)}


@dataclass(frozen=True)
class MethodRow:
    """One row of the report.

    Attributes:
        label: its name.
        method: with all its settings.
        sweep: name of the sweep that it is a point of; None: of none.
        point: the settings that differ between the points of that sweep.
    """

    label: str
    method: Method
    sweep: str | None = None
    point: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        """Plain sampling from the base: no guidance, no selection."""
        m = self.method
        return m.name in (BASE, "custom") and not (m.needs or m.width * m.successors > 1)


def method_rows(recipe: Recipe, search: Mapping[str, Any]) -> tuple[MethodRow, ...]:
    """All methods; plain base sampling is added where the recipe leaves it out.

    Args:
        recipe: with ``eval.methods``.
        search: the task's default search settings for ``combinations``; the recipe's ``search`` table comes first.

    Raises:
        ConfigError: unknown method, invalid settings, two methods with one label, a value that no model provides, a setting of the
            ``search`` table that no method uses.
    """
    values = model_refs_by_value(recipe)
    found: list[MethodRow] = []
    for given in recipe.eval.methods:
        for point in given.points() or [{}]:
            rows = _combinations(point, given, recipe, search) if given.method == COMBINATIONS else [_row(point, given, values)]
            found += [row for row in rows if not (row.sweep is None and point and row in found)]  # of the nine that it does not change
    if not any(m.is_base for m in found):
        found.insert(0, MethodRow(BASE, get_method(BASE)))
    _check_sweeps(found)
    labels = [m.label for m in found]
    twice = sorted({x for x in labels if labels.count(x) > 1 or x == BASE_SAMPLES})
    if twice:
        raise ConfigError(f"methods: the label {', '.join(twice)} is used twice or reserved\n  give each method its own label")
    for m in found:
        missing = sorted(m.method.needs - {*values, CONTRAST})
        if missing:
            raise ConfigError(
                f"{m.label}: needs the value {' and '.join(missing)}; the models provide {', '.join(sorted(values)) or 'none'}\n"
                "  give its models (e.g. --tuned and --untuned for implicit, --value for explicit), or leave the method out"
            )
        own = recipe.values.get(CONTRAST)
        if CONTRAST in m.method.needs and (own is None or own.contrast is not None) and not m.method.instructed:
            raise ConfigError(f"{m.label}: the value contrast needs an instruction\n  give contrast = TEXT, negative, or both in its row")
    _check_search_is_used(recipe.search.settings(), [m.method for m in found])
    return tuple(found)


def model_refs_by_value(recipe: Recipe) -> dict[str, list[ModelRef]]:
    """Each value that the recipe defines, by name, with the models behind it."""
    given = recipe.models.given
    if not given:
        found = {name: [ModelRef(path=f"{PREFIX}{part}") for part in parts] for name, parts in _EMBEDDED.items()}
    else:
        names = {"implicit": ("tuned", "untuned"), "explicit": ("value",), "reward": ("reward",), "arm": ("arm",)}
        found = {name: [given[r] for r in roles] for name, roles in names.items() if set(roles) <= set(given)}
    return found | {name: list(value.given.values()) for name, value in recipe.values.items()}


def check_no_leakage(gold: ModelRef | None, recipe: Recipe, methods: Sequence[MethodRow]) -> None:
    """Check that no method uses the gold reward.

    Raises:
        ConfigError: the gold reward is also a value of some method, or best-of-N selects by it.
    """
    if gold is None:
        return
    values = model_refs_by_value(recipe)
    users = {m.label: m.method.needs for m in methods}
    if recipe.eval.base_samples:
        users[BASE_SAMPLES] = frozenset(next(([n] for n in SELECTION_VALUES if n in values), ()))
    for name, refs in values.items():
        used = [label for label, needs in users.items() if name in needs]
        if used and any(same_source(ref.path, gold.path) for ref in refs):
            raise ConfigError(
                f"the gold reward {gold.path} is also the value {name}, used by {', '.join(used)}\n"
                "  a reward that a method optimises cannot judge it: give another gold reward, or another value"
            )


def method_settings(method: Method) -> dict[str, Any]:
    """A method's settings, without its one-line summary."""
    return {k: v for k, v in asdict(method).items() if k != "summary"}


def _check_sweeps(rows: Sequence[MethodRow]) -> None:
    """The points of a sweep differ in the same settings; two sweeps of one name would be drawn as one."""
    settings: dict[str, set[tuple[str, ...]]] = {}
    for row in rows:
        if row.sweep is not None:
            settings.setdefault(row.sweep, set()).add(tuple(row.point))
    twice = [name for name, different in settings.items() if len(different) > 1 or name == BEST_OF_N]
    if twice:
        raise ConfigError(f"methods: two sweeps are called {', '.join(twice)}, or the name is reserved\n  give each sweep its own label")


def _row(point: Mapping[str, Any], given: MethodConfig, values: Collection[str]) -> MethodRow:
    """A named method, or one point of its sweep."""
    settings = {**given.settings(), **point}
    unused = {k: why for k, why in unused_settings(given.method, settings).items() if k in point}
    if unused:
        name, why = next(iter(unused.items()))
        raise ConfigError(f"{given.label}: the sweep of {name} has no effect: {why}\n  sweep a setting that the method uses")
    method = resolve_fallbacks(get_method(given.method, **settings), values)
    return MethodRow(given.label + point_label(point), method, given.label if point else None, dict(point))


def _combinations(point: Mapping[str, Any], given: MethodConfig, recipe: Recipe, search: Mapping[str, Any]) -> list[MethodRow]:
    """The nine; of a sweep the point of each that what is swept has an effect on."""
    settings = {**search, **recipe.search.settings(), **given.settings(), **point}
    if unknown := sorted(set(point) - {*_SIZES, *_GUIDING}):
        raise ConfigError(
            f"{given.label}: {', '.join(unknown)} cannot be swept\n"
            "  expected some of: width, successors, chunk_length, beta, candidates, gate, kl_budget, draft"
        )
    sizes = {k: getattr(METHODS["ivg"], k) for k in _SIZES} | {k: settings[k] for k in _SIZES if k in settings}
    guiding = {k: settings[k] for k in _GUIDING if k in settings}
    found = []
    for token in _VALUES:
        for select in _VALUES:
            # only a pair (tuned, untuned) can draft
            chosen: dict[str, Any] = {"token": token, "select": select}
            chosen |= {k: v for k, v in guiding.items() if token != "none" and (k != "draft" or token == "implicit")}
            chosen |= sizes if select != "none" else {}
            own, name = {k: v for k, v in point.items() if k in chosen}, f"{token}×{select}"
            found.append(MethodRow(name + point_label(own), get_method("custom", **chosen), name if own else None, own))
    return found


def _check_search_is_used(search: Mapping[str, Any], all_methods: Sequence[Method]) -> None:
    """The ``search`` table is for ``combinations``; every setting in it must be a setting of some method."""
    for key, value in search.items():
        wanted = value
        if key in ("weights", "select_weights", "select_reference"):
            wanted = check(SearchSettings, key, value)
        elif value == "none":
            wanted = None
        able = [s for s in all_methods if (s.guides if key in _GUIDING else s.selectors if key in _SIZES else True)]
        if not any(getattr(s, key) == wanted for s in able):
            raise ConfigError(
                f"search.{key} = {value!r} is used by no method: [search] (with -W, --beta, …) sets '{COMBINATIONS}' only\n"
                f'  set it for a method: methods = [{{ method = "ivg", {key} = … }}], or leave it out'
            )
