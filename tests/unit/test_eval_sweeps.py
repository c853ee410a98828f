"""Sweeps of an evaluation: what a list in a recipe stands for, labels, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ivg.cli import eval as verb
from ivg.cli.app import app
from ivg.errors import ConfigError
from ivg.evaluation.figures import order
from ivg.evaluation.methods import method_rows
from ivg.evaluation.report import read_results
from ivg.evaluation.tables import tables
from ivg.settings.recipe import Recipe

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"


def rows(*methods):
    return {m.label: m for m in method_rows(Recipe.parse({"eval": {"methods": list(methods)}}), {})}


def test_a_list_is_one_row_for_each_number():
    found = rows({"method": "eft", "beta": [0.25, 1, 2.0]}, "bon")
    assert list(found) == ["base", "eft-beta0.25", "eft-beta1", "eft-beta2", "bon"]
    assert [(m.sweep, m.point, m.method.beta) for m in list(found.values())[1:4]] == [
        ("eft", {"beta": 0.25}, 0.25),
        ("eft", {"beta": 1}, 1),
        ("eft", {"beta": 2.0}, 2.0),
    ]
    assert (found["bon"].sweep, found["bon"].point) == (None, {})


def test_lists_of_equal_length_go_together():
    found = rows({"label": "search", "method": "cbs-explicit", "W": [1, 2, 4], "successors": [2, 4, 4], "chunk_length": 7})
    assert list(found) == ["base", "search-W1-K2", "search-W2-K4", "search-W4-K4"]
    made = [m.method for m in found.values()][1:]
    assert [(m.width, m.successors, m.chunk_length) for m in made] == [(1, 2, 7), (2, 4, 7), (4, 4, 7)]
    assert {m.sweep for m in found.values()} == {None, "search"}


def test_of_the_combinations_those_change_that_use_the_setting():
    found = rows({"method": "combinations", "beta": [0.5, 1.0]})
    assert len(found) == 3 + 2 * 6  # none×none, none×implicit and none×explicit have no token guidance
    assert found["none×explicit"].sweep is None
    assert found["implicit×explicit-beta0.5"].sweep == "implicit×explicit"
    assert found["implicit×explicit-beta0.5"].method.beta == 0.5


def test_a_recipe_is_kept_as_it_was_written(tmp_path):
    (tmp_path / "r.toml").write_text('[eval]\nmethods = ["bon", { method = "eft", alpha = [0.5, 1] }]\n')
    recipe = Recipe.load(tmp_path / "r.toml")
    assert recipe.eval.methods[1].sweep == {"beta": [0.5, 1]}
    assert Recipe.parse(recipe.model_dump(exclude_none=True)) == recipe


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([{"method": "eft", "beta": [0.5, "x"]}], "beta must be a finite number, within 1000 of 0, got 'x'"),
        ([{"method": "eft", "beta": [True]}], "beta must be a finite number, within 1000 of 0, got True"),
        ([{"method": "eft", "beta": [0.5, 2000]}], "beta must be within 1000 of 0, got 2000"),
        ([{"method": "bon", "successors": [2, 4.5]}], "must be a whole number, at least 1, got 4.5"),
        ([{"method": "eft", "beta": []}], "equal lengths of 1 or more, got beta 0"),
        ([{"method": "cbs-explicit", "width": [1, 2], "successors": [1, 2, 3]}], "equal lengths of 1 or more, got width 2, successors 3"),
        ([{"method": "eft", "beta": [1], "alpha": [2]}], "beta is swept twice"),
        ([{"method": "eft", "beta": 1.0, "sweep": {"beta": [2.0]}}], "beta is given once as a value and once as a sweep"),
        (
            [{"method": "contrast", "contrast": ["Be kind.", "Be brief."]}],
            "contrast cannot be swept: expected a setting that",
        ),
        ([{"method": "eft", "sweep": {"bta": [1.0]}}], "bta cannot be swept"),
        ([{"method": "eft", "sweep": {"beta": 1}}], "sweep.beta: expected a list, got 1"),
        ([{"method": "bon", "beta": [1, 2]}], "bon: the sweep of beta has no effect: the method bon guides no tokens"),
        ([{"method": "eft", "beta": [1, 1.0]}], "the label eft-beta1 is used twice"),
        ([{"method": "combinations", "soft_scale": [1, 2]}], "soft_scale cannot be swept"),
        ([{"method": "ivg", "beta": [1, 2]}, {"method": "ivg", "width": [1, 2]}], "two sweeps are called ivg"),
        ([{"method": "bon", "label": "best-of-N", "successors": [2, 4]}], "or the name is reserved"),
    ],
)
def test_what_cannot_be_swept_is_refused(methods, says):
    with pytest.raises(ConfigError, match=says):
        rows(*methods)


def test_sweeps_on_the_command_line(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(verb, "run", lambda plan, stages, docs, **_: seen.append([m.label for m in plan.method_rows]))
    common = ["eval", "sentiment", "--stage", "generate", "--out", str(tmp_path / "out")]
    for more in (["--sweep", "eft:beta=0.5,1", "--sweep", "cbs-explicit:width=1,2:K=2,4"], ["--methods", "bon", "--sweep", "eft:beta=0.5"]):
        result = CliRunner().invoke(app, [*common, *more])
        assert result.exit_code == 0, result.output
    assert seen == [
        ["base", "eft-beta0.5", "eft-beta1", "cbs-explicit-W1-K2", "cbs-explicit-W2-K4"],
        ["base", "bon", "eft-beta0.5"],
    ]


@pytest.mark.parametrize("text", ["eft", "eft:beta", ":beta=1", "eft:=1", "eft:beta="])
def test_a_sweep_of_another_form_is_refused(text, tmp_path):
    result = CliRunner().invoke(app, ["eval", "sentiment", "--out", str(tmp_path), "--sweep", text])
    assert result.exit_code != 0
    assert "expected METHOD:SETTING=V,V,V" in str(result.exception) + result.output


@pytest.mark.parametrize("path", sorted(PUBLISHED.rglob("results.json")), ids=lambda path: path.parent.name)
def test_published_results_of_older_versions_can_be_read(path):
    results = read_results(path)
    table = tables(results)[0]
    assert [row[0] for row in table.rows] == list(order(results))
    assert table.header[-4:] == ["distinct-2", "repetition", "words", "tokens"]
