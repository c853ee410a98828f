"""Extension of griffe, which reads the source for the documentation site: roles such as :class:`Name` in docstrings become links."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Names are looked up where they are used, as Python would."""
        self._rewrite(pkg)

    def _rewrite(self, item: griffe.Object) -> None:
        if item.docstring:
            item.docstring.value = ROLE.sub(lambda match: _link(item, match[1]), item.docstring.value)
        for member in item.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _link(item: griffe.Object, name: str) -> str:
    first, dot, rest = name.partition(".")
    try:
        path = name if first == "ivg" else item.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return f"`{name}`"
    shown = name.rpartition(".")[2] if first == "ivg" else name
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'
