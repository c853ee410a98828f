"""No import among the modules of ivg goes in a circle, and tests use public names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest


def circles(imports):
    """Strongly connected groups of more than one module (Tarjan 1972)."""
    order, low, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(imports.get(module, ())):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[-len(group) :]
            found.extend([sorted(group)] if len(group) > 1 else [])

    for module in sorted(imports):
        if module not in order:
            visit(module)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == []


def test_no_import_goes_in_a_circle():
    """Imports for type checking and inside functions count, too."""
    graph = grimp.build_graph("ivg", cache_dir=None)
    assert circles({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []


FOREIGN = {
    "_attn_implementation": "transformers: which attention a network uses; restored after our passes",
    "_attn_implementation_internal": "transformers: the field that we set, watched by test_dependencies",
    **dict.fromkeys(
        ("_C", "_python_dispatch", "_pytree", "_make_wrapper_subclass", "_only_lift_cpu_tensors", "_set_only_lift_cpu_tensors"),
        "torch: tensors that compute elsewhere than they say (tests/fake_devices.py), as PyTorch's own fake tensors do",
    ),
    **dict.fromkeys(("_to_copy", "_index_put_impl_"), "torch: names of operators"),
    "_setup_privateuseone_for_python_backend": "torch: a device type that is written in Python; test_devices skips without it",
    "_forward_hooks": "torch: hooks left on a user's network",
    "_forward_pre_hooks": "torch: hooks left on a user's network",
    "_name_or_path": "transformers: what a checkpoint says of its origin",
}
"""Private names of other libraries that tests may use, each with its reason. Of ivg there are none."""


def private_names(source):
    """Names with a leading underscore that ``source`` imports, reads from another object, or patches by a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found.update(part for name in names for part in name.name.split("."))
                found.update((getattr(node, "module", None) or "").split("."))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(func=ast.Attribute(attr="setattr" | "delattr" | "setitem") | ast.Name(id="getattr" | "setattr"), args=args):
                strings = [a.value for a in args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found.update(part for text in strings for part in text.split("."))
    return {name for name in found if re.fullmatch("_[A-Za-z]\\w*", name)}


def test_private_names_are_found():
    source = """
from ivg.a import _b
from ivg._c import d
import ivg._e
x._f.g()
self._own = __name__
monkeypatch.setattr("ivg.a._h", 1)
monkeypatch.setattr(a, "_i", 1)
"""
    assert private_names(source) == {"_b", "_c", "_e", "_f", "_h", "_i"}


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_tests_use_public_names(folder):
    files = sorted((Path(__file__).parents[2] / folder).rglob("*.py"))
    found = {f"{path}: {name}" for path in files for name in private_names(path.read_text(encoding="utf-8")) - set(FOREIGN)}
    assert files and not found
