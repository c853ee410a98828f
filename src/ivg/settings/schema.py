"""How a setting is declared, once, for all places that offer it. Standard library only.

A setting is a field of a frozen dataclass or of a :class:`~ivg.settings.tables.Table`, with a :class:`Setting` in its annotation::

    @dataclass(frozen=True, kw_only=True)
    class SearchSettings:
        width: Annotated[int, Setting("Beams kept (W).", count(1), aliases=("W",), flags=("-W", "--width"))] = 1

The recipe, the command line, the HTTP body, ``ivg models`` and the pages cli.md and settings.md of docs/reference are made from that
line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from ivg.settings.rules import Rule


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of one setting, besides its name, type and default.

    Attributes:
        help: one or two sentences.
        rule: type and range; None: the annotated type says it all.
        aliases: other names that recipes and HTTP bodies may use.
        deprecated: old names, which still work, with a warning.
        flags: spellings on the command line; none: the setting is reached by ``--set`` and the recipe only.
        accepts: the type in recipes and HTTP bodies, where it differs from the one that is kept.
        unset: what None stands for, in words, for help texts and pages.
        secret: never shown in errors.
        escapes: on the command line, a backslash and an n are a line break.
        files: on the command line, the name of a file stands for its text, where the name ends so (``.json``).
        group: of a search, what must be on for the setting to have an effect: guidance, selection, contrast, steps, or a rule
            that is not top; of several, any one: ``soft|speculate``.
    """

    help: str
    rule: Rule | None = None
    aliases: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    accepts: Any = None
    unset: str = ""
    secret: bool = False
    deprecated: tuple[str, ...] = ()
    escapes: bool = False
    files: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True, slots=True)
class Declared:
    """A setting with its name, the type of the field and its default."""

    name: str
    type: Any
    default: Any
    setting: Setting


@cache
def settings_of(kind: type) -> dict[str, Declared]:
    """The settings that a dataclass or a table declares, by name; fields without a :class:`Setting` are none."""
    hints = get_type_hints(kind, include_extras=True)
    out = {}
    for name, default in _defaults(kind):
        hint = hints[name]
        found = next((m for m in get_args(hint)[1:] if isinstance(m, Setting)), None) if get_origin(hint) is Annotated else None
        if found is not None:
            out[name] = Declared(name, get_args(hint)[0], default, found)
    return out


def _defaults(kind: Any) -> Iterable[tuple[str, Any]]:
    if is_dataclass(kind):
        for f in fields(kind):
            yield f.name, f.default_factory() if f.default_factory is not MISSING else None if f.default is MISSING else f.default
    else:
        for name, info in kind.model_fields.items():
            yield name, None if info.is_required() else info.get_default(call_default_factory=True)


@cache
def rules_of(kind: type) -> dict[str, Rule]:
    """The rules of the settings of ``kind``, by name."""
    return {name: d.setting.rule for name, d in settings_of(kind).items() if d.setting.rule is not None}


def validate(instance: Any, like: type | None = None) -> None:
    """Check the fields of a frozen dataclass and keep the converted values; for ``__post_init__``.

    Args:
        instance: what is being made.
        like: another class whose settings of the same names apply; default: its own.

    Raises:
        ConfigError: a field of the wrong type or out of range.
    """
    kind: Any = type(instance)
    for name, rule in _ruled(kind, like or kind).items():
        value = getattr(instance, name)
        kept = rule.checked(name, value)
        if kept is not value:
            object.__setattr__(instance, name, kept)


@cache
def _ruled(kind: Any, like: type) -> dict[str, Rule]:
    """The fields of ``kind`` for which ``like`` has a rule."""
    rules = rules_of(like)
    return {f.name: rules[f.name] for f in fields(kind) if f.name in rules}


def check(kind: type, name: str, value: Any) -> Any:
    """``value`` of the setting ``name`` of ``kind``, converted.

    Raises:
        ConfigError: of the wrong type or out of range.
    """
    rule = rules_of(kind).get(name)
    return value if rule is None else rule.checked(name, value)
