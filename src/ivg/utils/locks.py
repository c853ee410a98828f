"""Threads that share models take turns, first come first served.

A :class:`FairLock` is held for one call at a time (a round of the search, a score), never while a generator is suspended: so a loop
that was left in the middle keeps nobody waiting, and two loops in one thread take turns, too. Standard library only.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger("ivg")


class FairLock:
    """A reentrant lock that waiting threads get in the order in which they asked for it."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # a finaliser may call `later` while its thread is in here
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[threading.Event] = deque()
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> FairLock:
        me = threading.get_ident()
        with self._guard:
            if self._owner == me:
                self._depth += 1
                return self
            if self._owner is None:
                self._owner, self._depth, turn = me, 1, None
            else:
                turn = threading.Event()
                self._waiting.append(turn)
        if turn is not None:
            self._wait(turn, me)
        try:
            self._clean_up()
        except BaseException:  # KeyboardInterrupt: nobody will leave what was not entered
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._guard:
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    def later(self, work: Callable[[], object]) -> None:
        """Do ``work`` under the lock: now where nobody holds it, else before whoever gets it next goes on. Never waits.

        An exception of ``work`` is logged: whoever comes next has no part in it.
        For finalisers, which may run anywhere: in the middle of a call of this very thread, too.
        """
        self._later.append(work)
        with self._guard:
            free = self._owner is None
        if free:
            with self:
                pass

    def _wait(self, turn: threading.Event, me: int) -> None:
        try:
            turn.wait()
        except BaseException:  # KeyboardInterrupt: give the place in the queue up, or the turn that came meanwhile
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._pass_on()
            raise
        with self._guard:
            self._owner, self._depth = me, 1

    def _pass_on(self) -> None:
        """To the first that waits; the lock is nobody's for no moment, so that no newcomer overtakes."""
        if self._waiting:
            self._owner = -1
            self._waiting.popleft().set()
        else:
            self._owner = None

    def _clean_up(self) -> None:
        while self._later:
            work = self._later.popleft()
            try:
                work()
            except Exception:
                log.exception("cleaning up failed")
