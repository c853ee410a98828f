"""The rows of an evaluation: names and tables of methods become strategies with labels, checked before any model is loaded.

Knows: the recipe, which values its models make. Must not know models nor files of a run; imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivg.embedded import PREFIX
from ivg.errors import ConfigError
from ivg.jobs.provenance import same
from ivg.search.methods import Method, get_method, parse_weights, resolve_fallbacks
from ivg.settings.recipe import MethodConfig, ModelRef, Recipe

COMBINATIONS = "combinations"
"""Among methods: token guidance in {none, implicit, explicit} x selection in {none, implicit, explicit} (METHOD, section 4)."""
BASE = "base"
BANK = "bank"
"""Label of the base samples that best-of-N chooses from; no method may have it."""
SELECTORS = ("explicit", "reward", "implicit")
"""By what best-of-N selects from the bank: the first of these that is at hand."""
_VALUES = ("none", "implicit", "explicit")
_SIZES = ("width", "successors", "chunk_length", "original")
_GUIDING = ("beta", "candidates", "transform", "gate", "draft")
_EMBEDDED = {"implicit": ("tuned", "untuned"), "explicit": ("value",), "explicit-other": ("value-other",)}


@dataclass(frozen=True)
class MethodRow:
    """One row of the evaluation: its label, and the strategy with all settings."""

    label: str
    strategy: Method

    @property
    def plain(self) -> bool:
        """Nothing steers: the base itself."""
        s = self.strategy
        return s.name in (BASE, "custom") and not (s.needs or s.width * s.successors > 1)


def rows(recipe: Recipe, search: Mapping[str, Any]) -> tuple[MethodRow, ...]:
    """All rows, the plain base among them.

    Args:
        recipe: whose ``eval.methods`` are asked for.
        search: the task's own sizes, for ``combinations`` where the recipe's ``search`` table is silent.

    Raises:
        ConfigError: unknown method, unusable settings, two rows with one label, a value that no model makes, a setting of the
            ``search`` table that no row has.
    """
    values = values_of(recipe)
    found = [m for given in recipe.eval.methods for m in _expanded(given, recipe, search, values)]
    if not any(m.plain for m in found):
        found.insert(0, MethodRow(BASE, get_method(BASE)))
    labels = [m.label for m in found]
    twice = sorted({x for x in labels if labels.count(x) > 1 or x == BANK})
    if twice:
        raise ConfigError(f"methods: the label {', '.join(twice)} is taken\n  give each row a label of its own")
    for m in found:
        missing = sorted(m.strategy.needs - set(values))
        if missing:
            raise ConfigError(
                f"{m.label}: needs the value {' and '.join(missing)}; the models make {', '.join(sorted(values)) or 'none'}\n"
                "  give the models for it (e.g. --tuned and --untuned for implicit, --value for explicit), or leave the method out"
            )
    _all_read(recipe.search.settings(), [m.strategy for m in found])
    return tuple(found)


def values_of(recipe: Recipe) -> dict[str, list[ModelRef]]:
    """The values that the recipe's models make, by name, each with its models."""
    given = recipe.models.given
    if not given:
        found = {name: [ModelRef(path=f"{PREFIX}{part}") for part in parts] for name, parts in _EMBEDDED.items()}
    else:
        names = {"implicit": ("tuned", "untuned"), "explicit": ("value",), "reward": ("reward",), "arm": ("arm",)}
        found = {name: [given[r] for r in roles] for name, roles in names.items() if set(roles) <= set(given)}
    return found | {name: list(value.given.values()) for name, value in recipe.values.items()}


def keep_from(gold: ModelRef | None, recipe: Recipe, methods: Sequence[MethodRow]) -> None:
    """Check that no row is steered by what judges it.

    Raises:
        ConfigError: gold is a value of some row, or what best-of-N selects by.
    """
    if gold is None:
        return
    values = values_of(recipe)
    users = {m.label: m.strategy.needs for m in methods}
    if recipe.eval.bank:
        users[BANK] = frozenset(next(([n] for n in SELECTORS if n in values), ()))
    for name, refs in values.items():
        used = [label for label, needs in users.items() if name in needs]
        if used and any(same(ref.path, gold.path) for ref in refs):
            raise ConfigError(
                f"gold = {gold.path} is also the value {name}, which steers {', '.join(used)}\n"
                "  what is optimised cannot judge: give another gold, or let these rows use another value"
            )


def described(s: Method) -> dict[str, Any]:
    """A strategy's settings, without its one-line summary."""
    from dataclasses import asdict

    return {k: v for k, v in asdict(s).items() if k != "summary"}


def _expanded(given: MethodConfig, recipe: Recipe, search: Mapping[str, Any], values: Collection[str]) -> list[MethodRow]:
    if given.method != COMBINATIONS:
        return [MethodRow(given.label, resolve_fallbacks(get_method(given.method, **given.settings()), values))]
    settings = {**search, **recipe.search.settings(), **given.settings()}
    sizes = {"width": 4, "successors": 4, "chunk_length": 5} | {k: settings[k] for k in _SIZES if k in settings}
    guiding = {k: settings[k] for k in _GUIDING if k in settings}
    found = []
    for token in _VALUES:
        for select in _VALUES:
            chosen: dict[str, Any] = {"token": token, "select": select}
            chosen |= {k: v for k, v in guiding.items() if token != "none" and (k != "draft" or token == "implicit")}  # only a pair drafts
            chosen |= sizes if select != "none" else {}
            found.append(MethodRow(f"{token}×{select}", get_method("custom", **chosen)))
    return found


def _all_read(search: Mapping[str, Any], strategies: Sequence[Method]) -> None:
    """The ``search`` table is for ``combinations``; what it says beyond them must at least be true of some row."""
    for key, value in search.items():
        wanted = value
        if key in ("weights", "select_weights"):
            wanted = tuple(parse_weights(value, key).items())
        elif value == "none":
            wanted = None
        able = [s for s in strategies if (s.guides if key in _GUIDING else s.selectors if key in _SIZES else True)]
        if not any(getattr(s, key) == wanted for s in able):
            raise ConfigError(
                f"search.{key} = {value!r}, but no row has it: here the search table (and options like -W, --beta) is for the nine of "
                f"'{COMBINATIONS}'\n  give it to a method: methods = [{{ method = \"ivg\", {key} = … }}], or leave it out"
            )
