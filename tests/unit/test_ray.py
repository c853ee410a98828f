"""The Ray backend without Ray: dividing nodes into workers, the task queue, the worker, and the driver over a fake Ray."""

import random
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

import ivg
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.jobs.backends import run_tasks
from ivg.jobs.ray import actor_pool, task_queue
from ivg.jobs.ray.driver import RayBackend
from ivg.jobs.ray.resources import RayError, WorkerPlan, plan_workers, reconcile_gpus, with_absolute_paths
from ivg.jobs.ray.task_queue import TaskQueue
from ivg.jobs.ray.worker import Worker, WorkerReport
from ivg.jobs.runner import Task
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from ivg.types import Completion, Usage
from job_helpers import FakeRay, Gone, connect, make_models, recipe_of, tasks_of, texts_and_errors

real_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ivg[ray]'")


# Settings and workers


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"address": "somewhere"}, "no Ray address"),
        ({"address": "http://host:1"}, "no Ray address"),
        ({"address": "auto", "workers": 0}, "at least 1, got 0"),
        ({"address": "auto", "gpus": -1}, "got -1"),
        ({"address": "auto", "gpus": 1.5}, "whole number"),
        ({"address": "auto", "cpus": 0}, "more than 0"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        RaySettings(**settings)


def test_settings_from_options():
    assert RaySettings.of(None, None, None, None) is None
    assert RaySettings.of("ray://head:10001", 2, None, None).endpoint == ("head", 10001)
    assert RaySettings("[::1]:6379").endpoint == ("::1", 6379)
    assert RaySettings("local").endpoint is None
    with pytest.raises(ConfigError, match="give --ray ADDRESS"):
        RaySettings.of(None, 2, None, None)


@pytest.mark.parametrize(
    "settings,nodes,device,expected",
    [
        ({}, [(8, 0), (8, 0)], None, WorkerPlan(2, 8, 0)),  # one on each node, all of its CPUs
        ({}, [(0, 0), (8, 0), (4, 0)], None, WorkerPlan(2, 4, 0)),  # a head that computes nothing
        ({}, [(8, 4), (8, 4)], None, WorkerPlan(8, 1, 1)),
        ({}, [(8, 4)], "cpu", WorkerPlan(1, 8, 0)),
        ({"gpus": 4}, [(8, 8), (8, 8), (8, 2)], None, WorkerPlan(4, 1, 4)),
        ({"gpus": 0.5}, [(8, 1)], None, WorkerPlan(2, 1, 0.5)),
        ({"workers": 2}, [(8, 0)], None, WorkerPlan(2, 4, 0)),
        ({"workers": 1}, [(8, 8)], None, WorkerPlan(1, 1, 1)),
        ({"cpus": 3}, [(8, 0), (4, 0)], None, WorkerPlan(3, 3, 0)),
    ],
)
def test_nodes_are_cut_into_workers(settings, nodes, device, expected):
    resources = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus, gpus in nodes]
    assert plan_workers(RaySettings("auto", **settings), resources, 100, [device]) == expected


def test_never_more_workers_than_tasks():
    assert plan_workers(RaySettings("auto", cpus=1), [{"CPU": 8}], 3).workers == 3


def test_no_room():
    with pytest.raises(RayError, match="no node has room for a worker of 1 CPUs and 4 GPUs; the nodes have: 8 CPUs and 2 GPUs"):
        plan_workers(RaySettings("auto", gpus=4), [{"CPU": 8, "GPU": 2}], 10)
    with pytest.raises(RayError, match="have: none"):
        plan_workers(RaySettings("auto"), [], 10)


def test_paths_of_this_machine_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "rules.py").write_text("def score(prompt, response): return 0.0\n")
    models = {"base": "base", "tuned": "org/tuned", "untuned": "embedded:untuned", "reward": "rules.py:score"}
    found = with_absolute_paths(Recipe.parse({"models": models, "values": {"more": {"value": "base"}}}))
    paths = {role: ref.path for role, ref in found.models.given.items()}
    assert paths == models | {"base": str(tmp_path / "base"), "reward": f"{tmp_path / 'rules.py'}:score"}
    assert found.values["more"].given["value"].path == str(tmp_path / "base")


