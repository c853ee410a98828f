"""Gold and judges of ``ivg eval`` that are Python functions: what they read, in every task."""

import json

import pytest
from test_eval import hub  # noqa: F401  (a fixture)

from ivg.errors import ConfigError
from ivg.evaluation import runner
from ivg.evaluation.plan import make_plan
from ivg.evaluation.report import report
from ivg.evaluation.score import read_scored
from ivg.evaluation.summarization import Summarization
from ivg.settings.recipe import EvalConfig, Recipe
from ivg.utils.jsonl import as_lines

FUNCTIONS = '''
def brief(prompt, response):
    return -len(response)

def read(prompt, response):
    """Counts what it was given."""
    assert response == response.strip("\\n"), response
    return 1000.0 * len(prompt.split()) + len(prompt.splitlines()[0].split())
'''
MAIL = {"id": "m", "email": "one two  three\nfour five six seven", "subject": "numbers"}
TASKS = {
    "sentiment": ({"prompt": "A film about"}, 3003.0, {}),
    "summarization": (MAIL, 8007.0, {"words": 3}),  # seven words of the e-mail, and "Subject:"
    "alpaca": ({"instruction": "Name a film."}, 3003.0, {}),
}


def plan(hub, folder, task, row, **more):  # noqa: F811
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "rows.jsonl").write_text(as_lines([row]))
    (folder / "recipe.toml").write_text(
        f'[eval]\ntask = "{task}"\ndata = "rows.jsonl"\ngold = "functions.py:brief"\njudges = {{ read = "functions.py:read" }}\n'
    )
    recipe = Recipe.load(folder / "recipe.toml")
    tables = {
        "models": {role: str(hub / role) for role in ("base", "tuned", "untuned", "value")},
        "sampling": {"max_new_tokens": 4, "top_k": 0},
        "run": {"dtype": "float32", "device": "cpu"},
        "eval": {"methods": ["eft", "bon"], "base_samples": 2, **more},
    }
    return make_plan(recipe.override(**tables), folder / "out")


@pytest.mark.parametrize("task", TASKS)
def test_functions_judge_every_task(hub, tmp_path, task):  # noqa: F811
    row, seen, options = TASKS[task]
    p = plan(hub, tmp_path, task, row, options=options)
    runner.run(p)
    for method in p.method_rows:
        ((answer, scores),) = read_scored(p, method.label)
        assert scores["read"] == seen
        assert scores["gold"] == -len(answer["text"].rstrip() if task == "summarization" else answer["text"])
    results = json.loads((p.out / "results.json").read_text())
    assert results["judges"] == ["gold", "read"]
    assert results["methods"]["bon"]["read"]["mean"] == seen


def test_judges_read_the_whole_mail_or_as_many_words_as_the_option_says(tmp_path):
    (tmp_path / "rows.jsonl").write_text(as_lines([MAIL]))
    for options, read in (
        ({"words": "2"}, "one two three four five six seven"),
        ({"words": "2", "judge_words": "3"}, "one two three"),
        ({"words": 2, "judge_words": 0}, "one two three four five six seven"),
    ):
        task = Summarization()
        (example,) = task.examples(EvalConfig(task="summarization", data=str(tmp_path / "rows.jsonl"), options=options))
        assert example.prompt.content == "one two\n\nSubject:"
        prompt, response = task.judged(example, " numbers\n")
        assert (prompt.content, response) == (f"{read}\n\nSubject:", " numbers")
    with pytest.raises(ConfigError, match="judge_words = 1 or more"):
        Summarization().examples(EvalConfig(task="summarization", data=str(tmp_path / "rows.jsonl"), options={"judge_words": -1}))


def test_scores_of_another_reading_are_refused(hub, tmp_path):  # noqa: F811
    p = plan(hub, tmp_path, "summarization", MAIL, options={"words": 3}, base_samples=0, methods=["base"])
    runner.run(p)
    other = make_plan(p.recipe.override(eval={"options": {"words": 3, "judge_words": 4}}), p.out)
    with pytest.raises(ConfigError, match="settings differ from those of its rows: judged_prompts"):
        report(other)
