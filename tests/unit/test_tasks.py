"""A task of another package, by the entry point ivg.tasks."""

import json

import pytest
from test_plugins import package  # noqa: F401  (a fixture)

from ivg.errors import ConfigError
from ivg.evaluation import task
from ivg.evaluation.plan import make_plan
from ivg.evaluation.runner import run
from ivg.settings.eval import EvalConfig
from ivg.settings.recipe import Recipe
from ivg.utils.plugins import Plugins

MODULE = '''
from ivg.evaluation.task import Example, Task
from ivg.types import Prompt

class Haiku(Task):
    """Two prompts; the metric is the number of characters."""

    def examples(self, config):
        return [Example(str(i), Prompt(text)) for i, text in enumerate(("The moon", "A pond"))][: config.prompts]

    def defaults(self):
        return {"sampling": {"max_new_tokens": 3, "ignore_eos": True}}

    def measure(self, config, out, label, answers):
        return {"characters": sum(len(a.text) for a in answers) / len(answers), "unit": "Characters of an answer."}

class NoTask:
    pass
'''


@pytest.fixture
def haiku(package, monkeypatch):  # noqa: F811
    package("haiku_task", MODULE, "[ivg.tasks]\nhaiku = haiku_task:Haiku\nother = haiku_task:NoTask\n")
    monkeypatch.setattr(task, "TASK_PLUGINS", Plugins("ivg.tasks", type, frozenset(task.TASKS)))


def test_a_task_of_another_package_is_evaluated(haiku, tmp_path):
    pytest.importorskip("matplotlib")
    run(make_plan(Recipe.parse({"eval": {"task": "haiku", "methods": ["base"], "gold": None}}), tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "transcripts" / "base.jsonl").read_text().splitlines()]
    assert [(r["prompt"], len(r["token_ids"])) for r in rows] == [("The moon", 3), ("A pond", 3)]
    metrics = json.loads((tmp_path / "results.json").read_text())["methods"]["base"]["task"]
    assert metrics["characters"] == sum(len(r["text"]) for r in rows) / 2
    assert "## Metrics of the task haiku" in (tmp_path / "report.md").read_text()
    assert "Characters of an answer." in (tmp_path / "report.html").read_text()


def test_what_is_no_task_is_refused(haiku):
    with pytest.raises(ConfigError, match=r"the task other is the class NoTask\n  expected a subclass of ivg\.evaluation\.task\.Task"):
        task.load_task("other")
    with pytest.raises(ConfigError, match="unknown task 'sonnet'\n  expected one of: sentiment, summarization, alpaca, haiku, other"):
        task.load_task("sonnet")


@pytest.mark.parametrize("column, value", [("chat_template_kwargs", {"enable_thinking": False}), ("tools", [{"type": "function"}])])
@pytest.mark.parametrize("name", ["sentiment", "summarization", "alpaca"])
def test_variables_and_tools_in_rows_are_refused_by_name(tmp_path, name, column, value):
    row = {"prompt": "The movie", "instruction": "x", "output": "y", column: value}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=f"row 1: {column} are not read for each row"):
        task.load_task(name).examples(EvalConfig(data=str(tmp_path / "rows.jsonl"), options={"judge": "none"} if name == "alpaca" else {}))
