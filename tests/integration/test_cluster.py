"""Prompts shared out over a cluster: the bookkeeping on its own, the driver over a Ray of lies, and a real Ray of several nodes."""

import json
import os
import random
import re
import secrets
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

import ivg
from ivg.cli import main
from ivg.errors import ConfigError, MissingDependencyError, ModelError
from ivg.jobs import store
from ivg.jobs.ray import actor_pool, driver, task_queue
from ivg.jobs.ray.driver import RayBackend
from ivg.jobs.ray.settings import RayError, RaySettings, Size, reconcile_gpus, size, with_absolute_paths
from ivg.jobs.ray.task_queue import TaskQueue
from ivg.jobs.ray.worker import Worker, WorkerReport
from ivg.jobs.runner import Task, run_tasks
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model, tiny_value
from ivg.types import Completion, Usage

real_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ivg[ray]'")


def tasks_of(count, n=1):
    """Tasks for so many prompts; each task's source is (number of the prompt, sample)."""
    return [Task(f"Prompt {i}", 5, k, (i, k)) for i in range(count) for k in range(n)]


# Settings and sizes


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
        ({}, [(8, 0), (8, 0)], None, Size(2, 8, 0)),  # one on each node, all of its CPUs
        ({}, [(0, 0), (8, 0), (4, 0)], None, Size(2, 4, 0)),  # a head that computes nothing
        ({}, [(8, 4), (8, 4)], None, Size(8, 1, 1)),
        ({}, [(8, 4)], "cpu", Size(1, 8, 0)),
        ({"gpus": 4}, [(8, 8), (8, 8), (8, 2)], None, Size(4, 1, 4)),
        ({"gpus": 0.5}, [(8, 1)], None, Size(2, 1, 0.5)),
        ({"workers": 2}, [(8, 0)], None, Size(2, 4, 0)),
        ({"workers": 1}, [(8, 8)], None, Size(1, 1, 1)),
        ({"cpus": 3}, [(8, 0), (4, 0)], None, Size(3, 3, 0)),
    ],
)
def test_nodes_are_cut_into_workers(settings, nodes, device, expected):
    resources = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})} for cpus, gpus in nodes]
    assert size(RaySettings("auto", **settings), resources, 100, device) == expected


def test_never_more_workers_than_tasks():
    assert size(RaySettings("auto", cpus=1), [{"CPU": 8}], 3).workers == 3


def test_no_room():
    with pytest.raises(RayError, match="no node has room for a worker of 1 CPUs and 4 GPUs; the nodes have: 8 CPUs and 2 GPUs"):
        size(RaySettings("auto", gpus=4), [{"CPU": 8, "GPU": 2}], 10)
    with pytest.raises(RayError, match="have: none"):
        size(RaySettings("auto"), [], 10)


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


