"""What rows depend on: settings, weights, functions and the local files that they import."""

import json

from ivg.jobs.fingerprints import fingerprint
from ivg.jobs.imports import local_imports
from ivg.jobs.provenance import answer_provenance, differences
from ivg.settings.recipe import Recipe
from ivg.utils import jsonl


def test_a_device_that_is_not_known_differs_from_none():
    assert differences({"device": None, "a": {"b": 1}}, {"device": "cpu", "a": {"b": 1}}) == []


def test_settings_that_are_the_methods_own_count_as_not_given():
    plain = answer_provenance(Recipe.parse({"search": {"method": "ivg"}}), "cpu")
    same = {"method": "ivg", "width": 4, "successors": 4, "chunk_length": 5, "beta": 1, "token": "implicit", "rule": "top"}
    assert answer_provenance(Recipe.parse({"search": same}), "cpu") == plain
    for change in ({"width": 3}, {"beta": 0.5}, {"token": "none"}, {"weights": {"implicit": 1.0}}):
        assert answer_provenance(Recipe.parse({"search": {"method": "ivg", **change}}), "cpu") != plain


def test_everything_that_makes_an_answer_counts_and_nothing_else(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 1\n")
    data = {"models": {"base": str(tmp_path / "a"), "reward": f"{tmp_path}/r.py:f"}}
    first = answer_provenance(Recipe.parse(data), "cpu")
    assert first == answer_provenance(
        Recipe.parse(data | {"run": {"n": 3, "batch_size": 2}, "eval": {"seeds": 2}, "vllm": {"max_num_seqs": 3}}), "cpu"
    )
    for change, device in (
        ({"run": {"dtype": "float32"}}, "cpu"), ({"run": {"seed": 1}}, "cpu"), ({"run": {"revision": "x"}}, "cpu"), ({}, "cuda"),
        ({"run": {"engine": "vllm"}}, "cpu"), ({"sampling": {"top_k": 3}}, "cpu"), ({"search": {"beta": 2.0}}, "cpu"),
        ({"models": data["models"] | {"base": {"path": str(tmp_path / "a"), "template": "chat"}}}, "cpu"),
        ({"models": data["models"] | {"base": str(tmp_path / "b")}}, "cpu"),
        ({"values": {"more": {"reward": f"{tmp_path}/r.py:f"}}}, "cpu"),
    ):  # fmt: skip
        assert answer_provenance(Recipe.parse(data | change), device) != first
    (tmp_path / "r.py").write_text("def f(prompt, response):\n    return 2\n")
    assert differences(first, answer_provenance(Recipe.parse(data), "cpu"))[0].startswith("weights.reward is ")
    assert json.loads(jsonl.to_json(first)) == first


def test_what_a_function_imports_from_beside_it_counts(tmp_path, monkeypatch):
    """Its own modules and packages, and theirs; a stranger's do not, and what cannot be parsed is nobody's import."""
    kit = tmp_path / "kit"
    (kit / "deep").mkdir(parents=True)
    (tmp_path / "r.py").write_text("import json, torch\nimport words as w\ndef f(p, r):\n    from kit.deep import rules\n    return 1\n")
    (tmp_path / "words.py").write_text("import r\n")  # a circle
    (kit / "__init__.py").write_text("")
    (kit / "deep" / "__init__.py").write_text("")
    (kit / "deep" / "rules.py").write_text("from .. import more\nfrom ...words import x\n")
    (kit / "more.py").write_text("x = = 1\n")
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.chdir("/")
    names = [str(p.relative_to(tmp_path)) for p in local_imports(tmp_path / "r.py")]
    assert names == ["r.py", "kit/__init__.py", "kit/deep/__init__.py", "kit/deep/rules.py", "kit/more.py", "words.py"]
    first = fingerprint(f"{tmp_path}/r.py:f")
    (tmp_path / "stranger.py").write_text("x = 1\n")
    assert fingerprint(f"{tmp_path}/r.py:f") == first
    marks = {first}
    for name in names:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited\n")
        marks.add(fingerprint(f"{tmp_path}/r.py:f"))
    assert len(marks) == 1 + len(names)
