"""Where a run happened and what it used: processor, memory, versions, commit; peak memory of a piece of work.

Knows: the operating system. Nothing of it decides a result; nothing of it stands in transcripts or scores.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any, TextIO

from ivg.errors import OutputError

PATIENCE = 10.0
"""Seconds to wait for a file that a killed run's helpers still hold: they need a moment to go."""


def facts() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    import torch
    import transformers

    from ivg.utils.version import VERSION

    out: dict[str, Any] = {
        "processor": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ivg": VERSION,
    }
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def made() -> dict[str, Any]:
    """Commit, command and machine of this process: who made the rows that it writes."""
    return {"commit": commit(), "command": command(), "machine": facts()}


def commit(file: Path | None = None) -> str | None:
    """The checkout's commit (with ``+`` where files differ from it); None without git, or where git does not know this very code.

    A package installed inside another project's checkout is not that project's.
    """
    file = file or Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        head = _git(file.parent, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(file.parent, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process, as it can be typed again."""
    name = Path(sys.argv[0]).name
    return shlex.join(["ivg" if name in ("ivg", "__main__.py") else name, *sys.argv[1:]])


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def on_gpu(device: str | None = None) -> bool:
    """Is memory that of a GPU? ``device`` None: wherever there is one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and not (device or "cuda").startswith("cpu")


def trim() -> None:
    """Give freed memory back, so that peaks are of what is in use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Peak memory is counted from now on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str | None = None) -> int | None:
    """Peak memory since :func:`reset_peak`: of the GPU (see :func:`on_gpu`), else of this process (weights included)."""
    if on_gpu(device):
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    return _status("VmHWM")


def resident_bytes(device: str | None = None) -> int | None:
    """Memory in use now, counted as :func:`peak_bytes` counts."""
    if on_gpu(device):
        return int(sys.modules["torch"].cuda.memory_allocated())
    return _status("VmRSS")


def others(begin: tuple[float, float, float]) -> float | None:
    """Share of the machine's processors that other processes took since ``begin`` = :func:`clock`; None where it is not known.

    The system counts in hundredths of a second: nothing is said of less than a second.
    """
    wall, busy, own = (now - then for now, then in zip(clock(), begin, strict=True))
    return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if busy and wall >= 1 else None


def clock() -> tuple[float, float, float]:
    """Seconds: on the wall, of all processors at work (other guests' included), of this process."""
    busy = 0.0
    with suppress(OSError, ValueError):
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        busy = sum(int(n) for i, n in enumerate(fields) if i not in (3, 4)) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting
    return monotonic(), busy, process_time()


def _status(field: str) -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
        return int(line.split()[1]) * 1024
    return None


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes ``path``; the system ends the claim with the process, however that ends.

    Args:
        path: of the file. ``.<name>.lock`` beside it is there meanwhile; links to the file are the file.
        wait: for a run that is at work, too, rather than for what a killed one left behind only; both for :data:`PATIENCE` seconds.

    Raises:
        OutputError: another run is writing it; no lock can be made there.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system: two runs at once are the user's to avoid
        yield
        return
    there = path.resolve()  # one file may have several names
    lock = there.parent / f".{there.name}.lock"
    until = monotonic() + PATIENCE
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+")
        except OSError as e:
            raise OutputError(f"cannot write {path}: {e.strerror}\n  give a place in a folder of yours") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(file, lock):
                break
        except BlockingIOError:
            owner = _owner(file)
            if monotonic() > until or (_at_work(owner) and not wait):
                file.close()
                who = f" (process {owner[0]} on {owner[1]})" if owner is not None else ""
                raise OutputError(f"another run writes {path}{who}\n  wait until it ends, or give another place") from None
            sleep(0.05)
        except OSError:  # a file system without locks
            file.close()
            yield
            return
        file.close()
    with file:
        file.truncate(0)
        file.write(f"{_leader()} {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is still ours


def _is_there(file: TextIO, path: Path) -> bool:
    """Is ``path`` still the open file? Whoever had the lock removes it at the end."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _owner(file: TextIO) -> tuple[int, str] | None:
    """(process, machine) that wrote its name into a lock; None: it has not yet."""
    file.seek(0)
    number, _, host = file.read().strip().partition(" ")
    return (int(number), host) if number.isdigit() and host else None


def _leader() -> int:
    """The process that stands for this run: processes that it started end soon after it."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def _at_work(owner: tuple[int, str] | None) -> bool:
    """Does the run still live? Of another machine's we cannot know, and believe its lock."""
    if owner is None:
        return False
    if owner[1] != platform.node():
        return True
    with suppress(OSError):
        return Path(f"/proc/{owner[0]}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