def test_a_task_that_kills_is_run_alone_and_given_up(monkeypatch):
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
    """Tiny models of all roles, and a reward that ends its process at the word poison."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, role in enumerate(("base", "tuned", "untuned")):
        tiny_model("llama", seed).save_pretrained(folder / role)
        byte_tokenizer().save_pretrained(folder / role)
    tiny_value("vocabulary", seed=7).save_pretrained(folder / "value")
    (folder / "deadly.py").write_text(
        "import os\n"
        "def score(prompt, response):\n"
        "    if 'poison' in prompt: os._exit(7)\n"
        "    if 'error' in prompt: raise ValueError('no such prompt')\n"
        "    return float(len(set(response)))\n"
    )
    return folder


def recipe_of(hub, method="ivg", **run):
    models = {"base": hub / "base", "tuned": hub / "tuned", "untuned": hub / "untuned", "value": hub / "value"}
    if method == "reward":
        models = {"base": hub / "base", "reward": f"{hub / 'deadly.py'}:score"}
    search = {"method": "custom", "select": "reward"} if method == "reward" else {"method": method}
    return Recipe.parse(
        {
            "models": {role: str(path) for role, path in models.items()},
            "search": {**search, "width": 2, "successors": 2, "chunk_length": 4},
            "sampling": {"max_new_tokens": 12},
            "run": {"seed": 5, "dtype": "float32", "device": "cpu", "batch_size": 2, **run},
        }
    )


def loaded(recipe):
    worker = Worker()
    report = worker.load(recipe.model_dump_json(), False)
    assert (report.error, report.crash) == (None, None)
    return worker


def texts_and_errors(results):
    """Texts by source, and errors by source; no source twice."""
    texts, errors = {}, {}
    for r in results:
        assert r.task.source not in texts | errors
        (errors if r.completion is None else texts)[r.task.source] = r.error or r.completion.text
    return texts, errors


def test_worker_answers_as_this_machine_does_and_says_which_prompts_it_cannot_read(hub):
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
    worker.backend.step = raises(ModelError("the vLLM engine died"))
    report = worker.advance([Task("One", 5, 0, 0)])
    assert (report.error, report.crash) == (None, "ModelError: the vLLM engine died")
    wrong = recipe_of(hub).override(search={"token": "nobody", "method": "custom"})
    assert isinstance(loaded(wrong).advance([Task("x", 5, 0, 0)]).error, ConfigError)


# The driver, over a Ray of lies


class Gone(Exception):
    """What Ray raises where an actor died."""


class FakeRay:
    """Actors that work when they are asked for the result; calls end in any order."""

    exceptions = SimpleNamespace(RayError=Gone)

    def __init__(self, worker, seed=0, cpus=(1, 1)):
        self.worker, self.cpus, self.random, self.actors = worker, cpus, random.Random(seed), []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": n}} for n in self.cpus] + [{"Alive": False, "Resources": {"CPU": 64}}]

    def remote(self, **options):
        def make():
            self.actors.append(FakeActor(self.worker(len(self.actors))))
            return self.actors[-1]

        return lambda kind: SimpleNamespace(remote=make)

    def wait(self, calls, num_returns, timeout):
        calls = self.random.sample(calls, len(calls))
        number = min(num_returns, self.random.randint(0, len(calls)))
        return calls[:number], calls[number:]

    def get(self, call):
        actor, name, arguments = call
        assert not actor.dead, "a dead actor was asked"
        return getattr(actor.worker, name)(*arguments)

    def kill(self, actor, no_restart):
        actor.dead = True


class FakeActor:
    def __init__(self, worker):
        self.worker, self.dead = worker, False

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: Call((self, name, arguments)))


class Call(tuple):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


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
    fake = FakeRay(worker, seed)

    class Connected:
        def __enter__(self):
            return fake

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(driver, "connected", lambda _: Connected())
    recipe = Recipe.parse({"run": {"batch_size": batch_size}})
    texts, errors = texts_and_errors(RayBackend(recipe, RaySettings("auto", **settings)).run(tasks))
    return sorted(i for i, _ in texts), {i: e for (i, _), e in errors.items()}, fake


@pytest.mark.parametrize("seed", range(20))
def test_each_answer_once_whoever_dies(monkeypatch, seed):
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


def test_poison_is_reported_and_the_others_are_done(monkeypatch):
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
def test_several_deadly_prompts_do_not_end_the_run(monkeypatch, deadly, count, batch_size, cpus):
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
def test_what_is_wrong_everywhere_ends_the_run(monkeypatch, worker, words):
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


# A real Ray of two nodes


@pytest.fixture(scope="module")
def cluster():
    """Asks for a token of its own: Ray then neither needs nor makes one in this user's home."""
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own["RAY_worker_niceness"] = "0"  # by default 15: beside busy processes workers then get 3 % of a core
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)  # before Ray is imported, which reads them once
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield made
    made.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def pools(monkeypatch):
    """The actor pools that were made."""
    made = []

    class Watched(actor_pool.ActorPool):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(driver, "ActorPool", Watched)
    return made


