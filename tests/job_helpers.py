"""What tests of jobs share: tiny models of all roles, tasks, and a Ray in this process whose actors die when a test says so."""

import random
from types import SimpleNamespace

from ivg.jobs.ray import driver
from ivg.jobs.runner import Task
from ivg.settings.recipe import Recipe
from ivg.testing import byte_tokenizer, tiny_model, tiny_value


def make_models(folder):
    """Tiny models of all roles, and a reward that ends its process at the word poison."""
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


def tasks_of(count, n=1):
    """Tasks for so many prompts; each task's source is (number of the prompt, sample)."""
    return [Task(f"Prompt {i}", 5, k, (i, k)) for i in range(count) for k in range(n)]


def texts_and_errors(results):
    """Texts by source, and errors by source; no source twice."""
    texts, errors = {}, {}
    for r in results:
        assert r.task.source not in texts | errors
        (errors if r.completion is None else texts)[r.task.source] = r.error or r.completion.text
    return texts, errors


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


def connect(monkeypatch, ray):
    """Use ``ray`` in place of the real one."""

    class Connected:
        def __enter__(self):
            return ray

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(driver, "connected", lambda _: Connected())
    return ray
