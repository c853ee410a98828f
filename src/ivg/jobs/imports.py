"""The local files that a Python file imports, found without running it. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_INSTALLED = {"site-packages", "dist-packages"}


def local_imports(file: Path) -> list[Path]:
    """``file`` and the Python files that it imports, and they in turn: those beside it, in the current directory, or named relatively.

    Imports under a computed name, data that a function reads, and installed packages are not found.
    """
    root = file.resolve()
    found, queue = {root}, [root]
    while queue:
        path = queue.pop()
        if _INSTALLED & set(path.parts):
            continue
        for place in _named(path, (root.parent, Path.cwd())):
            if place not in found and not _INSTALLED & set(place.parts):
                found.add(place)
                queue.append(place)
    return sorted(found, key=lambda path: (path != root, str(path)))


def _named(path: Path, folders: tuple[Path, ...]) -> Iterator[Path]:
    """Files that the import statements of ``path`` may mean."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # reported when it is loaded
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, where = [alias.name for alias in node.names], folders
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [".".join(part for part in (base, alias.name) if part) for alias in node.names]
            where = (path.parents[min(node.level, len(path.parents)) - 1],) if node.level else folders
        else:
            continue
        for folder in where:
            for name in names:
                yield from _files(folder, name.split("."))


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Of ``a.b.c``: a, a.b and a.b.c, each a file or a package; the last may be a name in the one before."""
    for count in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:count])
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                yield file.resolve()
