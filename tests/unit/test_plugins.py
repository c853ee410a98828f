"""Entry points of other packages, from a real package (a module and its dist-info) on sys.path."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from ivg.utils.plugins import Plugins, PluginWarning


def install(folder, name, module, entries):
    """Write a package of one module as pip leaves it: ``entries`` are the lines of its entry_points.txt."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, module, entries: install(tmp_path, name, module, entries)


def test_objects_are_imported_on_first_use(package, tmp_path):
    package("lazy_plugin", f"open({str(tmp_path / 'imported')!r}, 'w').close()\nANSWER = 42", "[ivg.test]\nanswer = lazy_plugin:ANSWER\n")
    plugins = Plugins("ivg.test", int)
    assert plugins.names == ["answer"] and plugins.source("answer") == "lazy_plugin (lazy_plugin:ANSWER)"
    assert not (tmp_path / "imported").exists()
    assert plugins.get("answer") == 42 and plugins.all() == {"answer": 42}
    assert plugins.get("nobody") is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("broken_plugin:MISSING", "has no attribute 'MISSING'"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("broken_plugin:TEXT", "got str, expected an object of class int"),
        ("broken_plugin.raises:X", "is not a package"),
    ],
)
def test_a_broken_plugin_is_left_out_with_one_warning(package, entry, words):
    package("broken_plugin", "GOOD, TEXT = 1, 'text'", f"[ivg.test]\ngood = broken_plugin:GOOD\nbad = {entry}\n")
    plugins = Plugins("ivg.test", int)
    with pytest.warns(PluginWarning, match=rf"left out the plugin 'bad' of ivg\.test from broken_plugin .*{words}") as caught:
        assert plugins.all() == {"good": 1}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plugins.all() == {"good": 1} and plugins.get("bad") is None


def test_a_plugin_cannot_take_a_name_of_ours(package):
    package("greedy_plugin", "X = 1", "[ivg.test]\nbase = greedy_plugin:X\nother = greedy_plugin:X\n")
    with pytest.warns(PluginWarning, match="'base' .* the name is taken by ivg itself"):
        assert Plugins("ivg.test", int, frozenset({"base"})).all() == {"other": 1}


PACKAGE = """
from ivg import Method, Value

SHOUTING = Method("any name", "the loudest of four", successors=4, chunk_length=6, select="loud")


class Loud(Value):
    def __init__(self, letter):
        self.letter = letter

    def score(self, hypotheses):
        return [float(h.text.count(self.letter)) for h in hypotheses]


def loud(argument):
    if argument == "fail":
        raise RuntimeError("no voice")
    return Loud(argument)


def quiet(argument):
    return lambda prompt, response: -len(response)
"""
ENTRIES = """
[ivg.methods]
shouting = loud_plugin:SHOUTING
broken = loud_plugin:NOTHING
[ivg.values]
loud = loud_plugin:loud
quiet = loud_plugin:quiet
"""


@pytest.fixture
def ivg(tmp_path):
    """Runs ivg in a process that has the package installed; gives its exit status, output and errors."""
    install(tmp_path, "loud_plugin", PACKAGE, ENTRIES)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        command = [sys.executable, "-m", "ivg", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
        return done.returncode, done.stdout, done.stderr

    return run


def test_methods_and_values_of_other_packages_are_listed(ivg):
    code, out, err = ivg("models", "--json")
    found = json.loads(out)
    assert code == 0
    assert err.count("left out the plugin 'broken' of ivg.methods from loud_plugin (loud_plugin:NOTHING)") == 1
    assert {"name": "shouting", "successors": 4, "select": "loud"}.items() <= found["methods"][-1].items()
    assert {(p["name"], p["group"]) for p in found["plugins"]} == {
        ("shouting", "ivg.methods"),
        ("loud", "ivg.values"),
        ("quiet", "ivg.values"),
    }
    code, out, _ = ivg("models")
    assert code == 0 and "loud_plugin (loud_plugin:quiet)" in out


def test_a_recipe_uses_methods_and_values_of_other_packages(ivg, tmp_path):
    values = '[values]\nloud = { plugin = "loud:e" }\nshort = { plugin = "quiet" }\n'
    recipe = values + '[search]\nmethod = "shouting"\n[sampling]\nmax_new_tokens = 12\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    ask = ("generate", "The movie was", "--recipe", "recipe.toml", "--seed", "1", "--output", "out.jsonl")
    code, _, err = ivg(*ask)
    assert code == 0, err
    assert "left out" not in err  # the broken plugin was not asked for
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["score"] == row["text"].count("e") and row["method"] == "shouting"
    assert row["values"] == {"loud": {"plugin": "loud:e"}, "short": {"plugin": "quiet"}}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nobody:x", "values.mine: no plugin 'nobody' for values"),
        ("loud:fail", "values.mine: the plugin loud of loud_plugin (loud_plugin:loud) failed: RuntimeError: no voice"),
    ],
)
def test_a_value_of_an_unknown_plugin_is_an_error(ivg, tmp_path, spec, words):
    (tmp_path / "recipe.toml").write_text(f'[values]\nmine = {{ plugin = "{spec}" }}\n')
    code, _, err = ivg("generate", "The", "--recipe", "recipe.toml")
    assert code == 2 and words in " ".join(err.split())