def test_the_base_of_an_endpoint_is_a_name_and_no_folder(tmp_path, monkeypatch):
    """Even where a folder of that name is here, by chance; its tokenizer is a folder, beside the recipe."""
    for name in ("base", "words", "value"):
        (tmp_path / "there" / name).mkdir(parents=True)
    (tmp_path / "there" / "recipe.toml").write_text(
        '[run]\nengine = "http://x"\n[endpoint]\ntokenizer = "words"\n[models]\nbase = "base"\nvalue = "value"\n'
    )
    monkeypatch.chdir(tmp_path)
    loaded = Recipe.load("there/recipe.toml")
    assert {role: ref.path for role, ref in loaded.models.given.items()} == {"base": "base", "value": "there/value"}
    assert loaded.endpoint.tokenizer == "there/words"
    monkeypatch.chdir(tmp_path / "there")
    sent = with_absolute_paths(Recipe.load("recipe.toml"))
    assert sent.models.given["base"].path == "base" and sent.models.given["value"].path == str(tmp_path / "there" / "value")
    assert sent.endpoint.tokenizer == str(tmp_path / "there" / "words")


def test_gpus_of_a_worker_are_the_engines_tensor_parallelism():
    plain, whole, split = (
        Recipe.parse(r) for r in ({}, {"run": {"engine": "vllm"}}, {"run": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 4}})
    )
    assert reconcile_gpus(plain, RaySettings("auto")) == (plain, RaySettings("auto"))
    assert reconcile_gpus(split, RaySettings("auto")) == (split, RaySettings("auto", gpus=4))
    recipe, settings = reconcile_gpus(whole, RaySettings("auto", gpus=8))
    assert (recipe.vllm.tensor_parallel_size, settings.gpus) == (8, 8)
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 2, but vllm.tensor_parallel_size is 4"):
        reconcile_gpus(split, RaySettings("auto", gpus=2))
    with pytest.raises(ConfigError, match="the engine transformers uses one GPU"):
        reconcile_gpus(plain, RaySettings("auto", gpus=2))


# The queue


def test_tasks_are_shared_out_evenly_and_topped_up():
    queue = TaskQueue(tasks_of(20), batch_size=8, workers=2)
    first, second = queue.take(1), queue.take(2)
    assert [t.number for t in first] == list(range(10))
    assert [t.number for t in second] == list(range(10, 20))
    queue = TaskQueue(tasks_of(100), batch_size=8, workers=2)
    assert len(queue.take(1)) == 10  # eight at once, two that wait there
    assert queue.take(1) == []
    assert queue.complete(1, 3).number == 3
    assert [t.number for t in queue.take(1)] == [10]


def test_only_who_has_a_task_settles_it_and_once():
    queue = TaskQueue(tasks_of(2), batch_size=1, workers=2)
    (task,) = queue.take(1)
    assert queue.complete(2, task.number) is None
    assert queue.requeue(1) == []
    assert queue.complete(1, task.number) is None  # the presumed dead speaks
    (again,) = queue.take(2)
    assert again is task
    assert queue.complete(2, task.number) is task
    assert queue.complete(2, task.number) is None


def test_a_task_that_crashes_workers_is_run_alone_and_quarantined(monkeypatch):
    monkeypatch.setattr(task_queue, "SUSPECT", 2)
    queue, guilty, done, given_up, alone = TaskQueue(tasks_of(6), batch_size=3, workers=1), 2, [], [], []
    for worker in range(1, 10):
        while tasks := queue.take(worker):
            numbers = [t.number for t in tasks]
            if guilty in numbers:
                alone.append(numbers == [guilty])
                given_up += [t.number for t in queue.requeue(worker)]
                break
            done += [queue.complete(worker, n).number for n in numbers]
    assert not queue
    assert (given_up, sorted(done)) == ([guilty], [0, 1, 3, 4, 5])
    assert alone == [False, False, True]


def test_a_suspect_has_its_worker_to_itself(monkeypatch):
    monkeypatch.setattr(task_queue, "SUSPECT", 1)
    queue = TaskQueue(tasks_of(2), batch_size=1, workers=2)
    suspect, other = *queue.take(1), *queue.take(2)
    queue.requeue(1)
    assert queue.take(3) == [suspect]
    monkeypatch.setattr(task_queue, "SUSPECT", 3)
    queue.requeue(2)
    assert queue.take(3) == []  # though one waits
    assert queue.take(4) == [other]
    assert queue.complete(3, suspect.number) is suspect
    assert queue.complete(4, other.number) is other
    assert not queue


