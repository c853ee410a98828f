"""A run of ``ivg eval`` with sweeps on tiny models: results at equal KL and equal compute, recomputed from the files of the run."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from test_eval import hub, recipe  # noqa: F401  (fixtures)

from ivg.errors import ConfigError
from ivg.evaluation import runner
from ivg.evaluation.plan import make_plan
from ivg.evaluation.report import read_results, report
from ivg.evaluation.score import read_scored
from ivg.evaluation.tables import tables

METHODS = [
    {"method": "eft", "beta": [0.5, 4.0]},
    {"label": "search", "method": "cbs-explicit", "width": [1, 2], "successors": [2, 2], "chunk_length": 3},
    "smc",
]


@pytest.fixture(scope="module")
def done(hub, tmp_path_factory):  # noqa: F811
    plan = make_plan(recipe(hub, methods=METHODS), tmp_path_factory.mktemp("sweeps"))
    runner.run(plan)
    return plan


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done.out / "results.json").read_text())


def by_prompt(pairs, value):
    """Means over seeds, then over prompts."""
    found = {}
    for row, scores in pairs:
        if "error" not in row:
            found.setdefault(row["id"], []).append(value(row, scores))
    return float(np.mean([np.mean(v) for v in found.values()]))


def points(done, labels, kl):
    """(KL, FLOPs, gold) of every point."""
    sizes = json.loads((done.out / "models.json").read_text())["parameters"]
    out = []
    for label in labels:
        pairs = read_scored(done, label)
        cost = by_prompt(pairs, lambda r, _: 2 * sum(n * sizes[k] for k, n in r["forward_tokens"].items()))
        out.append((by_prompt(pairs, lambda r, _, label=label: kl(label, r)), cost, by_prompt(pairs, lambda _, s: s["gold"])))
    return out


def test_the_points_know_their_sweep(results):
    methods = results["methods"]
    assert {label: m["sweep"] for label, m in methods.items()} == {
        "base": None,
        "eft-beta0.5": "eft",
        "eft-beta4": "eft",
        "search-W1-K2": "search",
        "search-W2-K2": "search",
        "smc": None,
    }
    assert methods["search-W2-K2"]["point"] == {"width": 2, "successors": 2}
    assert results["sweeps"]["eft"]["points"] == ["base", "eft-beta0.5", "eft-beta4"]
    assert results["sweeps"]["search"]["settings"] == ["width", "successors"]
    assert [results["sweeps"][k]["bound"] for k in ("eft", "search", "best-of-N")] == [False, True, True]


def test_rewards_at_equal_kl_are_interpolated_from_the_files(done, results):
    measured = points(done, ["base", "eft-beta0.5", "eft-beta4"], lambda label, r: r["shift"])
    assert results["sweeps"]["eft"]["kl"] == pytest.approx([kl for kl, _, _ in measured], abs=1e-4)
    order = np.argsort([kl for kl, _, _ in measured])
    x, y = (np.array([p[i] for p in measured])[order] for i in (0, 2))
    found = results["equal_kl"]
    cells = found["rewards"]["gold"]["eft"]
    assert any(cells)
    for budget, cell in zip(found["budgets"], cells, strict=True):
        if not x[0] <= budget["kl"] <= x[-1]:
            assert cell is None
            continue
        assert cell["mean"] == pytest.approx(np.interp(math.sqrt(budget["kl"]), np.sqrt(np.maximum(x, 0)), y), abs=1e-4)
        assert cell["low"] <= cell["mean"] <= cell["high"]
    assert set(found["rewards"]) == {"gold", "other"}
    assert set(found["rewards"]["other"]) == {"eft", "search", "best-of-N"}


def test_rewards_at_equal_compute_are_interpolated_from_the_files(done, results):
    measured = points(done, ["base", "search-W1-K2", "search-W2-K2"], lambda *_: 0.0)
    x, y = (np.array([p[i] for p in sorted(measured, key=lambda p: p[1])]) for i in (1, 2))
    found = results["equal_compute"]
    assert [b["flops"] for b in found["budgets"]] == pytest.approx([x[0] * 2**i for i in range(len(found["budgets"]))], rel=1e-6)
    for budget, cell in zip(found["budgets"], found["rewards"]["gold"]["search"], strict=True):
        expected = np.interp(math.log(budget["flops"]), np.log(x), y) if budget["flops"] <= x[-1] * (1 + 1e-9) else None
        assert (None if cell is None else pytest.approx(cell["mean"], abs=1e-5)) == expected
    assert found["rewards"]["gold"]["search"][1] is not None
    assert found["left_out"] == ["eft"]  # all its points read the same tokens


def test_best_of_n_is_judged_by_every_judge(done, results):
    curve = results["base_samples"]["curve"]
    rows = [(r, s) for r, s in read_scored(done, "base_samples") if "error" not in r]
    for n in (1, 4):
        for judge, found in (("gold", curve[n - 1]["gold"]), ("other", curve[n - 1]["judges"]["other"])):
            chosen = [(r, s[judge][str(max(range(n), key=lambda i: r["samples"][i]["value"]))]) for r, s in rows]
            assert found["mean"] == pytest.approx(by_prompt(chosen, lambda _, reward: reward), abs=1e-5)


def test_the_report_shows_them(done, results):
    titles = [t.title for t in tables(results)]
    assert titles[:5] == ["Reward", "Reward at equal KL", "other at equal KL", "Reward at equal compute", "other at equal compute"]
    kl = tables(results)[1]
    assert {row[0]: row[1] for row in kl.rows} == {"eft": "estimated", "search": "≤", "best-of-N": "≤"}
    assert "The base is the first point of eft, search." in kl.note
    text, page = (done.out / "report.md").read_text(), (done.out / "report.html").read_text()
    for table in tables(results)[1:5]:
        assert f"## {table.title}\n" in text
        assert f"<h2>{table.title}</h2>" in page
    for name in ("reward-kl", "reward-compute-other"):
        drawn = " ".join(" ".join(ElementTree.parse(done.out / "figures" / f"{name}.svg").getroot().itertext()).split())
        assert "lines join the points of a sweep" in drawn
        assert "W1-K2" in drawn  # the last point has the sweep's name, the others their numbers alone


def test_the_kl_is_bounded_from_both_sides(results):
    for label, m in results["methods"].items():
        assert m["kl_at_least"] >= 0.0
        assert math.isfinite(m["surprisal_above_base"]["mean"])
        assert (label == "base") <= (m["surprisal_above_base"]["mean"] == 0.0 and m["kl_at_least"] == 0.0)


def test_differences_from_a_method(done, results):
    assert results["differences"] is None
    with pytest.raises(ConfigError, match="expected one of: base, eft-beta"):
        make_plan(done.recipe.override(eval={"compare_to": "ivg"}), done.out)
    found = report(make_plan(done.recipe.override(eval={"compare_to": "search-W1-K2"}), done.out))
    differences = found["differences"]
    gold = {label: by_prompt(read_scored(done, label), lambda _, s: s["gold"]) for label in found["methods"]}
    assert set(differences["methods"]) == set(gold) - {"search-W1-K2"}
    for label, m in differences["methods"].items():
        assert m["rewards"]["gold"]["mean"] == pytest.approx(gold[label] - gold["search-W1-K2"], abs=1e-5)
        assert m["flops"] == pytest.approx(found["methods"][label]["flops"] / found["methods"]["search-W1-K2"]["flops"], rel=1e-6)
    assert set(differences["sweeps"]) == {"eft", "best-of-N"}  # not the sweep that it is a point of
    assert "flops" not in differences["sweeps"]["eft"]
    assert differences["sweeps"]["best-of-N"]["kl"]["gold"]["mean"] == pytest.approx(
        np.interp(
            *(math.sqrt(found["sweeps"]["search"]["kl"][1]), np.sqrt(found["sweeps"]["best-of-N"]["kl"])),
            found["sweeps"]["best-of-N"]["rewards"]["gold"],
        )
        - gold["search-W1-K2"],
        abs=1e-4,
    )
    table = next(t for t in tables(found) if t.title == "Differences from search-W1-K2")
    assert table.header == ["method", "gold reward", "other", "FLOPs"]
    assert any(row[0] == "best-of-N at its FLOPs" for row in table.rows)
    report(done)


def test_results_without_sweeps_can_be_read(results, tmp_path):
    """Those of 0.2 before there were sweeps lack all that belongs to them."""
    old = {k: v for k, v in results.items() if k not in ("sweeps", "equal_kl", "equal_compute", "differences")}
    new = ("sweep", "point", "words", "kl_at_least", "surprisal_above_base")
    old["methods"] = {label: {k: v for k, v in m.items() if k not in new} for label, m in results["methods"].items()}
    (tmp_path / "results.json").write_text(json.dumps(old))
    read = read_results(tmp_path / "results.json")
    assert (read["sweeps"], read["equal_kl"], read["equal_compute"]) == ({}, None, None)
    assert [t.title for t in tables(read)][:2] == ["Reward", "Distance from the base"]
    assert tables(read)[0].rows[0][-2] == "–"  # words