def process(actor):
    return int(re.search(r"process (\d+)", actor.where)[1])


def after(results, count, action):
    """The results; ``action`` is called when so many are there."""
    for number, result in enumerate(results, 1):
        yield result
        if number == count:
            action()


@pytest.mark.long
@real_ray
def test_a_killed_worker_is_replaced_and_its_prompts_are_done_again(cluster, pools, hub):
    recipe, tasks = recipe_of(hub), tasks_of(8, n=2)
    expected = texts_and_errors(run_tasks(recipe, tasks))

    def kill():
        os.kill(process(next(a for a in pools[0].actors if a.call is not None and a.stage == "work")), signal.SIGKILL)

    assert texts_and_errors(after(run_tasks(recipe, tasks, RaySettings(cluster.address)), 3, kill)) == expected
    assert pools[0].started == 3


@pytest.mark.long
@real_ray
def test_a_node_may_leave(cluster, hub):
    recipe, tasks = recipe_of(hub), tasks_of(16)
    expected = texts_and_errors(run_tasks(recipe, tasks))

    def leave():
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    assert texts_and_errors(after(run_tasks(recipe, tasks, RaySettings(cluster.address)), 3, leave)) == expected
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


@pytest.mark.long
@real_ray
def test_a_prompt_that_crashes_workers_is_quarantined(cluster, hub, monkeypatch):
    monkeypatch.setattr(task_queue, "SUSPECT", 1)
    tasks = [replace(task, prompt="poison") if task.source[0] == 3 else task for task in tasks_of(6)]
    expected, _ = texts_and_errors(run_tasks(recipe_of(hub, "reward"), [t for t in tasks if t.prompt != "poison"]))
    texts, errors = texts_and_errors(run_tasks(recipe_of(hub, "reward"), tasks, RaySettings(cluster.address)))
    assert texts == expected
    assert list(errors) == [(3, 0)]
    assert errors[3, 0].startswith("quarantined: 2 workers crashed while running it")


@pytest.mark.long
@real_ray
def test_command_line_goes_on_where_it_was_interrupted(cluster, hub, tmp_path, monkeypatch, capsys):
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": f"Prompt {i}"}) + "\n" for i in range(8)) + '{"id": 9, "prompt": ""}\n')
    recipe = recipe_of(hub)
    models = [x for role in ("base", "tuned", "untuned", "value") for x in (f"--{role}", str(hub / role))]
    sizes = [
        "-W",
        "2",
        "-K",
        "2",
        "-L",
        "4",
        "--max-new-tokens",
        "12",
        "--seed",
        "5",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--batch-size",
        "2",
    ]
    command = ["ivg", "generate", "--input", str(source), "--output", str(sink), "--ray", cluster.address, *models, *sizes]
    monkeypatch.setattr(sys, "argv", command)
    real, written = store.ResumableRows.append, []

    def interrupted(self, row):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(real(self, row))

    monkeypatch.setattr(store.ResumableRows, "append", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    first = sink.read_text().splitlines()
    assert len(first) == 3
    monkeypatch.setattr(store.ResumableRows, "append", real)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "line 9: empty prompt" in capsys.readouterr().err
    rows = [json.loads(line) for line in sink.read_text().splitlines()]
    assert sink.read_text().splitlines()[:3] == first
    assert len(rows) == 8
    expected, _ = texts_and_errors(run_tasks(recipe, tasks_of(8)))
    assert {(r["id"], r["index"]): r["text"] for r in rows} == expected


@pytest.mark.long
@real_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_nobody_at_the_address(address):
    started = time.monotonic()
    with pytest.raises(RayError, match=f"no Ray cluster at {address}: .*refused"):
        list(run_tasks(Recipe(), tasks_of(1), RaySettings(address)))
    assert time.monotonic() - started < 200  # refused, not waited for
