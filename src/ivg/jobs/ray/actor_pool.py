"""The workers as Ray actors: started, heard, replaced. The only file that calls Ray.

Every worker has at most one call under way. An actor that Ray reports lost, or that breaks, is killed and another takes its place;
nothing that it still says is listened to.
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
from ivg.jobs.ray.settings import LOCAL, RayError, RaySettings, Size
from ivg.jobs.ray.worker import Order, Report, Worker

PATIENCE = 600.0
"""Seconds in which at least one worker must find a place."""
KNOCK = 5.0
"""Seconds for the head of the cluster to answer at its port."""
NEWS = 1.0
"""Seconds to wait for news at a time."""
OBJECTS = 128 << 20
"""Bytes of Ray's object store on a cluster of our own: only texts go through it."""
_TELLING = ("Worker exit type", "died because", "dead because", "Error: ")
"""Lines of Ray's reports that have one of these say what happened."""
STARTS, TRIES, ASIDE = 3, 4, 10
"""Deaths in a row that end the run: before any worker was ready, and (for each worker) without one answer."""


@contextmanager
def connected(settings: RaySettings) -> Iterator[Any]:
    """Ray, connected; what was connected before is used, and left as it is.

    Raises:
        MissingDependencyError: no Ray here.
        RayError: nobody answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise MissingDependencyError(f"{e}\n  --ray needs the extra ray: pip install 'ivg[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    _knock(settings)
    own = {"include_dashboard": False, "object_store_memory": OBJECTS} if settings.address == LOCAL else {}
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as e:  # of many kinds, by what did not answer
        raise _unreached(settings, shortened(" ".join(str(e).split()))) from None  # two versions stand in lines of their own
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(settings: RaySettings) -> None:
    """Ray itself tries for minutes."""
    if settings.endpoint is not None:
        try:
            socket.create_connection(settings.endpoint, timeout=KNOCK).close()
        except OSError as e:
            raise _unreached(settings, str(e)) from None


def _unreached(settings: RaySettings, why: str) -> RayError:
    return RayError(
        f"no Ray cluster at {settings.address}: {why}"
        "\n  start one with: ray start --head --port 6379 (and on the others: ray start --address HEAD:6379), or give --ray local"
        "\n  a cluster that asks for a token: set RAY_AUTH_MODE=token (docs/how-to/scaling.md)"
    )


def nodes(ray: Any) -> list[dict[str, float]]:
    """Resources of the nodes that live."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


@dataclass(slots=True, eq=False)
class Actor:
    """One worker; ``call`` is what it is doing, ``stage`` how far it has come: ``hello``, ``load``, ``work``."""

    number: int
    actor: Any
    call: Any
    stage: str = "hello"
    where: str = "a node"


@dataclass(frozen=True, slots=True)
class ActorFailure:
    """The worker is gone, or broken; what it had done before is in ``report``."""

    why: str
    report: Report | None = None


class ActorPool:
    """All workers of one run.

    Args:
        ray: connected.
        size: how many, and what each takes.
        recipe: as JSON.
        trace: completions have the tree of beams.
    """

    def __init__(self, ray: Any, size: Size, recipe: str, *, trace: bool) -> None:
        self.ray, self.size, self.recipe, self.trace = ray, size, recipe, trace
        self._made = self._barren = self._unborn = self._aside = 0
        self._nobody_since = time.monotonic()
        self._kind = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
        self.members = [self._enlist() for _ in range(size.workers)]

    def _enlist(self) -> Actor:
        actor = self._kind.remote()
        self._made += 1
        return Actor(self._made, actor, actor.hello.remote())

    @property
    def idle(self) -> list[Actor]:
        """Those that are ready and have nothing to do."""
        return [m for m in self.members if m.stage == "work" and m.call is None]

    def send(self, member: Actor, orders: Sequence[Order]) -> None:
        """Let it go on, with these orders besides."""
        member.call = member.actor.advance.remote(list(orders))

    def answered(self) -> None:
        """An answer came: whatever died before, the work goes on."""
        self._barren = self._aside = 0

    def set_aside(self) -> None:
        """Prompts were found out that workers die with: that is getting on, too, for some time."""
        self._aside += 1
        if self._aside <= ASIDE:
            self._barren = 0

    def news(self) -> list[tuple[Actor, Report | ActorFailure]]:
        """What came since the last call; waits a moment where nothing has.

        Raises:
            RayError: no worker finds a place; a node that has another ivg, or none; a model that a node cannot load.
        """
        calls = {m.call: m for m in self.members if m.call is not None}
        ready, rest = self.ray.wait(list(calls), num_returns=1, timeout=NEWS) if calls else ([], [])
        ready += self.ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest and ready else []
        out: list[tuple[Actor, Report | ActorFailure]] = []
        for call in ready:
            member = calls[call]
            member.call = None
            news = self._hear(member, call)
            if news is not None:
                out.append((member, news))
        self._check_patience()
        return out

    def _hear(self, member: Actor, call: Any) -> Report | ActorFailure | None:
        """What a call brought, where the run has to know."""
        try:
            got = self.ray.get(call)
        except self.ray.exceptions.RayError as e:
            return ActorFailure(f"{member.where}: {_reason(e)}")
        if member.stage == "hello":
            self._greet(member, *got)
            return None
        report: Report = got
        if report.crash is not None:
            return ActorFailure(f"{member.where}: {report.crash}", report)
        if member.stage == "load":
            if report.error is not None:
                raise RayError(f"{member.where}: {report.error}\n  the recipe's models and files must be there on every node")
            member.stage, self._unborn = "work", 0
        return report

    def _greet(self, member: Actor, where: str, version: str) -> None:
        from ivg.utils.version import VERSION

        if version != VERSION:
            raise RayError(f"{where} has ivg {version}, and this machine {VERSION}\n  install the same version on every node")
        member.where, member.stage = where, "load"
        member.call = member.actor.load.remote(self.recipe, self.trace)

    def replace(self, member: Actor, why: str) -> None:
        """Another takes the place of one that is lost.

        Raises:
            RayError: too many died in a row.
        """
        if "No module named 'ivg'" in why:
            raise RayError(f"a node has no ivg: {why}\n  install the same version on every node, for the Python that Ray runs there")
        self._barren += 1
        self._unborn += member.stage != "work"
        unborn = self._unborn >= max(STARTS, self.size.workers)
        if unborn or self._barren > TRIES * self.size.workers + STARTS:
            what = f"{self._unborn} workers in a row died as they started" if unborn else f"{self._barren} workers in a row died at work"
            raise RayError(f"{what}; the last: {why}\n  look at memory and at Ray's logs on that node")
        with suppress(Exception):  # mostly it is dead already
            self.ray.kill(member.actor, no_restart=True)
        self.members[self.members.index(member)] = self._enlist()

    def _check_patience(self) -> None:
        if any(m.stage != "hello" for m in self.members):
            self._nobody_since = time.monotonic()
        elif time.monotonic() - self._nobody_since > PATIENCE:
            shown = f"{self.size.cpus:g} CPUs and {self.size.gpus:g} GPUs"
            raise RayError(f"no worker found a place within {PATIENCE:g} seconds; each asks for {shown}\n  see what else runs: ray status")

    def dismiss(self) -> None:
        """All may go."""
        for member in self.members:
            with suppress(Exception):
                self.ray.kill(member.actor, no_restart=True)


def _reason(e: Exception) -> str:
    """The telling lines of Ray's many."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in _TELLING)]
    told = " ".join(dict.fromkeys(telling[-2:] or lines[:1])).partition(" Some common causes include")[0]
    return shortened(told) or type(e).__name__
