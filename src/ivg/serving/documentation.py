"""The page ``/reference``: methods, settings of a request and paths of this server, made from the tables that it runs by."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from ivg.search.methods import LEVELS, Method
from ivg.serving.served_models import ServedModels
from ivg.settings.sampling import SamplingParams
from ivg.settings.schema import settings_of
from ivg.settings.search import SearchSettings
from ivg.utils.templates import render
from ivg.utils.version import VERSION


def documentation(served: ServedModels, paths: Mapping[str, str]) -> str:
    """The page as HTML. Where the server wants a key, the page, which wants none, says nothing of its models and methods.

    Args:
        served: the models.
        paths: (path, what it does) of the server's API.
    """
    is_open = not served.settings.api_keys
    methods = [served.get_method(name, {}) for name in dict.fromkeys(served.names.values())]
    groups = [(title, [_method(m) for m in methods if m.level == level]) for level, title in LEVELS.items()]
    return render(
        "ivg.serving",
        "reference.html.jinja",
        version=VERSION,
        is_open=is_open,
        name=served.name,
        chat=served.describe()["chat"],
        links=_links(),
        paths=paths,
        groups=[(title, some) for title, some in groups if some and is_open],
        settings=[("Guidance and search", _settings(SearchSettings)), ("Sampling and length", _settings(SamplingParams))],
    )


def _method(method: Method) -> dict[str, Any]:
    chunk = method.chunk_length or ("until a text" if method.chunk_until else "the whole answer")
    summary = f"{method.summary[:1].upper()}{method.summary[1:]}."
    return {"name": method.name, "summary": summary, "width": method.width, "successors": method.successors, "chunk": chunk}


def _settings(kind: type) -> list[tuple[str, str]]:
    """(name, help) of the settings that a kind declares."""
    return [(name, declared.setting.help) for name, declared in settings_of(kind).items()]


def _links() -> list[tuple[str, str]]:
    """(label, address) of the project's pages, as the installed package names them."""
    try:
        found = metadata("ivg").get_all("Project-URL") or []
    except PackageNotFoundError:
        return []
    return [(label.strip(), address.strip()) for label, _, address in (line.partition(",") for line in found)]
