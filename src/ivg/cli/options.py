"""Options of the command line, made from the settings that :mod:`ivg.settings` declares.

A verb names the settings that it offers; :func:`command` gives its function a signature with one option for each, and calls it with the
frozen objects that they make::

    @command(recipe=RecipeOptions("models", "search"), cluster=Options(RaySettings, "Many machines", make=RaySettings.of))
    def generate(prompts: ..., *, recipe: Recipe, cluster: RaySettings | None) -> None: ...
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

import typer

from ivg.errors import ConfigError
from ivg.settings.schema import Declared, settings_of

F = TypeVar("F", bound=Callable[..., None])


class OptionGroup(Protocol):
    """Options that make one argument of a verb."""

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One parameter for each option, as typer reads them."""
        ...

    def build(self, given: Mapping[str, Any]) -> Any:
        """The argument, from the values of the parameters; an option that was not typed is None or []."""
        ...


def command(**groups: OptionGroup) -> Callable[[F], F]:
    """Decorator of a verb's function: its keyword arguments named in ``groups`` are made from options."""

    def decorate(function: F) -> F:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in groups]
        options = {name: [p.replace(name=f"{name}_{p.name}") for p in group.parameters()] for name, group in groups.items()}

        def run(**given: Any) -> None:
            made = {
                name: group.build({p.name.removeprefix(f"{name}_"): given[p.name] for p in options[name]}) for name, group in groups.items()
            }
            function(**{p.name: given[p.name] for p in own}, **made)

        parameters = [*own, *(p for some in options.values() for p in some)]
        run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True)
class Options:
    """All settings of one class that have a spelling on the command line.

    Attributes:
        kind: declares them.
        panel: their title in the help.
        make: called with what was typed, by name; default: ``kind``.
        defaults: defaults of this verb, where they differ.
        unset: what a setting is that is not typed, in words, where its default does not say it.
    """

    kind: type
    panel: str
    make: Callable[..., Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unset: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> Iterator[inspect.Parameter]:
        """See :class:`OptionGroup`."""
        for declared in settings_of(self.kind).values():
            if declared.setting.flags:
                text = self.unset.get(declared.name) or default_text(declared, self.defaults.get(declared.name, declared.default))
                yield option(declared, self.panel, text)

    def build(self, given: Mapping[str, Any]) -> Any:
        """See :class:`OptionGroup`.

        Raises:
            ConfigError: unusable settings.
        """
        return (self.make or self.kind)(**{**self.defaults, **typed(self.kind, given)})


def typed(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, in the form in which a recipe has it.

    Raises:
        ConfigError: not of the form NAME=VALUE where that is expected.
    """
    return {name: _converted(settings_of(kind)[name], value) for name, value in given.items() if value is not None and value != []}


def option(declared: Declared, panel: str, default: str = "", name: str | None = None) -> inspect.Parameter:
    """A setting as a parameter of a verb; ``default``: in words."""
    setting = declared.setting
    text = setting.help + (f" (default: {default})" if default else "")
    old = tuple(f"--{name.replace('_', '-')}" for name in setting.deprecated)
    if old:
        text += f" ({', '.join(old)}: the old name, until 0.3)"
    kind: Any = cli_type(declared)
    annotation = Annotated[kind | None, typer.Option(*setting.flags, *old, help=text, rich_help_panel=panel)]
    return inspect.Parameter(name or declared.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def default_text(declared: Declared, default: Any) -> str:
    """A default in words; nothing for a switch that is off."""
    if default is None:
        return declared.setting.unset
    if isinstance(default, bool) or default == () or default == {}:
        return ""
    if isinstance(default, list | tuple):  # of texts, or of tables that ``unset`` names
        return declared.setting.unset or ", ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def cli_type(declared: Declared) -> Any:
    """The type that typer reads: a number, a switch, a text or several of them."""
    kinds = _without_none(declared.setting.accepts or declared.type)
    for kind in kinds:
        if kind in (bool, int, float, Path):
            return kind
        if _is_mapping(kind) and len(kinds) == 1:
            return list[str]
        if get_origin(kind) in (list, tuple) and get_args(kind)[0] is str:
            return list[str]
    return str


def _without_none(kind: Any) -> list[Any]:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [part for part in parts if part is not NoneType and get_origin(part) is not Literal]


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _converted(declared: Declared, value: Any) -> Any:
    kinds, setting = _without_none(declared.setting.accepts or declared.type), declared.setting
    if setting.files and isinstance(value, str) and value.endswith(setting.files):
        value = _file_text(value, setting.flags[0])
    if setting.escapes:
        value = [text.replace("\\n", "\n") for text in value] if isinstance(value, list) else value.replace("\\n", "\n")
    if len(kinds) == 1 and _is_mapping(kinds[0]):
        return assignments(value, setting.flags[0])
    if len(kinds) == 1 and get_origin(kinds[0]) is list and isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        return [plain_value(part) for part in parts] if get_args(kinds[0])[0] is int else parts
    return value


def _file_text(name: str, flag: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{flag} {name}: {e.strerror if isinstance(e, OSError) else 'it is no UTF-8'}\n  expected a text file") from None


def assignments(texts: Collection[str], flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, each value as JSON where it is JSON, else as text.

    Raises:
        ConfigError: no name, or no equals sign.
    """
    out: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"{flag} {text!r}\n  expected NAME=VALUE")
        out[name.strip()] = plain_value(value.strip())
    return out


def plain_value(text: str) -> Any:
    """A number, true, false, null, a list or an object where ``text`` is one, else the text."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        pass
    try:
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text
