"""Entry points of other packages, from a real package (a module and its dist-info) on sys.path."""

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


def test_an_object_is_imported_when_it_is_asked_for(package, tmp_path):
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
