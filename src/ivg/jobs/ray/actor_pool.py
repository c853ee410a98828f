"""The workers as Ray actors: started, polled, replaced. The only file that calls Ray.

Every worker has at most one pending call. An actor that Ray reports lost, or that breaks, is killed and another takes its place;
its later results are ignored.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ivg.errors import MissingDependencyError, shortened
from ivg.jobs.ray.resources import RayError, WorkerPlan
from ivg.jobs.ray.worker import Worker, WorkerReport
from ivg.jobs.runner import Task
from ivg.settings.ray import LOCAL, RaySettings

PLACEMENT_TIMEOUT = 600.0
"""Seconds in which at least one worker must find a place."""
CONNECT_TIMEOUT = 5.0
"""Seconds for the head of the cluster to answer at its port."""
POLL_SECONDS = 1.0
"""Seconds to wait for results at a time."""
OBJECT_STORE_BYTES = 128 << 20
"""Size of Ray's object store on a cluster of our own: only texts go through it."""
_REASONS = ("Worker exit type", "died because", "dead because", "Error: ")
"""Lines of Ray's reports that have one of these say what happened."""
STARTS, TRIES, EXCUSED = 3, 4, 10
"""Crashes in a row that end the run: before any worker was ready, and (for each worker) without one result; excused ones."""


@contextmanager
def connected(settings: RaySettings) -> Iterator[Any]:
    """Ray, connected; what was connected before is used, and left as it is.

    Raises:
        MissingDependencyError: no Ray here.
        RayError: nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise MissingDependencyError(f"{e}\n  --ray needs the extra ray: pip install 'ivg[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    _check_port(settings)
    own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if settings.address == LOCAL else {}
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as e:  # of many kinds, by what did not answer
        raise _unreachable(settings, shortened(" ".join(str(e).split()))) from None  # two versions stand in lines of their own
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_port(settings: RaySettings) -> None:
    """Fail within seconds: Ray itself tries for minutes."""
    if settings.endpoint is not None:
        try:
            socket.create_connection(settings.endpoint, timeout=CONNECT_TIMEOUT).close()
        except OSError as e:
            raise _unreachable(settings, str(e)) from None


def _unreachable(settings: RaySettings, why: str) -> RayError:
    return RayError(
        f"no Ray cluster at {settings.address}: {why}"
        "\n  start one with: ray start --head --port 6379 (and on the others: ray start --address HEAD:6379), or give --ray local"
        "\n  a cluster that asks for a token: set RAY_AUTH_MODE=token (docs/how-to/scaling.md)"
    )


def nodes(ray: Any) -> list[dict[str, float]]:
    """Resources of the nodes that are alive."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


@dataclass(slots=True, eq=False)
class Actor:
    """One worker; ``call`` is what it is doing, ``stage`` how far it has come: ``hello``, ``load``, ``work``."""

    number: int
    handle: Any
    call: Any
    stage: str = "hello"
    where: str = "a node"


@dataclass(frozen=True, slots=True)
class ActorFailure:
    """The worker is gone, or broken; what it had done before is in ``report``."""

    why: str
    report: WorkerReport | None = None