# The worker, in this process


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("hub"))


def loaded(recipe):
    worker = Worker()
    report = worker.load(recipe.model_dump_json(), False)
    assert (report.error, report.crash) == (None, None)
    return worker


def test_workers_give_the_same_answers_and_report_unusable_prompts(hub):
    recipe = recipe_of(hub)
    expected, _ = texts_and_errors(run_tasks(recipe, tasks_of(3, n=2)))
    worker, done = loaded(recipe), {}
    report = worker.advance([*(replace(task, source=n) for n, task in enumerate(tasks_of(3, n=2))), Task("", 5, 0, 6)])
    while len(done) < 7:  # a report may bring nothing: a worker reports after a second in any case
        assert (report.error, report.crash) == (None, None)
        done |= dict(report.done)
        report = worker.advance([])
    assert report.done == []
    assert "empty prompt" in done.pop(6)
    assert [done[n].text for n in range(6)] == [expected[task.source] for task in tasks_of(3, n=2)]


def raises(error):
    def function():
        raise error

    return function


def test_worker_reports_what_breaks_it(hub):
    worker = loaded(recipe_of(hub, "reward"))
    report = worker.advance([Task("an error", 5, 0, 0)], seconds=30)
    assert (report.done, report.crash) == ([(0, "the value reward raised ValueError: no such prompt")], None)
    worker.backend.step = raises(ValueError("a fault in the code"))
    assert worker.advance([Task("One", 5, 0, 0)], seconds=30).crash == "ValueError: a fault in the code"
    report = Worker().load(Recipe.parse({"models": {"base": "/no/such/model"}}).model_dump_json(), False)
    assert "cannot load" in str(report.error)
    worker = loaded(recipe_of(hub))
    worker.backend.step = raises(ModelError("the vLLM engine stopped"))
    report = worker.advance([Task("One", 5, 0, 0)])
    assert (report.error, report.crash) == (None, "ModelError: the vLLM engine stopped")
    wrong = recipe_of(hub).override(search={"token": "nobody", "method": "custom"})
    assert isinstance(loaded(wrong).advance([Task("x", 5, 0, 0)]).error, ConfigError)


# The driver, over a fake Ray


class Echo:
    """Answers a prompt with itself, two at a time; what is deadly is the test's to say."""

    version = ivg.__version__

    def __init__(self, number):
        self.number, self.tasks = number, []

    def hello(self):
        return f"node {self.number}", self.version

    def load(self, recipe, trace):
        return WorkerReport()

    def advance(self, tasks):
        self.tasks += tasks
        now, self.tasks = self.tasks[:2], self.tasks[2:]
        return WorkerReport([(task.source, self.answer(task)) for task in now])

    def answer(self, task):
        return Completion(task.prompt, (), None, "stop", Usage({}, 0, 0, 0.0))


def drive(monkeypatch, worker, tasks, seed=0, batch_size=3, **settings):
    """(numbers of the prompts that were answered, errors by number of the prompt, the Ray)."""
    fake = connect(monkeypatch, FakeRay(worker, seed))
    recipe = Recipe.parse({"run": {"batch_size": batch_size}})
    texts, errors = texts_and_errors(RayBackend(recipe, RaySettings("auto", **settings)).run(tasks))
    return sorted(i for i, _ in texts), {i: e for (i, _), e in errors.items()}, fake


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_once_when_workers_crash(monkeypatch, seed):
    chance = random.Random(seed)

    class Frail(Echo):
        def advance(self, tasks):
            if chance.random() < 0.08:
                raise Gone("The actor is dead because its node has gone")
            report = super().advance(tasks)
            return report if chance.random() > 0.1 else WorkerReport(report.done[:1], crash="OutOfMemoryError: CUDA out of memory")

    done, errors, fake = drive(monkeypatch, Frail, tasks_of(80), seed)
    assert all(e.startswith("quarantined: 4 workers crashed") for e in errors.values())
    assert sorted([*done, *errors]) == list(range(80))
    assert len(errors) <= 2
    assert len(fake.actors) > 2
    assert all(actor.dead for actor in fake.actors), "something was left running"


