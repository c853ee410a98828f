"""The run loop: one job file gives the same rows in this process, over Ray, and by a run that was killed and resumed."""

import json
import random
from collections import Counter
from contextlib import contextmanager

import pytest

from ivg.errors import ConfigError
from ivg.factory.recipe import load_models
from ivg.jobs.backends import run_tasks
from ivg.jobs.failures import Failures
from ivg.jobs.formats import scan_rows
from ivg.jobs.generate import Callbacks, GenerateRun
from ivg.jobs.prompts import read_jobs
from ivg.jobs.ray.worker import Worker
from ivg.jobs.runner import LocalBackend, Task, TaskSettings
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.utils.jsonl import read_jsonl
from job_helpers import FakeRay, Gone, connect, make_models, recipe_of, tasks_of

COLUMNS = ("id", "index", "prompt", "text", "token_ids", "finish_reason", "method", "seed", "settings", "models", "provenance", "topic")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def source(tmp_path):
    rows = [{"id": i, "prompt": f"Prompt {i}" if i != 3 else "", "topic": f"t{i}"} for i in range(7)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    return path


@pytest.fixture
def ray(monkeypatch):
    """A fake Ray whose workers crash now and then."""
    chance = random.Random(1)

    class Frail(Worker):
        def __init__(self, number):
            super().__init__()

        def advance(self, tasks):
            if chance.random() < 0.2:
                raise Gone("The actor is dead because its node has gone")
            return super().advance(tasks)

    return connect(monkeypatch, FakeRay(Frail))


def generate(recipe, source, output, cluster=None, stop_after=None):
    """(counts, what failed) of a run; ``stop_after``: it is interrupted after so many answers."""
    said, answered = [], []

    def on_answer(job, completion):
        answered.append(job)
        if len(answered) == stop_after:
            raise KeyboardInterrupt

    @contextmanager
    def progress(total):
        yield lambda: None

    failures = Failures(said.append)
    run = GenerateRun(recipe, list(read_jobs(scan_rows(source), failures)), failures, cluster)
    try:
        run.run(output, Callbacks(on_answer, progress, pytest.fail))
    except KeyboardInterrupt:
        assert len(answered) == stop_after
    return run.counts, sorted(said)


def rows_of(path):
    """What decides a row's content; the order of rows is that in which they were done."""
    rows = [{name: row[name] for name in COLUMNS} for row in read_jsonl(path)]
    return sorted(rows, key=lambda row: (row["id"], row["index"]))


def test_the_same_rows_in_process_over_ray_and_resumed_after_a_kill(hub, source, tmp_path, ray):
    recipe, cluster = recipe_of(hub, n=2), RaySettings("auto")
    counts, said = generate(recipe, source, tmp_path / "local.jsonl")
    assert counts == Counter(failed=3, answered=12)  # both samples of the empty prompt, and no row
    expected = rows_of(tmp_path / "local.jsonl")
    assert len(expected) == 12

    assert generate(recipe, source, tmp_path / "ray.jsonl", cluster) == (counts, said)
    assert rows_of(tmp_path / "ray.jsonl") == expected
    assert len(ray.actors) > 2, "no worker crashed"

    output = tmp_path / "resumed.jsonl"
    for stop_after, backend in ((2, None), (3, cluster), (1, None)):
        generate(recipe, source, output, backend, stop_after)
        with output.open("a") as file:  # the kill came in the middle of a row
            file.write('{"id": 4, "prompt": "a", "ind')
    counts, _ = generate(recipe, source, output, cluster)
    assert (counts["already done"], counts["answered"], counts["skipped"]) == (6, 6, 0)
    assert rows_of(output) == expected
    assert generate(recipe, source, output)[0]["answered"] == 0


def test_results_do_not_depend_on_the_batch_size(hub):
    recipe = recipe_of(hub)
    model, settings = load_models(recipe), TaskSettings.from_recipe(recipe)
    found = []
    for batch_size in (1, 3, None):
        backend = LocalBackend(model, TaskSettings(settings.method, settings.settings, batch_size, settings.max_beams))
        found.append({r.task.source: r.completion.token_ids for r in backend.run(tasks_of(5, n=2))})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 10


def test_at_most_batch_size_requests_run_at_once_and_every_step_is_reported(hub):
    recipe = recipe_of(hub, batch_size=2)
    reported = []
    backend = LocalBackend(load_models(recipe), TaskSettings.from_recipe(recipe), lambda task, step: reported.append((task.source, step)))
    backend.submit(tasks_of(4))
    done = []
    while backend.busy:
        done += [result.task.source for result in backend.step()]
        assert backend.searcher.live_requests + backend.searcher.waiting_requests <= 2
    assert sorted(done) == [(i, 0) for i in range(4)]
    assert [source for source, step in reported if step.completion is not None] == done
    assert len(reported) > len(done)


def test_a_prompt_that_is_refused_or_fails_is_a_result(hub):
    recipe = recipe_of(hub, "reward")
    results = {
        r.task.source: r for r in run_tasks(recipe, [Task("", 0, 0, "empty"), Task("an error", 0, 0, "fails"), Task("fine", 0, 0, "ok")])
    }
    assert "empty prompt" in results["empty"].error
    assert results["fails"].error == "the value reward raised ValueError: no such prompt"
    assert results["empty"].completion is results["fails"].completion is None
    assert results["ok"].error is None


def test_a_method_that_does_not_fit_is_raised(hub):
    with pytest.raises(ConfigError, match="explicit"):
        list(run_tasks(Recipe.parse({"models": {"base": str(hub / "base")}, "search": {"method": "ivg"}}), tasks_of(1)))


@pytest.mark.parametrize("cluster", [None, RaySettings("auto")])
def test_nothing_is_loaded_for_no_tasks(cluster):
    assert list(run_tasks(Recipe.parse({"models": {"base": "/no/such/model"}}), [], cluster)) == []
