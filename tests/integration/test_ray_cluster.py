"""The Ray backend on a real Ray of two nodes: workers are killed, a node leaves, a prompt crashes workers, the command is interrupted."""

import json
import os
import re
import secrets
import shlex
import signal
import time
from dataclasses import replace
from importlib.util import find_spec

import pytest

from ivg.jobs import store
from ivg.jobs.backends import run_tasks
from ivg.jobs.ray import actor_pool, driver, task_queue
from ivg.jobs.ray.resources import RayError
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import Recipe
from job_helpers import make_models, recipe_of, tasks_of, texts_and_errors

pytestmark = [pytest.mark.long, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ivg[ray]'")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("hub"))


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


def test_a_killed_worker_is_replaced_and_its_prompts_are_done_again(cluster, pools, hub):
    recipe, tasks = recipe_of(hub), tasks_of(8, n=2)
    expected = texts_and_errors(run_tasks(recipe, tasks))

    def kill():
        os.kill(process(next(a for a in pools[0].actors if a.call is not None and a.stage == "work")), signal.SIGKILL)

    assert texts_and_errors(after(run_tasks(recipe, tasks, RaySettings(cluster.address)), 3, kill)) == expected
    assert pools[0].started == 3


def test_a_node_may_leave(cluster, hub):
    recipe, tasks = recipe_of(hub), tasks_of(16)
    expected = texts_and_errors(run_tasks(recipe, tasks))

    def leave():
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    assert texts_and_errors(after(run_tasks(recipe, tasks, RaySettings(cluster.address)), 3, leave)) == expected
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


def test_a_prompt_that_crashes_workers_is_quarantined(cluster, hub, monkeypatch):
    monkeypatch.setattr(task_queue, "SUSPECT", 1)
    tasks = [replace(task, prompt="poison") if task.source[0] == 3 else task for task in tasks_of(6)]
    expected, _ = texts_and_errors(run_tasks(recipe_of(hub, "reward"), [t for t in tasks if t.prompt != "poison"]))
    texts, errors = texts_and_errors(run_tasks(recipe_of(hub, "reward"), tasks, RaySettings(cluster.address)))
    assert texts == expected
    assert list(errors) == [(3, 0)]
    assert errors[3, 0].startswith("quarantined: 2 workers crashed while running it")


def test_command_line_goes_on_where_it_was_interrupted(cluster, hub, tmp_path, monkeypatch, ivg):
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": f"Prompt {i}"}) + "\n" for i in range(8)) + '{"id": 9, "prompt": ""}\n')
    models = [x for role in ("base", "tuned", "untuned", "value") for x in (f"--{role}", hub / role)]
    sizes = shlex.split("-W 2 -K 2 -L 4 --max-new-tokens 12 --seed 5 --dtype float32 --device cpu --batch-size 2")
    command = ["generate", "--input", source, "--output", sink, "--ray", cluster.address, *models, *sizes]
    real, written = store.ResumableRows.append, []

    def interrupted(self, row):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(real(self, row))

    with monkeypatch.context() as patch:
        patch.setattr(store.ResumableRows, "append", interrupted)
        assert ivg(*command)[0] == 130
    first = sink.read_text().splitlines()
    assert len(first) == 3
    code, _, err = ivg(*command)
    assert code == 1
    assert "line 9: empty prompt" in err
    rows = [json.loads(line) for line in sink.read_text().splitlines()]
    assert sink.read_text().splitlines()[:3] == first
    assert len(rows) == 8
    expected, _ = texts_and_errors(run_tasks(recipe_of(hub), tasks_of(8)))
    assert {(r["id"], r["index"]): r["text"] for r in rows} == expected


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_no_cluster_at_the_address(address):
    started = time.monotonic()
    with pytest.raises(RayError, match=f"no Ray cluster at {address}: .*refused"):
        list(run_tasks(Recipe(), tasks_of(1), RaySettings(address)))
    assert time.monotonic() - started < 200  # refused, not waited for