class ActorPool:
    """All workers of one run.

    ``ray.util.ActorPool`` gives an actor one task at a time, replaces none that died, and does not say whose task was lost.

    Args:
        ray: connected.
        plan: number and resources of the workers.
        recipe: as JSON.
        trace: completions keep the tree of beams.
    """

    def __init__(self, ray: Any, plan: WorkerPlan, recipe: str, *, trace: bool) -> None:
        self.ray, self.plan, self.recipe, self.trace = ray, plan, recipe, trace
        self.started = self._crashes = self._start_crashes = self._excused = 0
        self._unplaced_since = time.monotonic()
        self._kind = ray.remote(num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
        self.actors = [self._start() for _ in range(plan.workers)]

    def _start(self) -> Actor:
        handle = self._kind.remote()
        self.started += 1
        return Actor(self.started, handle, handle.hello.remote())

    @property
    def idle(self) -> list[Actor]:
        """Those that are ready and have nothing to do."""
        return [a for a in self.actors if a.stage == "work" and a.call is None]

    def send(self, actor: Actor, tasks: Sequence[Task[int]]) -> None:
        """Let it continue, with these tasks in addition."""
        actor.call = actor.handle.advance.remote(list(tasks))

    def reset_crashes(self) -> None:
        """A result came: crashes before it do not count towards the end of the run."""
        self._crashes = self._excused = 0

    def excuse_crash(self) -> None:
        """The crash was that of a suspected or quarantined task: a few of these in a row do not count either."""
        self._excused += 1
        if self._excused <= EXCUSED:
            self._crashes = 0

    def poll(self) -> list[tuple[Actor, WorkerReport | ActorFailure]]:
        """What came since the last call; waits a moment where nothing has.

        Raises:
            RayError: no worker finds a place; a node that has another ivg, or none; a model that a node cannot load.
        """
        calls = {a.call: a for a in self.actors if a.call is not None}
        ready, rest = self.ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS) if calls else ([], [])
        ready += self.ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest and ready else []
        out: list[tuple[Actor, WorkerReport | ActorFailure]] = []
        for call in ready:
            actor = calls[call]
            actor.call = None
            event = self._event(actor, call)
            if event is not None:
                out.append((actor, event))
        self._check_placement()
        return out

    def _event(self, actor: Actor, call: Any) -> WorkerReport | ActorFailure | None:
        """What a call brought; None where the driver need not know."""
        try:
            got = self.ray.get(call)
        except self.ray.exceptions.RayError as e:
            return ActorFailure(f"{actor.where}: {_reason(e)}")
        if actor.stage == "hello":
            self._load(actor, *got)
            return None
        report: WorkerReport = got
        if report.crash is not None:
            return ActorFailure(f"{actor.where}: {report.crash}", report)
        if actor.stage == "load":
            if report.error is not None:
                raise RayError(f"{actor.where}: {report.error}\n  the recipe's models and files must be there on every node")
            actor.stage, self._start_crashes = "work", 0
        return report

    def _load(self, actor: Actor, where: str, version: str) -> None:
        from ivg.utils.version import VERSION

        if version != VERSION:
            raise RayError(f"{where} has ivg {version}, and this machine {VERSION}\n  install the same version on every node")
        actor.where, actor.stage = where, "load"
        actor.call = actor.handle.load.remote(self.recipe, self.trace)

    def replace(self, actor: Actor, why: str) -> None:
        """Start another in place of one that failed.

        Raises:
            RayError: too many crashed in a row.
        """
        if "No module named 'ivg'" in why:
            raise RayError(f"a node has no ivg: {why}\n  install the same version on every node, for the Python that Ray runs there")
        self._crashes += 1
        self._start_crashes += actor.stage != "work"
        starting = self._start_crashes >= max(STARTS, self.plan.workers)
        if starting or self._crashes > TRIES * self.plan.workers + STARTS:
            what = f"{self._start_crashes} workers in a row crashed at start" if starting else f"{self._crashes} workers in a row crashed"
            raise RayError(f"{what}; the last: {why}\n  check memory and Ray's logs on that node")
        with suppress(Exception):  # it usually has died already
            self.ray.kill(actor.handle, no_restart=True)
        self.actors[self.actors.index(actor)] = self._start()

    def _check_placement(self) -> None:
        if any(a.stage != "hello" for a in self.actors):
            self._unplaced_since = time.monotonic()
        elif time.monotonic() - self._unplaced_since > PLACEMENT_TIMEOUT:
            each = f"{self.plan.cpus:g} CPUs and {self.plan.gpus:g} GPUs"
            raise RayError(f"no worker was placed within {PLACEMENT_TIMEOUT:g} seconds; each needs {each}\n  check: ray status")

    def kill(self) -> None:
        """End all workers."""
        for actor in self.actors:
            with suppress(Exception):
                self.ray.kill(actor.handle, no_restart=True)


def _reason(e: Exception) -> str:
    """The lines of Ray's long reports that say what happened."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    reasons = [line for line in lines if any(word in line for word in _REASONS)]
    text = " ".join(dict.fromkeys(reasons[-2:] or lines[:1])).partition(" Some common causes include")[0]
    return shortened(text) or type(e).__name__
