"""``ivg eval alpaca`` on instructions without reference answers: wins against the base by the gold reward, and answers side by side."""

import json
from html import escape

import pytest
from test_alpaca import World, alpaca_eval  # noqa: F401  (a fixture)
from test_eval import hub  # noqa: F401  (a fixture)

from ivg.errors import ConfigError
from ivg.evaluation import runner
from ivg.evaluation.alpaca import Alpaca
from ivg.evaluation.equal_length import win_rate_at_equal_length
from ivg.evaluation.plan import make_plan
from ivg.evaluation.report import report, sample_pages
from ivg.evaluation.samples import Sample, SampleAnswer
from ivg.evaluation.score import read_scored
from ivg.evaluation.tables import tables
from ivg.evaluation.winrate import average_over_seeds, read_judgements, win_rate
from ivg.settings.recipe import EvalConfig, Recipe
from ivg.utils.jsonl import as_lines, read_jsonl

GOLD = "def gold(prompt, response):\n    return sum(map(ord, response)) * 7 % 101 - len(response) % 5\n"
COUNT = 12


@pytest.fixture(scope="module")
def done(hub, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("alpaca")
    (folder / "gold.py").write_text(GOLD)
    (folder / "data.jsonl").write_text(as_lines({"instruction": f"Name <film> {i}.", "index": 2 * i} for i in range(COUNT)))
    recipe = Recipe.parse(
        {
            "models": {role: str(hub / role) for role in ("base", "tuned", "untuned", "value")},
            "sampling": {"max_new_tokens": 12, "stop": ["e"], "top_k": 0, "temperature": 1.0},
            "run": {"dtype": "float32", "device": "cpu"},
            "eval": {
                "task": "alpaca",
                "data": str(folder / "data.jsonl"),
                "gold": f"{folder}/gold.py:gold",
                "seeds": 2,
                "methods": ["bon", {"method": "eft", "beta": [1.0, 3.0]}],
            },
        }
    )
    plan = make_plan(recipe, folder / "out")
    runner.run(plan)
    return plan


def test_wins_against_base_plainly_and_at_equal_length(done):
    methods = json.loads((done.out / "results.json").read_text())["methods"]
    base = {(r["id"], r["seed"]): (r["text"], s["gold"]) for r, s in read_scored(done, "base")}
    for label in ("bon", "eft-beta1", "eft-beta3"):
        rows = read_scored(done, label)
        pairs = [(r["id"], r["text"], s["gold"], *base[r["id"], r["seed"]]) for r, s in rows]
        wins = [0.5 if mine == other or text == plain else float(mine > other) for _, text, mine, plain, other in pairs]
        assert methods[label]["win_rate"]["mean"] == pytest.approx(sum(wins) / len(wins), abs=1e-6)
        lengths = ([len(mine.strip()) for _, mine, _, _, _ in pairs], [len(other.strip()) for _, _, _, other, _ in pairs])
        expected = win_rate_at_equal_length([i for i, *_ in pairs], wins, *lengths)
        assert methods[label]["win_rate_at_equal_length"] == expected.to_dict()
    assert methods["base"]["win_rate_at_equal_length"] is None
    header = tables(json.loads((done.out / "results.json").read_text()))[0].header
    assert "wins against base" in header and "wins at equal length" in header


def test_judgements_are_in_alpaca_evals_form(done):
    methods = json.loads((done.out / "results.json").read_text())["methods"]
    path = done.out / "against_base" / "bon.jsonl"
    rows = read_judgements(path)
    assert win_rate(average_over_seeds(rows)).win_rate == pytest.approx(100 * methods["bon"]["win_rate"]["mean"], abs=1e-3)
    assert [r["index"] for r in rows] == [2 * i for i in range(COUNT)] * 2  # of the data
    assert {(r["generator_1"], r["generator_2"]) for r in rows} == {("base", "bon")}
    first = next(r for r in read_jsonl(done.transcripts("base")) if r["id"] == "0")
    assert rows[0]["output_1"] == first["text"].strip()
    assert not (done.out / "against_base" / "base.jsonl").exists()


def test_alpaca_evals_own_length_control_where_its_difficulties_are(done, tmp_path, monkeypatch, alpaca_eval):  # noqa: F811
    assert not any(
        "length_controlled" in k for m in json.loads((done.out / "results.json").read_text())["methods"].values() for k in m["task"]
    )
    monkeypatch.setenv("IVG_ALPACA_DIFFICULTY", str(World(n=2 * COUNT).write(tmp_path / "df_gamed.csv")))
    methods = report(done)["methods"]
    assert 0 < methods["bon"]["task"]["length_controlled_wins_against_base"] < 100
    assert "by alpaca_eval's own function" in (done.out / "report.md").read_text()
    assert methods["base"]["task"] == {}
    monkeypatch.delenv("IVG_ALPACA_DIFFICULTY")
    report(done)


def test_answers_side_by_side(done):
    text, page = ((done.out / f"samples.{kind}").read_text() for kind in ("md", "html"))
    assert page.count('<section id="prompt-') == text.count("\n## ") == COUNT
    assert "Name \\<film\\> 3." in text
    assert "Name &lt;film&gt; 3." in page and "<film>" not in page
    for row, scores in read_scored(done, "eft-beta3")[:COUNT]:
        assert escape(row["text"].strip(), quote=False) in page.replace("&#39;", "'").replace("&#34;", '"')
        assert f"gold reward {scores['gold']:+.2f}".replace("-", "−") in page
    labels = [line.split("`")[1] for line in text.splitlines() if line.startswith("`")]
    assert labels[0] == "base"
    assert sorted(labels[:4]) == sorted(m.label for m in done.method_rows)
    assert labels == labels[:4] * COUNT


def test_a_page_of_samples_by_hand():
    answers = (
        SampleAnswer("base", " Two *lines*\n\n# of text ", -0.5, None, {"gold": -0.5, "brief": 2.0}),
        SampleAnswer("eft", "", None, "too long"),
    )
    results = {"task": "alpaca", "methods": {"base": {}, "eft": {}}, "judges": ["gold", "brief"], "base": "base"}
    pages = sample_pages(results, [Sample("0", "Say\n<b>it", "So.", answers)])
    assert pages["samples.md"].partition("## 1\n")[2] == (
        "\n**Say ⏎ \\<b\\>it**\n\nReference, 1 word:\n\n> So.\n\n"
        "`base`: gold reward −0.50, brief +2.00, 5 words\n\n> Two \\*lines\\*  \n>   \n> \\# of text\n\n"
        "`eft`: 0 words\n\n*too long*\n"
    )
    assert "failed: too long" in pages["samples.html"]
    assert "gold reward −0.50 · brief +2.00 · 5 words" in pages["samples.html"]


@pytest.mark.parametrize("rows", [[{"index": 1}, {"index": 1}], [{"index": "a"}, {"index": 2}], [{"index": 0}, {}]])
def test_an_index_that_is_no_position_is_refused(tmp_path, rows):
    (tmp_path / "data.jsonl").write_text(as_lines({"instruction": f"Name {i}.", **row} for i, row in enumerate(rows)))
    with pytest.raises(ConfigError, match="the column index must have a different whole number in every row"):
        Alpaca().examples(EvalConfig(task="alpaca", data=str(tmp_path / "data.jsonl")))
