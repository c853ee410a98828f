"""Two locks: threads that share models take turns, and one process at a time writes a file.

A :class:`FairLock` is held for one call at a time (a step of the search, a score), never while a generator is suspended: so a loop
that was left in the middle blocks no one, and two loops in one thread take turns, too.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ivg.errors import OutputError

LOCK_TIMEOUT = 10.0
"""Seconds to wait for a file that the child processes of a killed run still hold: they end soon after it."""

log = logging.getLogger("ivg")


class FairLock:
    """A reentrant lock that waiting threads get in the order in which they asked for it.

    With a ``threading.Lock`` a thread that loops over steps gets the lock again before any waiting thread wakes up.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()  # a finaliser may call `later` while its thread is in here
        self._owner: int | None = None
        self._depth = 0
        self._waiting: deque[threading.Event] = deque()
        self._later: deque[Callable[[], object]] = deque()

    @property
    def waiting(self) -> int:
        """Number of waiting threads."""
        return len(self._waiting)

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
        except BaseException:  # KeyboardInterrupt: __exit__ will not be called
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._guard:
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    def later(self, work: Callable[[], object]) -> None:
        """Do ``work`` under the lock: now if it is free, else when the next thread gets it. Never waits.

        An exception of ``work`` is logged, not raised in that other thread.
        For finalisers, which may run anywhere, even inside a method of this lock in the same thread.
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
        except BaseException:  # KeyboardInterrupt: leave the queue, or pass on the lock if it was already ours
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._pass_on()
            raise
        with self._guard:
            self._owner, self._depth = me, 1

    def _pass_on(self) -> None:
        """Hand over to the first waiting thread; the lock is never free in between, so that no other thread overtakes."""
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


@contextmanager
def lock_file(path: Path, *, wait: bool = False, timeout: float | None = None) -> Iterator[None]:
    """Be the only process that writes ``path``; the lock ends with the process, however that ends.

    Args:
        path: of the file. ``.<name>.lock`` beside it exists while the lock is held; a link locks the file that it points to.
        wait: also wait for a run that is alive, not only for child processes of a killed one.
        timeout: seconds to wait; None: :data:`LOCK_TIMEOUT`; -1: until the lock is free.

    Raises:
        OutputError: another run is writing the file; no lock can be created there.
    """
    from filelock import FileLock, Timeout

    there = path.resolve()  # one file may have several names
    lock = there.parent / f".{there.name}.lock"
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(
            LOCK_TIMEOUT if timeout is None else timeout, poll_interval=0.05, cancel_check=lambda: not wait and _alive(_owner(lock))
        )
    except Timeout:
        owner = _owner(lock)
        who = f" (process {owner[0]} on {owner[1]})" if owner is not None else ""
        raise OutputError(f"another run is writing {path}{who}\n  wait until it ends, or write to another path") from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):  # a file system without locks
            raise OutputError(f"cannot write {path}: {e.strerror}\n  write to another folder") from None
    try:
        with suppress(OSError):
            lock.write_text(f"{_run_process()} {platform.node()}\n")
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is still ours
        held.release()


def _owner(lock: Path) -> tuple[int, str] | None:
    """(process, machine) that wrote its name into a lock; None: it has not yet."""
    with suppress(OSError):
        number, _, host = lock.read_text().strip().partition(" ")
        return (int(number), host) if number.isdigit() and host else None
    return None


def _run_process() -> int:
    """The main process of this run; its child processes end soon after it."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def _alive(owner: tuple[int, str] | None) -> bool:
    """Is the run alive? That of another machine is believed to be."""
    import psutil

    if owner is None:
        return False
    if owner[1] != platform.node():
        return True
    try:
        return psutil.Process(owner[0]).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