def test_a_prompt_that_crashes_workers_is_reported_and_others_are_answered(monkeypatch):
    class Poisoned(Echo):
        def answer(self, task):
            if task.prompt == "Prompt 5":
                raise Gone("Worker exit type: SYSTEM_ERROR")
            if task.prompt == "Prompt 7":
                return "empty prompt"
            return super().answer(task)

    done, errors, fake = drive(monkeypatch, Poisoned, tasks_of(20))
    assert done == [i for i in range(20) if i not in (5, 7)]
    assert sorted(errors) == [5, 7]
    assert "4 workers crashed while running it, the last one while running nothing else" in errors[5]
    assert "SYSTEM_ERROR" in errors[5]
    assert len(fake.actors) == 2 + 4


@pytest.mark.parametrize(("deadly", "count", "batch_size", "cpus"), [((3, 25, 45), 100, 16, (1,)), ((0, 1, 2, 3), 60, 8, (1, 1))])
def test_several_crashing_prompts_do_not_end_the_run(monkeypatch, deadly, count, batch_size, cpus):
    class Poisoned(Echo):
        def advance(self, tasks):
            if any(task.prompt in {f"Prompt {i}" for i in deadly} for task in [*self.tasks, *tasks]):
                raise Gone("Worker exit type: SYSTEM_ERROR")
            return super().advance(tasks)

    made = FakeRay.__init__
    monkeypatch.setattr(FakeRay, "__init__", lambda self, worker, seed=0: made(self, worker, seed, cpus))
    done, errors, _ = drive(monkeypatch, Poisoned, tasks_of(count), batch_size=batch_size)
    assert done == [i for i in range(count) if i not in deadly]
    assert sorted(errors) == list(deadly)


class Stillborn(Echo):
    def load(self, recipe, trace):
        return WorkerReport(crash="OutOfMemoryError: CUDA out of memory")


class Hopeless(Echo):
    def advance(self, tasks):
        raise Gone("The actor is dead because its worker process has died.")


class Older(Echo):
    version = "0.0.1"


class Bare(Echo):
    def hello(self):
        raise Gone("The actor died because of an error raised in its creation task\nModuleNotFoundError: No module named 'ivg'")


class Blind(Echo):
    def load(self, recipe, trace):
        return WorkerReport(error=ConfigError("cannot load base '/here'"))


@pytest.mark.parametrize(
    "worker,words",
    [
        (Stillborn, "3 workers in a row crashed at start; the last: node .: OutOfMemoryError: CUDA out of memory"),
        (Hopeless, "12 workers in a row crashed; the last: node .*: The actor is dead because its worker process has died"),
        (Older, f"node . has ivg 0.0.1, and this machine {re.escape(ivg.__version__)}"),
        (Bare, "a node has no ivg: a node: .*No module named 'ivg'"),
        (Blind, r"node .: cannot load base '/here'\n  the recipe's models and files must be there on every node"),
    ],
)
def test_an_error_on_every_worker_ends_the_run(monkeypatch, worker, words):
    with pytest.raises(RayError, match=words):
        drive(monkeypatch, worker, tasks_of(40))


def test_a_method_that_does_not_fit_ends_the_run_as_it_does_here(monkeypatch):
    class Unfit(Echo):
        def advance(self, tasks):
            return WorkerReport(error=ConfigError("ivg needs the value explicit"))

    with pytest.raises(ConfigError, match="ivg needs the value explicit"):
        drive(monkeypatch, Unfit, tasks_of(4))


def test_workers_that_find_no_place(monkeypatch):
    monkeypatch.setattr(actor_pool, "PLACEMENT_TIMEOUT", 0.0)
    monkeypatch.setattr(FakeRay, "wait", lambda self, calls, num_returns, timeout: ([], calls))
    with pytest.raises(RayError, match="no worker was placed within 0 seconds; each needs 1 CPUs and 0 GPUs"):
        drive(monkeypatch, Echo, tasks_of(4))


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match="needs the extra ray"):
        list(run_tasks(Recipe(), tasks_of(1), RaySettings("auto")))
